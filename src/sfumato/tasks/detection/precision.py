"""Average precision of one class, AP = sum over hits of (recall step) x (best precision at that recall or beyond).

The rule is PASCAL VOC's of 2010 and later: an image's detections, best score first, each look for the truth they
overlap most; at IoU >= 0.5 the first to claim a truth is a hit, all others are misses; the area is that under the
whole interpolated precision-recall curve. Detections of equal score enter the curve together, so AP does not depend
on the order of images. TR-4928 prints it per fold of FDDB and averages (mAP of one class is the same number).

Two box rules: as detected, and FDDB's convention, one shift and scale for all boxes (`Convention`), because FDDB's
ellipses are drawn taller than the boxes most detectors were trained on. It is cross-fitted (`cross_fit`: nine folds
give it, the tenth is scored) and fitted once, on the clean arm, for every arm: no arm gets a rule of its own.

Intervals are bootstrap percentiles over images, resampled inside each fold. A resample is a weight per image, and AP
needs of an image only its hits and misses between consecutive hit scores, so a thousand resamples are two products.

Sources: M. Everingham et al., The PASCAL VOC Challenge: a Retrospective, IJCV 111, 2015, section 2.2;
B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from sfumato.core.errors import RequestError

IOU = 0.5
RESAMPLES = 1000
LEVEL = 0.95
# A pair tells about conventions when the detector is sure and the boxes are plainly about the same face; 0.3 and not
# 0.5, or the pairs that differ most (which the convention is for) would be left out.
SURE, SAME_FACE = 0.5, 0.3


class Found(Protocol):
    """What was detected in one image: boxes [n, 4] x1 y1 x2 y2 and scores [n]."""

    @property
    def boxes(self) -> np.ndarray: ...

    @property
    def scores(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Boxed:
    """Boxes and scores of one image: a `Found` of our own."""

    boxes: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Convention:
    """centre' = centre + (dx w, dy h), (w', h') = (sx w, sy h): how one party's boxes become another's."""

    dx: float = 0.0
    dy: float = 0.0
    sx: float = 1.0
    sy: float = 1.0

    def apply(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes [n, 4] under the convention, float64."""
        b = _boxes(boxes)
        size = b[:, 2:] - b[:, :2]
        centre = (b[:, 2:] + b[:, :2]) / 2 + size * (self.dx, self.dy)
        half = size * (self.sx, self.sy) / 2
        return np.concatenate([centre - half, centre + half], axis=1)

    @classmethod
    def fit(cls, detections: Sequence[Found], truths: Sequence[np.ndarray]) -> Convention:
        """The medians over sure detections and the truths they match; the identity where there is no pair."""
        return cls._of(_pairs(detections, truths))

    @classmethod
    def _of(cls, pairs: np.ndarray) -> Convention:
        return cls(*(float(m) for m in np.median(pairs, axis=0))) if len(pairs) else cls()


@dataclass(frozen=True)
class Precision:
    """AP of each fold, their mean, and its bootstrap interval; with all that is needed to print it honestly.

    samples: [resamples] means of folds; arms scored with the same seed saw the same resampled images, so they pair.
    """

    folds: tuple[float, ...]
    mean: float
    low: float
    high: float
    images: int
    faces: int
    iou: float
    level: float
    resamples: int
    seed: int
    samples: np.ndarray = field(repr=False, compare=False)

    def drop(self, clean: Precision) -> tuple[float, float, float]:
        """How much AP this arm lost against the clean one: (mean, low, high), resampled in pairs."""
        if (self.images, self.faces, self.seed, self.resamples) != (
            clean.images,
            clean.faces,
            clean.seed,
            clean.resamples,
        ):
            raise RequestError("two arms that do not pair", wanted="the same images, seed and number of resamples")
        low, high = _percentiles(clean.samples - self.samples, self.level)
        return clean.mean - self.mean, low, high


def average_precision(detections: Sequence[Found], truths: Sequence[np.ndarray], *, iou: float = IOU) -> float:
    """AP over images: one `Found` and one array of truths [n, 4] for each. Raises RequestError without a truth."""
    return _point(_tally(detections, truths, iou, pooled=True))


def fold_precision(
    detections: Sequence[Sequence[Found]],
    truths: Sequence[Sequence[np.ndarray]],
    *,
    conventions: Sequence[Convention] | None = None,
    iou: float = IOU,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Precision:
    """AP fold by fold, [fold][image], averaged, with its interval; `conventions` (one a fold) move the boxes first."""
    _same_length(len(detections), len(truths), "folds")
    if conventions is not None:
        _same_length(len(conventions), len(truths), "conventions and folds")
        detections = [
            [Boxed(rule.apply(found.boxes), found.scores) for found in fold]
            for rule, fold in zip(conventions, detections, strict=True)
        ]
    tallies = [_tally(d, t, iou) for d, t in zip(detections, truths, strict=True)]
    folds = tuple(_point(tally) for tally in tallies)
    samples = _resampled(tallies, resamples, seed)
    low, high = _percentiles(samples, level)
    images, faces = sum(len(t.truths) for t in tallies), int(sum(t.truths.sum() for t in tallies))
    mean = float(np.mean(folds))
    return Precision(folds, mean, low, high, images, faces, iou, level, resamples, seed, samples)


def cross_fit(detections: Sequence[Sequence[Found]], truths: Sequence[Sequence[np.ndarray]]) -> list[Convention]:
    """One convention a fold, fitted on all OTHER folds: give it the clean arm, then score every arm with it."""
    _same_length(len(detections), len(truths), "folds")
    pairs = [_pairs(d, t) for d, t in zip(detections, truths, strict=True)]
    nothing = np.empty((0, 4))
    return [Convention._of(np.concatenate([nothing, *pairs[:i], *pairs[i + 1 :]])) for i in range(len(pairs))]


def match(boxes: np.ndarray, scores: np.ndarray, truths: np.ndarray, iou: float = IOU) -> np.ndarray:
    """Which detections of one image are hits, [n] bool in the order given."""
    return assign(boxes, scores, truths, iou) >= 0


def assign(boxes: np.ndarray, scores: np.ndarray, truths: np.ndarray, iou: float = IOU) -> np.ndarray:
    """The truth each detection claims first, [n] int in the order given; -1 for a miss."""
    claimed = np.full(len(boxes), -1)
    if not len(boxes) or not len(truths):
        return claimed
    shared = overlap(boxes, truths)
    best = shared.argmax(axis=1)
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    order = order[shared[order, best[order]] >= iou]
    taken, first = np.unique(best[order], return_index=True)
    claimed[order[first]] = taken
    return claimed


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [n, 4] and [m, 4]: [n, m]; 0 where both have no area."""
    a, b = _boxes(a), _boxes(b)
    lower, upper = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (upper - lower).clip(0).prod(axis=2)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).clip(0).prod(axis=1) for x in (a, b))
    union = area_a[:, None] + area_b[None, :] - shared
    iou: np.ndarray = shared / np.where(union > 0, union, 1.0)
    return iou


@dataclass(frozen=True, eq=False)
class _Tally:
    """All that AP needs: per image and step of the curve (one a distinct score with a hit, falling) hits and misses.

    hits, misses: [images, steps] float32 (counts, exact below 2^24); a miss stands at the next hit's step, where it
    lowers precision for the first time that matters; misses after the last hit matter never. truths: [images].
    """

    hits: np.ndarray
    misses: np.ndarray
    truths: np.ndarray


def _tally(detections: Sequence[Found], truths: Sequence[np.ndarray], iou: float, *, pooled: bool = False) -> _Tally:
    """One row an image; `pooled`: one row for all, enough (and small) where nothing is resampled."""
    _same_length(len(detections), len(truths), "images")
    checked = [_checked(found) for found in detections]
    claims = [match(b, s, t, iou) for (b, s), t in zip(checked, truths, strict=True)]
    hit = np.concatenate([np.empty(0, bool), *claims])
    score = np.concatenate([np.empty(0), *(s for _, s in checked)])
    row = np.zeros(len(checked), int) if pooled else np.arange(len(checked))
    image = np.repeat(row, [len(s) for _, s in checked])
    marks = np.unique(-score[hit])
    step = np.searchsorted(marks, -score)
    counts = np.bincount(row, [len(t) for t in truths])
    hits, misses = np.zeros((2, len(counts), len(marks) + 1), np.float32)
    np.add.at(hits, (image[hit], step[hit]), 1)
    np.add.at(misses, (image[~hit], step[~hit]), 1)
    return _Tally(hits[:, :-1], misses[:, :-1], counts)


def _area(weights: np.ndarray, tally: _Tally) -> np.ndarray:
    """AP of images taken `weights` [R, images] times each: [R], nan where no truth was taken."""
    w = weights.astype(np.float32)
    hits, misses = (w @ tally.hits).astype(np.float64), (w @ tally.misses).astype(np.float64)
    truths = (weights @ tally.truths)[:, None]
    right = hits.cumsum(axis=1)
    precision = right / np.maximum(right + misses.cumsum(axis=1), 1)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    area = (hits * best).sum(axis=1, keepdims=True)
    return np.where(truths > 0, area / np.maximum(truths, 1), np.nan)[:, 0]


def _point(tally: _Tally) -> float:
    if not tally.truths.sum():
        raise RequestError("no truth to find in these images", wanted="at least one")
    return float(_area(np.ones((1, len(tally.truths))), tally)[0])


def _resampled(tallies: Sequence[_Tally], resamples: int, seed: int) -> np.ndarray:
    """Mean over folds of AP, [resamples]; a fold whose resample holds no truth is left out of that mean."""
    rng = np.random.default_rng(seed)
    areas = []
    for tally in tallies:
        n = len(tally.truths)
        areas.append(_area(rng.multinomial(n, np.full(n, 1 / n), size=resamples), tally))
    table = np.stack(areas, axis=1)
    there = np.isfinite(table)
    total = np.where(there, table, 0.0).sum(axis=1)
    return np.where(there.any(axis=1), total / np.maximum(there.sum(axis=1), 1), np.nan)


def _percentiles(samples: np.ndarray, level: float) -> tuple[float, float]:
    there = samples[np.isfinite(samples)]
    if not len(there) or not 0 < level < 1:
        raise RequestError("no interval from these resamples", wanted="some resamples and a level in (0, 1)")
    low, high = np.quantile(there, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _pairs(detections: Sequence[Found], truths: Sequence[np.ndarray]) -> np.ndarray:
    """(dx, dy, sx, sy) that would take each sure detection onto the truth it matches: [pairs, 4]."""
    _same_length(len(detections), len(truths), "images")
    rows = [np.empty((0, 4))]
    for found, truth in zip(detections, truths, strict=True):
        boxes, scores = _checked(found)
        boxes, scores = boxes[scores > SURE], scores[scores > SURE]
        claimed = assign(boxes, scores, truth, SAME_FACE)
        a, b = boxes[claimed >= 0], _boxes(truth)[claimed[claimed >= 0]]
        size = a[:, 2:] - a[:, :2]
        shift = (b[:, :2] + b[:, 2:] - a[:, :2] - a[:, 2:]) / 2 / size
        rows.append(np.concatenate([shift, (b[:, 2:] - b[:, :2]) / size], axis=1))
    return np.concatenate(rows)


def _checked(found: Found) -> tuple[np.ndarray, np.ndarray]:
    boxes, scores = _boxes(found.boxes), np.asarray(found.scores, np.float64)
    if scores.shape != (len(boxes),):
        raise RequestError(f"scores of shape {list(scores.shape)} for {len(boxes)} boxes", wanted="one score a box")
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise RequestError("boxes or scores that are not finite", wanted="numbers")
    return boxes, scores


def _boxes(boxes: np.ndarray) -> np.ndarray:
    b = np.asarray(boxes, np.float64)
    if b.size and (b.ndim != 2 or b.shape[1] != 4):
        raise RequestError(f"boxes of shape {list(b.shape)}", wanted="[n, 4]: x1 y1 x2 y2")
    return b.reshape(-1, 4)


def _same_length(got: int, wanted: int, what: str) -> None:
    if got != wanted:
        raise RequestError(f"{got} and {wanted} {what}", wanted="as many of one as of the other")
