"""The records of an audit: pictures, their clean head outputs, and who is shown; kept on disk between runs.

A folder with one folder a person tells who is who; a CSV `attributes.csv` in it (columns: file, then one an attribute)
tells what a probe may try to infer. The cache holds clean head outputs and small pictures of the records themselves: it
belongs inside the trust zone.
"""

import csv
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm.auto import tqdm

from sfumato.attack.base import Prey, divided
from sfumato.core.digest import digest_of
from sfumato.core.errors import DatasetError
from sfumato.core.files import atomic
from sfumato.core.sites import fold
from sfumato.core.task import Image
from sfumato.datasets import images
from sfumato.trusted.protect import Protected

PICTURE = 128  # pixels a side of what an attacker is to recover
FEWEST = 100  # records an attacker needs to learn anything at all
ATTRIBUTES = "attributes.csv"
_BATCH = 8


@dataclass(frozen=True)
class Source:
    """Images of a folder, in the order of names, and what the folder says about them; `digest` covers the content."""

    folder: Path
    paths: list[Path]
    people: np.ndarray | None
    attributes: dict[str, np.ndarray]
    digest: str

    def read(self, index: int) -> Image:
        """The image; an error says its place, never its name: the user typed the folder, not the record."""
        called = f"image {index + 1} of {len(self.paths)} (by name) in {self.folder}"
        return images.read(self.paths[index], called=called)


def source(folder: Path, *, limit: int | None = None, seed: int = 0) -> Source:
    """At most `limit` images, whole persons at a time. Raises DatasetError for fewer than FEWEST."""
    paths = images.paths(folder)
    if limit is not None and len(paths) > limit:
        paths = _some(paths, limit, seed)
    if len(paths) < FEWEST:
        raise DatasetError(f"{folder}: {len(paths)} images", wanted=f"at least {FEWEST}, to train an attacker on")
    names = [path.parent.name for path in paths]
    shown_twice = len(set(names)) < len(names) and len(set(names)) >= 20 and folder not in {p.parent for p in paths}
    people = np.unique(names, return_inverse=True)[1] if shown_twice else None
    content = hashlib.sha256()
    for path in [*paths, *(place for place in (folder / ATTRIBUTES,) if place.exists())]:
        content.update(path.relative_to(folder).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest())
    return Source(folder, paths, people, _attributes(folder, paths), content.hexdigest())


def _some(paths: list[Path], limit: int, seed: int) -> list[Path]:
    """Whole folders drawn until `limit` is reached, those with several images first: they can be recognised again."""
    by_folder: dict[Path, list[Path]] = {}
    for path in paths:
        by_folder.setdefault(path.parent, []).append(path)
    if len(by_folder) == 1:
        return sorted(np.random.default_rng(seed).permutation(np.array(paths, object))[:limit].tolist())
    order = np.random.default_rng(seed).permutation(len(by_folder))
    groups = sorted((list(by_folder.values())[i] for i in order), key=lambda group: len(group) == 1)
    chosen: list[Path] = []
    for group in groups:
        chosen += group[: limit - len(chosen)]
    return sorted(chosen)


def _attributes(folder: Path, paths: list[Path]) -> dict[str, np.ndarray]:
    place = folder / ATTRIBUTES
    if not place.exists():
        return {}
    with place.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    known = {row.get("file", ""): row for row in rows}
    names = [p.relative_to(folder).as_posix() for p in paths]
    absent = [name for name in names if name not in known]
    if absent:
        raise DatasetError(f"{place}: no row for {len(absent)} of {len(names)} images", wanted="a row an image")
    return {key: np.array([known[n][key] for n in names]) for key in rows[0] if key != "file"}


def build(
    protected: Protected,
    found: Source,
    work: Path,
    *,
    size: int,
    seed: int = 0,
    transform: Callable[[Image], Image] | None = None,
    called: str = "clean",
    quiet: bool = False,
) -> Prey:
    """Head outputs of every image at `size`, of its transform where one is given; from `work` where they are there.

    Images to train on come twice, the second time mirrored: whoever has the head can make as many more as he likes.
    """
    place, count = work / f"prey-{called}.npz", len(found.paths)
    train, test = divided(found.people, count, seed)
    head = digest_of(protected.head.state_dict())
    key = json.dumps([found.digest, size, called, repr(protected.task), head, PICTURE, seed])
    z, pictures, ndim = _kept(place, key) or _computed(protected, found, train, size, transform, place, key, quiet)
    people = None if found.people is None else np.concatenate([found.people, found.people[train]])
    attributes = {name: np.concatenate([values, values[train]]) for name, values in found.attributes.items()}
    train = np.concatenate([train, np.arange(count, len(z))])
    return Prey(z, pictures, people, train, test, seed, attributes, ndim, mirrored=len(z) - count)


def _kept(place: Path, key: str) -> tuple[np.ndarray, np.ndarray, int] | None:
    try:
        with np.load(place, allow_pickle=False) as saved:
            return (saved["z"], saved["pictures"], int(saved["ndim"])) if str(saved["key"]) == key else None
    except (OSError, ValueError, KeyError):
        return None


def _computed(
    protected: Protected,
    found: Source,
    train: np.ndarray,
    size: int,
    transform: Callable[[Image], Image] | None,
    place: Path,
    key: str,
    quiet: bool,
) -> tuple[np.ndarray, np.ndarray, int]:
    zs, pictures, ndim = [], [], 4
    plain = [(i, False) for i in range(len(found.paths))]
    rows = [*plain, *((int(i), True) for i in train)]
    for start in tqdm(range(0, len(rows), _BATCH), f"head outputs, {place.stem}", disable=quiet):
        batch = [found.read(i)[:, :: -1 if turned else 1] for i, turned in rows[start : start + _BATCH]]
        batch = [np.ascontiguousarray(image) for image in batch]
        pictures += [cv2.resize(image, (PICTURE, PICTURE), interpolation=cv2.INTER_AREA) for image in batch]
        seen = [resized(image, size) if transform is None else transform(resized(image, size)) for image in batch]
        part, ndim = outputs(protected, seen)
        zs.append(part)
    z, shown = np.concatenate(zs), np.stack(pictures)
    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic(place) as temporary, temporary.open("wb") as file:
        np.savez(file, z=z, pictures=shown, key=np.array(key), ndim=np.array(ndim))
    return z, shown, ndim


def resized(image: Image, size: int) -> Image:
    """The picture as the head will see it, [size, size, 3]."""
    return np.asarray(cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR))


@torch.inference_mode()
def outputs(protected: Protected, pictures: list[Image]) -> tuple[np.ndarray, int]:
    """Clean head outputs as sites [n, C, h, w] float16, and the dimensions of the tensor that was cut."""
    z = protected.cut(pictures)
    return fold(z).half().cpu().numpy(), z.ndim
