"""Priors, decoding, non-maximum suppression and drawing: from FaceBoxes' outputs to boxes in a photograph's pixels."""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import cv2
import numpy as np
import torch
from torch import Tensor

from sfumato.core.display import table
from sfumato.core.task import Image

# arXiv 1708.05234 section 3.2 and table 1: (stride, ((anchor side, densification), ...)) per stage.
STAGES = ((32, ((32, 4), (64, 2), (128, 1))), (64, ((256, 1),)), (128, ((512, 1),)))
VARIANCES = (0.1, 0.2)  # of the SSD box coding FaceBoxes trains with (arXiv 1512.02325 section 2.2)
# One rule for every arm, the public FaceBoxes test settings: keep .05, 5,000 into NMS at IoU .3, 750 out.
KEEP, BEFORE_NMS, NMS_IOU, AFTER_NMS = 0.05, 5000, 0.3, 750
_SHOWN = 20  # detections in a notebook


@dataclass(frozen=True, eq=False)
class Detections:
    """Boxes [n, 4] float32 x1 y1 x2 y2 in the photograph's pixels and scores [n], best first."""

    boxes: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> "Detections":
        """Those that score at least `score`."""
        keep = self.scores >= score
        return Detections(self.boxes[keep], self.scores[keep])

    def _repr_html_(self) -> str:
        rows = [[f"{value:g}" for value in row.values()] for row in self.as_rows()[:_SHOWN]]
        more = f", the best {_SHOWN} shown" if len(self) > _SHOWN else ""
        return table(("x1", "y1", "x2", "y2", "score"), rows, title=f"{len(self)} found{more}")

    def as_rows(self) -> list[dict[str, float]]:
        """One dict a face, for JSON and CSV."""
        return [
            {k: round(float(v), 2) for k, v in zip(("x1", "y1", "x2", "y2"), box, strict=True)}
            | {"score": round(float(score), 4)}
            for box, score in zip(self.boxes, self.scores, strict=True)
        ]


@lru_cache(maxsize=8)
def priors(height: int, width: int) -> Tensor:
    """Anchors of an input of height x width: [A, 4] cx cy w h, relative to the input; A = 21 h w + ... by stage.

    An anchor of side s densified n times stands at offsets (0, 1, .. n-1)/n of a cell, or at its middle where n = 1.
    """
    return torch.cat([_stage(height, width, stride, anchors) for stride, anchors in STAGES])


def _stage(height: int, width: int, stride: int, anchors: tuple[tuple[int, int], ...]) -> Tensor:
    rows, cols = ceil(height / stride), ceil(width / stride)
    cell = []
    for side, dense in anchors:
        offset = torch.arange(dense) / dense if dense > 1 else torch.tensor([0.5])
        dy, dx = torch.meshgrid(offset, offset, indexing="ij")
        cell.append(torch.stack([dx.flatten(), dy.flatten(), torch.full((dense**2,), float(side))], 1))
    offsets = torch.cat(cell)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    cx = (x.flatten()[:, None] + offsets[:, 0]) * stride / width
    cy = (y.flatten()[:, None] + offsets[:, 1]) * stride / height
    sides = offsets[:, 2].expand_as(cx)
    return torch.stack([cx, cy, sides / width, sides / height], -1).reshape(-1, 4)


def decode(loc: Tensor, anchors: Tensor) -> Tensor:
    """Offsets [..., A, 4] -> boxes x1 y1 x2 y2, relative to the input."""
    centre = anchors[:, :2] + loc[..., :2] * VARIANCES[0] * anchors[:, 2:]
    size = anchors[:, 2:] * torch.exp(loc[..., 2:] * VARIANCES[1])
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def detect(loc: Tensor, conf: Tensor, anchors: Tensor, size: tuple[int, int], keep: float = KEEP) -> Detections:
    """One record's outputs, loc [A, 4] and conf [A, 2] -> Detections in an image of (height, width)."""
    scores = torch.softmax(conf.float(), -1)[:, 1]
    chosen = torch.nonzero(scores > keep).flatten()
    chosen = chosen[scores[chosen].argsort(descending=True, stable=True)[:BEFORE_NMS]]
    scale = torch.tensor([size[1], size[0], size[1], size[0]], dtype=torch.float32)
    boxes = (decode(loc[chosen].float(), anchors[chosen]) * scale).numpy()
    return _suppress(boxes, scores[chosen].numpy())


def _suppress(boxes: np.ndarray, scores: np.ndarray) -> Detections:
    if not len(scores):
        return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
    corner_size = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    kept = list(cv2.dnn.NMSBoxes(corner_size.tolist(), scores.tolist(), 0.0, NMS_IOU))[:AFTER_NMS]
    return Detections(boxes[kept].astype(np.float32), scores[kept].astype(np.float32))


def draw(image: Image, found: Detections, colour: tuple[int, int, int] = (0, 0, 255)) -> Image:
    """A copy of the image with a rectangle a face, line width by the image's size."""
    canvas = image.copy()
    thick = max(1, round(max(image.shape[:2]) / 250))
    for x1, y1, x2, y2 in found.boxes.round().astype(int):
        cv2.rectangle(canvas, (int(x1), int(y1)), (int(x2), int(y2)), colour, thick)
    return canvas
