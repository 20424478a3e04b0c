"""Face detection: FaceBoxes, its priors and boxes, and the average precision TR-4928 prints."""
