"""Face detection as a task: label-free loss and agreement between a detector's outputs and a teacher's.

    distance = sum_a [KL(teacher_a || student_a) + p_a smooth_l1(loc_a - loc_a of the teacher)] / (1 + sum_a p_a)

per record, over all anchors a, with p_a the teacher's probability of a face there. Detections are scored by average
precision, which counts those of little confidence too; so does this, each as far as the teacher believes in it.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.core.errors import ImageError, RequestError
from sfumato.core.task import Image, Outputs
from sfumato.tasks.detection.boxes import Detections, detect, priors
from sfumato.tasks.detection.precision import average_precision

MEAN_BGR = (104.0, 117.0, 123.0)
VIEWS_SEED = 1708
WHOLE = 1e-3  # how far from a whole number a value of a picture may be: float32 has 1e-5 there
FOUND = 0.2  # the teacher's detections that count as faces when agreement is scored
SURE = 0.9  # and as faces that a fit hides the identity of


@dataclass(frozen=True)
class FaceDetection:
    """The task of FaceBoxes; `size` is the input's (height, width), or None for each photograph's own."""

    size: tuple[int, int] | None = (1024, 1024)
    name: str = "face-detection"

    def views(self, record: Image, index: int) -> list[Image]:
        """The photograph, its mirror image zoomed in, and the photograph shrunk into a grey frame; three."""
        draw = np.random.default_rng([VIEWS_SEED, index])
        height, width = record.shape[:2]
        crop_h, crop_w = (max(1, round(side * draw.uniform(0.5, 0.95))) for side in (height, width))
        top, left = (int(draw.integers(0, room + 1)) for room in (height - crop_h, width - crop_w))
        zoomed = record[top : top + crop_h, left : left + crop_w][:, ::-1]
        grown = draw.uniform(1.2, 2.0)
        frame = np.full((round(height * grown), round(width * grown), 3), MEAN_BGR, np.uint8)
        top, left = (int(draw.integers(0, room + 1)) for room in (frame.shape[0] - height, frame.shape[1] - width))
        frame[top : top + height, left : left + width] = record
        return [record, np.ascontiguousarray(zoomed), frame[:, ::-1] if index % 2 else frame]

    def preprocess(self, record: Image) -> Tensor:
        """BGR uint8 [H, W, 3] -> float [3, height, width], resized, minus (104, 117, 123)."""
        if self.size is not None and record.shape[:2] != self.size:
            record = cv2.resize(record, self.size[::-1], interpolation=cv2.INTER_LINEAR)
        centred = record.astype(np.float32) - np.asarray(MEAN_BGR, np.float32)
        # As channels-last memory: half the head's time on a CPU, the same values.
        return torch.from_numpy(centred).permute(2, 0, 1)

    def picture(self, x: np.ndarray) -> Image:
        """Inverse of `preprocess` for a picture of the input's size: float [3, height, width] -> BGR uint8 [H, W, 3].

        Raises ImageError for another size, and for values that no 8-bit picture has.
        """
        if x.ndim != 3 or len(x) != 3 or x.shape[1:] != (self.size or x.shape[1:]) or not x.size:
            high, wide = self.size or ("H", "W")
            raise ImageError(f"a tensor of shape {list(x.shape)} a record", wanted=f"[3, {high}, {wide}]")
        plain = np.ascontiguousarray(x.transpose(1, 2, 0)) + np.asarray(MEAN_BGR, np.float32)
        found = np.rint(np.clip(plain, 0, 255))
        if not (np.abs(plain - found) <= WHOLE).all():  # of nan and inf neither is true
            wanted = "an 8-bit BGR picture minus (104, 117, 123), resized before it was made float"
            raise ImageError("a tensor that is no 8-bit picture", wanted=wanted, do="send the picture itself, as IMAGE")
        picture: Image = found.astype(np.uint8)
        return picture

    def outputs(self, raw: Any) -> Outputs:
        loc, conf = raw
        return loc, conf

    def postprocess(self, outputs: Outputs, size: tuple[int, int]) -> Detections:
        """loc [A, 4] and conf [A, 2] of one record -> Detections in a photograph of (height, width)."""
        loc, conf = (t.detach().cpu() for t in outputs)
        anchors = priors(*(self.size or size))
        if len(anchors) != len(loc):
            raise RequestError(f"{len(loc)} anchors", wanted=f"{len(anchors)} for an input of {self.size or size}")
        return detect(loc, conf, anchors, size)

    def distance(self, student: Outputs, teacher: Outputs) -> Tensor:
        """[N]; see the module's equation."""
        (loc, conf), (loc_t, conf_t) = student, teacher
        log_p, log_q = F.log_softmax(conf, -1), F.log_softmax(conf_t, -1)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        believed = log_q[..., 1].exp()
        box = F.smooth_l1_loss(loc, loc_t, reduction="none").sum(-1)
        return (kl + believed * box).sum(1) / (1 + believed.sum(1))

    def agreement(self, student: Outputs, teacher: Outputs) -> float:
        """AP at IoU .5 of the student's detections against what the teacher found (score at least .2).

        Raises RequestError where the teacher found nothing at all: there is nothing to agree on.
        """
        found = [self._square(o) for o in zip(*student, strict=True)]
        truth = [self._square(o).above(FOUND).boxes for o in zip(*teacher, strict=True)]
        if not any(len(boxes) for boxes in truth):
            raise RequestError("the model finds no face in the records held out", wanted="photographs with faces")
        return average_precision(found, truth)

    def subjects(self, outputs: Outputs, size: tuple[int, int]) -> np.ndarray:
        """Faces that the model is sure of."""
        return self.postprocess(outputs, size).above(SURE).boxes

    def stages(self) -> tuple[str, ...]:
        return ("inception3", "conv3_2", "conv4_2")

    def _square(self, outputs: Outputs) -> Detections:
        return self.postprocess(outputs, self.size or _square_of(len(outputs[0])))


def _square_of(anchors: int) -> tuple[int, int]:
    raise RequestError(
        f"outputs of {anchors} anchors and no input size",
        wanted="a fixed input size while fitting",
        do="FaceDetection(size=(1024, 1024))",
    )
