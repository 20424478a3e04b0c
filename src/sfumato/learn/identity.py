"""Who is shown: a linear adversary that names the subjects of releases, for a fit to play against.

    W = (S_xx + r I)^-1 S_xt,        a = (x - mean x) W,        e = |a|^2 / |t|^2

x: the square around a subject of what a release shows of its sites, resampled to GRID x GRID of them, each channel over
its deviation; t: what a recogniser answers to the clear picture, less its mean; S: their covariances, from averages
that run along the fit, one for each range of alpha. For small r the mean of e is the share of t that a explains
(a and t - a are orthogonal there), and it is punished at a W held still. How far a is from t is not: the signs of an
answer can be turned by turning those of the signal, which the next W reads as well as the last; how loud it is cannot.

The subjects are what the clean model finds in the fit's own records: no labels. They are looked for and recognised once
and kept beside the head outputs.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from sfumato.core.errors import RequestError
from sfumato.core.files import atomic
from sfumato.core.obfuscator import Obfuscator
from sfumato.core.sites import unfold
from sfumato.core.task import Image, Task, WithSubjects
from sfumato.learn.cache import Cache

Recognise = Callable[[Sequence[Image]], np.ndarray]  # square pictures of one subject each -> embeddings [n, d]
SMALLEST = 3  # sites: of less, little is told that could name anyone
GRID = 6
RANGES = ((0.7, 0.88), (0.88, 0.95))  # alphas that share a W: between them other coefficients carry the bits
DRAWN = 16  # subjects a range and step
MEMORY = 300  # steps that the moments remember
EVERY = 5  # steps from one W to the next
RIDGE = 1.0  # of a channel's variance
_MOST = 8  # subjects of a view
_FLUSH_EVERY = 64


@dataclass(frozen=True, eq=False)
class Subjects:
    """Whom the cache shows: rows [n] of it, places [n, 4], targets [n, d] of mean 0; a digest of all of it.

    A place is the middle (x, y) of a square around the subject, its width and height; the view is 1 x 1.
    """

    rows: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    digest: str


def find(
    tail: nn.Module,
    task: Task,
    recognise: Recognise,
    records: Sequence[Image],
    cache: Cache,
    folder: Path,
    *,
    device: torch.device,
    quiet: bool = False,
) -> Subjects:
    """Subjects of every view in the cache, from `folder` where they are there. Raises RequestError for too few."""
    if not isinstance(task, WithSubjects) or cache.ndim != 4:
        raise RequestError(f"{task.name} does not say where subjects are", wanted="a task with the method `subjects`")
    key = _key(recognise, cache)
    place, total = folder / "subjects.npz", len(cache) // cache.views
    done, parts = _progress(place, key)
    for i in tqdm(range(done, total), "subjects", total=total, initial=done, disable=quiet, unit="record"):
        parts += _of_record(tail, task, recognise, records[i], i, cache, device)
        if (i + 1) % _FLUSH_EVERY == 0 or i + 1 == total:
            with atomic(place) as temporary, temporary.open("wb") as file:
                np.savez(file, key=np.array(key), done=np.array(i + 1), found=np.array(parts, np.float32))
    found = np.array(parts, np.float32)
    if len(found) < 2:
        raise RequestError(f"{len(found)} subjects in the records", wanted="at least 2", do="leave the recogniser out")
    targets = found[:, 5:] - found[:, 5:].mean(0)
    return Subjects(found[:, 0].astype(int), found[:, 1:5], targets, hashlib.sha256(found.tobytes()).hexdigest())


def _of_record(
    tail: nn.Module,
    task: WithSubjects,
    recognise: Recognise,
    record: Image,
    index: int,
    cache: Cache,
    device: torch.device,
) -> list[np.ndarray]:
    """One vector a subject: row of the cache, place, embedding."""
    views, first = task.views(record, index), index * cache.views
    z, _ = cache.batch(range(first, first + cache.views), device)
    with torch.inference_mode():
        outputs = task.outputs(tail(unfold(z, cache.ndim)))
    found: list[np.ndarray] = []
    for row, view in enumerate(views):
        scale = np.array(view.shape[1::-1], np.float64)
        for x1, y1, x2, y2 in task.subjects(tuple(o[row] for o in outputs), view.shape[:2])[:_MOST]:
            middle, side = np.array([(x1 + x2) / 2, (y1 + y2) / 2]), max(x2 - x1, y2 - y1)
            share = side / scale
            whole = (middle > 0.4 * side).all() and (middle + 0.4 * side < scale).all()  # not cut off by the edge
            if whole and (share * z.shape[:1:-1]).min() >= SMALLEST:
                crop = cv2.getRectSubPix(view, (max(1, round(side)),) * 2, (middle - 0.5).tolist())
                found.append(np.concatenate([[first + row], middle / scale, share, recognise([crop])[0]]))
    return found


def _key(recognise: Recognise, cache: Cache) -> str:
    """A recogniser is known by what it answers to one picture."""
    ramp = np.arange(64 * 64 * 3).reshape(64, 64, 3) // 48 % 256
    answer = np.round(recognise([ramp.astype(np.uint8)])[0], 3) + 0.0
    return repr((cache.digest, cache.z.shape, SMALLEST, _MOST, hashlib.sha256(answer.tobytes()).hexdigest()))


def _progress(place: Path, key: str) -> tuple[int, list[np.ndarray]]:
    try:
        with np.load(place, allow_pickle=False) as saved:
            return (int(saved["done"]), list(saved["found"])) if str(saved["key"]) == key else (0, [])
    except (OSError, ValueError, KeyError):
        return 0, []


def windows(shown: Tensor, places: Tensor) -> Tensor:
    """Sites [n, k, h, w] and places [n, 4] -> the window around each place, [n, k, GRID, GRID]; outside is 0."""
    across = (torch.arange(GRID, device=shown.device) - (GRID - 1) / 2) / GRID
    x, y = (places[:, i, None] + places[:, 2 + i, None] * across for i in (0, 1))
    points = torch.stack([x[:, None, :].expand(-1, GRID, -1), y[:, :, None].expand(-1, -1, GRID)], -1)
    return F.grid_sample(shown, 2 * points - 1, align_corners=False)


def features(seen: Tensor) -> Tensor:
    """Windows -> numbers [n, k GRID^2]: what a channel loses in scale alone it does not lose."""
    centred = seen - seen.mean((0, 2, 3), keepdim=True)
    power = centred.square().mean((0, 2, 3), keepdim=True)
    return (centred / power.clamp_min(1e-8).sqrt()).flatten(1)


class Linear(nn.Module):
    """The ridge regression of targets [n, d] on features [n, f]; `moments` is the running sum of r'r, r = (1, x, t)."""

    moments: Tensor
    middle: Tensor
    weights: Tensor

    def __init__(self, features: int, targets: int) -> None:
        super().__init__()
        self.register_buffer("moments", torch.zeros(1 + features + targets, 1 + features + targets))
        self.register_buffer("middle", torch.zeros(features))
        self.register_buffer("weights", torch.zeros(features, targets))

    def see(self, x: Tensor, t: Tensor, keep: float) -> None:
        """Add to the moments, of which a share is kept."""
        rows = torch.cat([x.new_ones(len(x), 1), x.detach(), t], 1)
        self.moments.mul_(keep).addmm_(rows.T, rows)

    def solve(self, ridge: float) -> None:
        """Bring W up to date with the moments."""
        d = len(self.middle)
        mean = self.moments[0] / self.moments[0, 0]
        cov = self.moments[1:, 1:] / self.moments[0, 0] - mean[1:, None] * mean[1:]
        root = torch.linalg.cholesky(cov[:d, :d] + ridge * torch.eye(d, device=cov.device))
        self.weights.copy_(torch.cholesky_solve(cov[:d, d:], root))
        self.middle.copy_(mean[1 : d + 1])

    def forward(self, x: Tensor) -> Tensor:
        """Its answers, [n, d]; 0 before the first `solve`."""
        answers: Tensor = (x - self.middle) @ self.weights
        return answers


class Adversary(nn.Module):
    """One `Linear` a range of alpha; its state is part of a fit's checkpoint."""

    def __init__(self, subjects: Subjects, cache: Cache, rows: np.ndarray, k: int) -> None:
        super().__init__()
        self.cache, self.subjects = cache, subjects
        self.known = np.flatnonzero(np.isin(subjects.rows, rows))
        if not len(self.known):
            raise RequestError("no subject in the records to train on", wanted="one", do="leave the recogniser out")
        self.ridges = nn.ModuleList(Linear(k * GRID**2, subjects.targets.shape[1]) for _ in RANGES)

    def forward(self, obfuscator: Obfuscator, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """e of fresh subjects and the alphas they were released at, [n] each; then they are learned."""
        shares, alphas = [], []
        for ridge, (low, high) in zip(self.ridges, RANGES, strict=True):
            assert isinstance(ridge, Linear)
            if step and step % EVERY == 0:
                ridge.solve(RIDGE)
            x, t, alpha = self.seen(obfuscator, low + (high - low) * torch.rand(DRAWN, generator=generator), generator)
            shares.append(ridge(x).square().sum(1) / t.square().sum(1).mean())
            alphas.append(alpha)
            ridge.see(x, t, 1 - 1 / MEMORY)
        return torch.cat(shares), torch.cat(alphas)

    def seen(self, obfuscator: Obfuscator, alpha: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Features and targets of subjects drawn at random, released at `alpha`."""
        device = obfuscator.mean.device
        drawn = self.known[torch.randint(len(self.known), (len(alpha),), generator=generator).numpy()]
        z, _ = self.cache.batch(self.subjects.rows[drawn], device)
        size = (z.shape[2], z.shape[3])
        noise = torch.randn(len(z), *obfuscator.shape.codes(size), generator=generator).to(device)
        alpha = alpha.to(device)
        shown = obfuscator.estimate(obfuscator(z, alpha, noise), alpha, size)
        places, targets = (torch.from_numpy(v[drawn]).to(device) for v in (self.subjects.places, self.subjects.targets))
        return features(windows(shown, places)), targets, alpha
