import numpy as np
import pytest
import torch

from sfumato.tasks.detection.boxes import NMS_IOU, STAGES, VARIANCES, Detections, decode, detect, draw, priors


def slow_priors(height: int, width: int) -> list[list[float]]:
    """Anchor by anchor, as the paper describes them."""
    rows = []
    for stride, anchors in STAGES:
        for y in range(-(-height // stride)):
            for x in range(-(-width // stride)):
                for side, dense in anchors:
                    offsets = [k / dense for k in range(dense)] if dense > 1 else [0.5]
                    for dy in offsets:
                        for dx in offsets:
                            cx, cy = (x + dx) * stride / width, (y + dy) * stride / height
                            rows.append([cx, cy, side / width, side / height])
    return rows


@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 160), (100, 130)])
def test_priors_are_those_of_the_slow_obvious_loop(height: int, width: int) -> None:
    assert np.allclose(priors(height, width).numpy(), slow_priors(height, width), atol=1e-6)


def test_the_count_at_the_reports_input() -> None:
    # 32 x 32 x 21 + 16 x 16 + 8 x 8
    assert len(priors(1024, 1024)) == 21824


def test_decoding_undoes_the_coding() -> None:
    torch.manual_seed(0)
    anchors = priors(128, 128)
    wanted = torch.rand(len(anchors), 4) * 0.4 + 0.05  # cx cy w h
    loc = torch.cat(
        [
            (wanted[:, :2] - anchors[:, :2]) / (VARIANCES[0] * anchors[:, 2:]),
            torch.log(wanted[:, 2:] / anchors[:, 2:]) / VARIANCES[1],
        ],
        1,
    )
    boxes = decode(loc, anchors)
    assert torch.allclose((boxes[:, :2] + boxes[:, 2:]) / 2, wanted[:, :2], atol=1e-5)
    assert torch.allclose(boxes[:, 2:] - boxes[:, :2], wanted[:, 2:], atol=1e-5)


def test_detection_keeps_the_best_of_overlapping_boxes_in_the_photographs_pixels() -> None:
    anchors = priors(128, 128)
    conf = torch.full((len(anchors), 2), 0.0)
    conf[:, 0] = 10.0
    one, near, far = 0, 1, len(anchors) - 30
    for index, logit in ((one, 13.0), (near, 12.0), (far, 11.0)):
        conf[index, 1] = logit
    found = detect(torch.zeros(len(anchors), 4), conf, anchors, (256, 512))
    a, b = anchors[one], anchors[near]
    overlap = (a[2] - abs(float(a[0] - b[0]))) / (a[2] + abs(float(a[0] - b[0])))
    assert float(overlap) > NMS_IOU, "the two first anchors overlap enough to be one face"
    assert len(found) == 2
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    cx, cy, w, h = (a * torch.tensor([512, 256, 512, 256])).tolist()
    assert found.boxes[0].tolist() == pytest.approx([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], abs=1e-3)


def test_nothing_found_is_empty_not_an_error() -> None:
    anchors = priors(64, 64)
    conf = torch.tensor([[9.0, -9.0]]).expand(len(anchors), 2)
    found = detect(torch.zeros(len(anchors), 4), conf, anchors, (64, 64))
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)
    assert found.as_rows() == []


def test_drawing_leaves_the_photograph_alone() -> None:
    image = np.zeros((50, 60, 3), np.uint8)
    found = Detections(np.array([[10, 10, 30, 40], [-5, -5, 500, 500]], np.float32), np.array([0.9, 0.5], np.float32))
    drawn = draw(image, found)
    assert image.max() == 0
    assert drawn[10, 20].tolist() == [0, 0, 255]
    assert found.above(0.8).as_rows() == [{"x1": 10.0, "y1": 10.0, "x2": 30.0, "y2": 40.0, "score": 0.9}]
