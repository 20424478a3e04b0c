"""One run of TR-4928's table: average precision on FDDB-format data, clean and obfuscated, alpha by alpha.

Every arm sees the same photographs, the same head output and one threshold rule. Intervals are bootstrap intervals over
photographs; a drop is resampled in pairs. Noise is fresh, or drawn from a seed where figures must repeat (`Seeded`).
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sfumato.core.digest import digest_of
from sfumato.core.display import table
from sfumato.core.errors import DatasetError, OutputError, RequestError
from sfumato.core.files import atomic
from sfumato.datasets import images
from sfumato.datasets.fddb import Entry, Fddb
from sfumato.tasks.detection.boxes import Detections
from sfumato.tasks.detection.precision import Precision, cross_fit, fold_precision
from sfumato.trusted.protect import Noise, Protected

BATCH = 2  # photographs
ALPHAS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
# TR-4928, table of section "Comparison of inference accuracy"; None is the run without obfuscation.
TR_4928: dict[float | None, float] = {
    None: 0.9337148153739079,
    0.05: 0.9028766627325002,
    0.1: 0.9024301009661478,
    0.2: 0.9081836283186224,
    0.4: 0.9073066107482036,
    0.6: 0.8847816568680239,
    0.8: 0.8841195749171925,
    0.9: 0.8455427675252052,
    0.95: 0.8455427675252052,
}


class Seeded:
    """Normals from a seed, for measurements only: nothing that leaves a trust zone may be drawn from it."""

    def __init__(self, *seed: int) -> None:
        self.seed = list(seed)

    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        draw = np.random.default_rng(self.seed)
        return torch.from_numpy(draw.standard_normal((records, *shape), dtype=np.float32))


@dataclass(frozen=True)
class _Each:
    """A noise source of its own for every record of a batch."""

    sources: Sequence[Noise]

    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        assert records == len(self.sources)
        return torch.cat([source.normals(1, shape) for source in self.sources])


@dataclass(frozen=True)
class Arm:
    """One row: alpha (None is clean) under one seed, its APs under both box rules, and what it lets out."""

    alpha: float | None
    seed: int | None
    detected: Precision
    convention: Precision
    bits_per_site: float
    release_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha,
            "seed": self.seed,
            **_figures("ap", self.detected),
            **_figures("ap_convention", self.convention),
            "folds": list(self.detected.folds),
            "bits_per_site": self.bits_per_site,
            "release_bytes": self.release_bytes,
            "tr_4928_ap": TR_4928.get(self.alpha),
        }


@dataclass(frozen=True)
class Measurement:
    """All rows of a run, in the order asked for, with what is needed to repeat it."""

    arms: list[Arm]
    images: int
    faces: int
    folds: tuple[int, ...]
    seconds: float

    @property
    def clean(self) -> Arm | None:
        return next((arm for arm in self.arms if arm.alpha is None), None)

    def drop(self, arm: Arm) -> tuple[float, float, float] | None:
        """AP lost against the clean arm, as detected: (mean, low, high); None without a clean arm."""
        return arm.detected.drop(self.clean.detected) if self.clean and arm is not self.clean else None

    def _repr_html_(self) -> str:
        rows, spread = [], self.images > len(self.folds)  # one image a fold is always drawn again
        for arm in self.arms:
            drop, ap = self.drop(arm), arm.detected
            name, bits = ("clean", "no bound") if arm.alpha is None else (f"{arm.alpha:g}", f"{arm.bits_per_site:.1f}")
            within, lost = f" [{ap.low:.4f}, {ap.high:.4f}]" * spread, ""
            if drop:
                lost = f"{drop[0]:+.4f}" + f" [{drop[1]:+.4f}, {drop[2]:+.4f}]" * spread
            rows.append((name, bits, f"{ap.mean:.4f}{within}", lost, f"{arm.release_bytes:,}"))
        said = "95 % intervals over images" if spread else "one image a fold gives no interval"
        title = f"{self.images} images, {self.faces} faces; {said}"
        return table(("alpha", "bits a site, at most", "AP", "drop from clean", "bytes"), rows, title=title)

    def as_dict(self) -> dict[str, Any]:
        rows = [arm.as_dict() | {"drop": self.drop(arm)} for arm in self.arms]
        return {"images": self.images, "faces": self.faces, "folds": self.folds, "seconds": self.seconds, "rows": rows}


def _figures(name: str, p: Precision) -> dict[str, float]:
    return {name: p.mean, f"{name}_low": p.low, f"{name}_high": p.high}


def measure(
    protected: Protected,
    dataset: Fddb,
    *,
    alphas: Sequence[float | None] = (None, *ALPHAS),
    seeds: Sequence[int | None] = (0,),
    folds: Sequence[int] | None = None,
    limit: int | None = None,
    work: Path | None = None,
    keep: bool = False,
    workers: int | None = None,
    quiet: bool = False,
) -> Measurement:
    """AP of every alpha (None: clean) on the folds (1 to 10, None: all). Raises RequestError, DatasetError, ImageError.

    `limit` takes the first photographs of each fold; seed None is fresh cryptographic noise. With `work` a fold that is
    done is not done again after a kill; what this run left there is removed at the end. With `keep` it stays, and what
    another run has done there is only scored: runs of single arms add up to the table. Kept noise needs seeds.
    """
    arms: Arms = [(alpha, seed) for alpha in alphas for seed in (seeds if alpha is not None else (None,))]
    if protected.outside is None or (None in alphas and protected.reference is None):
        raise RequestError("only the trusted side is here", wanted="client and server artefacts, to measure both sides")
    chosen = _chosen(dataset, folds, limit)
    if keep and any(alpha is not None and seed is None for alpha, seed in arms):
        raise RequestError("fresh noise to be kept", wanted="a seed: what is kept must repeat", do="--seeds 0")
    store = _Store(work, [*_what(protected), *(_photographs(chosen) if keep else [repr(arms), *_paths(chosen)])])
    started = perf_counter()
    missing = {number: [arm for arm in arms if not store.has(number, arm)] for number, _ in chosen}
    todo = sum(len(fold) for number, fold in chosen if missing[number])
    with tqdm(total=todo, disable=quiet) as bar, _one_thread_each(workers) as pool:
        for number, fold in chosen:
            if missing[number]:
                found = _detect(protected, missing[number], number, fold, pool, bar)
                for arm, of_arm in zip(missing[number], found, strict=True):
                    store.put(number, arm, of_arm)
    seconds = perf_counter() - started
    reading = tqdm(chosen, "Reading Predictions ", disable=quiet)
    results = [[store.get(number, arm) for arm in arms] for number, _ in reading]
    truths = [[entry.boxes for entry in fold] for _, fold in chosen]
    rows = _score(protected, arms, results, truths, chosen[0][1][0], quiet=quiet)
    if not keep:
        store.clear()
    first = rows[0].detected
    return Measurement(rows, first.images, first.faces, tuple(number for number, _ in chosen), seconds)


Which = tuple[float | None, int | None]  # alpha and seed of an arm
Arms = Sequence[Which]
Folds = list[tuple[int, tuple[Entry, ...]]]


def _what(protected: Protected) -> list[str]:
    """Tells models, tails and tasks apart: one client may have several servers."""
    sides = (protected.head, protected.reference, protected.outside)
    digests = (digest_of(side.state_dict()) for side in sides if isinstance(side, nn.Module))
    return [protected.digest, repr(protected.task), *digests]


def _paths(chosen: Folds) -> list[str]:
    return [str(entry.path.resolve()) for _, fold in chosen for entry in fold]


def _photographs(chosen: Folds) -> Iterator[str]:
    """What is kept must not outlive a photograph that is replaced."""
    for path in _paths(chosen):
        stat = os.stat(path)
        yield f"{path} {stat.st_size} {stat.st_mtime_ns}"


def _chosen(dataset: Fddb, folds: Sequence[int] | None, limit: int | None) -> Folds:
    numbers = sorted(set(folds)) if folds else list(range(1, len(dataset.folds) + 1))
    wrong = [n for n in numbers if not 1 <= n <= len(dataset.folds)]
    if wrong or (limit is not None and limit < 1):
        got = f"fold {wrong[0]}" if wrong else f"limit {limit}"
        raise RequestError(got, wanted=f"folds 1 to {len(dataset.folds)}, a limit of 1 or more", do="--folds 1,2,3")
    chosen = [(n, dataset.folds[n - 1][:limit]) for n in numbers]
    empty = [n for n, fold in chosen if not any(len(entry.boxes) for entry in fold)]
    if empty:
        raise DatasetError(f"no face in fold {empty[0]}", wanted="faces to find", do="a larger --limit")
    return chosen


@contextmanager
def _one_thread_each(workers: int | None) -> Iterator[ThreadPoolExecutor]:
    """One batch a worker and one thread a batch: on few cores faster than many threads on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    count = workers or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else workers or os.cpu_count()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _detect(
    protected: Protected, arms: Arms, number: int, fold: Sequence[Entry], pool: ThreadPoolExecutor, bar: Any
) -> list[list[Detections]]:
    """Detections of one fold, [arm][image]."""

    # Photographs of one input size go together: fewer and larger steps, so that workers wait less for each other.
    count = BATCH if getattr(protected.task, "size", None) else 1

    def some(first: int) -> list[list[Detections]]:
        batch = [images.read(entry.path) for entry in fold[first : first + count]]
        z = protected.cut(batch)
        sizes = [(image.shape[0], image.shape[1]) for image in batch]
        found = [_arm(protected, z, sizes, alpha, seed, (number, first)) for alpha, seed in arms]
        bar.update(len(batch))
        return found

    batches = list(pool.map(some, range(0, len(fold), count)))
    return [[one for batch in batches for one in batch[arm]] for arm in range(len(arms))]


@torch.inference_mode()
def _arm(
    protected: Protected, z: Tensor, sizes: Sequence[tuple[int, int]], alpha: float | None, seed: int | None,
    at: tuple[int, int],
) -> list[Detections]:  # fmt: skip
    """Detections of photographs `at` (fold, first index) and on, of these (height, width)."""
    if protected.reference is None or protected.outside is None:
        raise RequestError("only the trusted side is here", wanted="client and server artefacts")
    if alpha is None:
        raw = protected.reference(z)
    else:
        source = protected
        if seed is not None:  # another alpha is another release: it has noise of its own
            of = [Seeded(seed, at[0], at[1] + i, round(alpha * 10_000)) for i in range(len(sizes))]
            source = protected.with_noise(_Each(of))
        raw = protected.outside(source.obfuscate(z, alpha))
    each = zip(*protected.task.outputs(raw), strict=True)
    return [protected.task.postprocess(one, size) for one, size in zip(each, sizes, strict=True)]


def _score(
    protected: Protected, arms: Arms, results: list[list[list[Detections]]], truths: list[list[np.ndarray]],
    sample: Entry, *, quiet: bool,
) -> list[Arm]:  # fmt: skip
    """results [fold][arm][image]; the convention is cross-fitted on the first arm, the clean one where it is there."""
    by_arm = [[fold[i] for fold in results] for i in range(len(arms))]
    first = next((i for i, (alpha, _) in enumerate(arms) if alpha is None), 0)
    rules = cross_fit(by_arm[first], truths) if len(truths) > 1 else None
    z = protected.cut([images.read(sample.path)])
    repeatable = protected.with_noise(Seeded(0))  # sizes are of the noise too: codes may all round to 0
    rows = []
    for (alpha, seed), found in zip(tqdm(arms, "predicting ... ", disable=quiet), by_arm, strict=True):
        plain = fold_precision(found, truths)
        moved = fold_precision(found, truths, conventions=rules) if rules else plain
        release = repeatable.obfuscate(z, alpha) if alpha is not None else None
        bits = float(release.bits[0]) / math.prod(release.sites) if release else float("inf")
        rows.append(Arm(alpha, seed, plain, moved, bits, release.nbytes if release else z.numel() * 4))
    return rows


class _Store:
    """Detections of finished folds, arm by arm, in a folder of this very run's, or in memory."""

    def __init__(self, work: Path | None, key: list[str]) -> None:
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        self.folder = None if work is None else work / name
        self.memory: dict[tuple[int, Which], list[Detections]] = {}

    def has(self, number: int, arm: Which) -> bool:
        return (number, arm) in self.memory or (self.folder is not None and self._path(number, arm).exists())

    def put(self, number: int, arm: Which, found: list[Detections]) -> None:
        self.memory[number, arm] = found
        if self.folder is None:
            return
        boxes, scores = np.concatenate([d.boxes for d in found]), np.concatenate([d.scores for d in found])
        with atomic(self._path(number, arm)) as temporary:
            counts = np.array([len(d) for d in found])
            np.savez(temporary, allow_pickle=False, counts=counts, boxes=boxes, scores=scores)

    def get(self, number: int, arm: Which) -> list[Detections]:
        if (number, arm) in self.memory:
            return self.memory[number, arm]
        with np.load(self._path(number, arm), allow_pickle=False) as saved:
            return _split(saved["counts"], saved["boxes"], saved["scores"])

    def clear(self) -> None:
        if self.folder is not None:
            rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int, arm: Which) -> Path:
        if self.folder is None:
            raise OutputError("no work folder")
        alpha, seed = arm
        name = "clean" if alpha is None else f"alpha-{alpha!r}-seed-{seed}"
        return self.folder / name / f"fold-{number:02d}.npz"


def _split(counts: np.ndarray, boxes: np.ndarray, scores: np.ndarray) -> list[Detections]:
    ends = np.cumsum(counts)[:-1]
    return [Detections(b, s) for b, s in zip(np.split(boxes, ends), np.split(scores, ends), strict=True)]
