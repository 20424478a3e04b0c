"""FDDB, the Face Detection Data Set and Benchmark: 2,845 photographs, 5,171 faces as ellipses, ten folds.

Each face is a line `major minor angle cx cy 1`: half axes and centre in pixels, the angle from the x axis to the
major axis in radians, y downwards. The tight axis-aligned box of such an ellipse has the half sides

    hx = sqrt(major^2 cos^2 angle + minor^2 sin^2 angle),  hy = sqrt(major^2 sin^2 angle + minor^2 cos^2 angle)

and may reach beyond the picture, as the ellipse does.
Source: V. Jain and E. Learned-Miller, FDDB, UM-CS-2010-009, University of Massachusetts, Amherst, 2010.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath

import numpy as np

from sfumato.core.errors import DatasetError

FOLDS = 10
IMAGES, FACES = 2845, 5171  # the whole set
PICTURES, LISTS = "originalPics", "FDDB-folds"
GET_IT = "http://vis-www.cs.umass.edu/fddb: unpack originalPics.tar.gz into originalPics, FDDB-folds.tgz beside it"


@dataclass(frozen=True, eq=False)
class Entry:
    """One photograph: its name in the fold's list, its file, its faces as boxes [n, 4] float64, x1 y1 x2 y2."""

    name: str
    path: Path
    boxes: np.ndarray


@dataclass(frozen=True, eq=False)
class Fddb:
    """The ten folds of a set in FDDB's layout."""

    root: Path
    folds: list[tuple[Entry, ...]]

    def __iter__(self) -> Iterator[Entry]:
        return chain.from_iterable(self.folds)

    @property
    def images(self) -> int:
        """How many photographs."""
        return sum(len(fold) for fold in self.folds)

    @property
    def faces(self) -> int:
        """How many faces."""
        return sum(len(entry.boxes) for entry in self)


def load(folder: str | os.PathLike[str]) -> Fddb:
    """The set in a folder that holds originalPics and FDDB-folds, or that holds a folder `fddb` which does.

    Reads the lists and looks that every photograph is there; opens none. Raises DatasetError for a set that is
    absent, incomplete or does not parse.
    """
    root = _root(folder)
    lists = [root / LISTS / f"FDDB-fold-{number:02d}-ellipseList.txt" for number in range(1, FOLDS + 1)]
    _all_there(lists, "fold lists", root / LISTS)
    folds = [tuple(_entries(path, root / PICTURES)) for path in lists]
    _all_there([entry.path for fold in folds for entry in fold], "images", root / PICTURES)
    return Fddb(root, folds)


def boxes(ellipses: np.ndarray) -> np.ndarray:
    """Ellipses [n, 5] (major, minor, angle, cx, cy) -> their tight boxes [n, 4] x1 y1 x2 y2."""
    major, minor, angle, cx, cy = ellipses.reshape(-1, 5).T
    hx = np.hypot(major * np.cos(angle), minor * np.sin(angle))
    hy = np.hypot(major * np.sin(angle), minor * np.cos(angle))
    return np.stack([cx - hx, cy - hy, cx + hx, cy + hy], axis=1)


def _root(folder: str | os.PathLike[str]) -> Path:
    given = Path(folder)
    if not given.is_dir():
        raise DatasetError(f"{os.fspath(folder)}: no such folder", wanted="the folder of FDDB", do=GET_IT)
    below = sorted(child for child in given.iterdir() if child.name.lower() == "fddb")
    for root in (given, *below):
        if (root / PICTURES).is_dir() and (root / LISTS).is_dir():
            return root
    there = [name for name in (PICTURES, LISTS) if (given / name).is_dir()]
    got = f"{os.fspath(folder)}: " + (f"only {there[0]} of {PICTURES} and {LISTS}" if there else "no FDDB in it")
    raise DatasetError(got, wanted=f"a folder that holds {PICTURES} and {LISTS}", do=GET_IT)


def _all_there(files: list[Path], what: str, under: Path) -> None:
    missing = [path for path in files if not path.is_file()]
    if missing:
        first = missing[0].relative_to(under).as_posix()
        got = f"{len(missing)} of {len(files)} {what} are missing in {under}, the first {first}"
        raise DatasetError(got, wanted="the whole set, or figures would not compare", do=GET_IT)


def _entries(path: Path, pictures: Path) -> Iterator[Entry]:
    """A list is name, count, then `count` ellipses, over and over. Errors say the line, not what is in it."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        raise DatasetError(f"{path}: cannot be read as text", do=GET_IT) from None
    at = 0
    while at < len(lines):
        name = lines[at].strip()
        if not name:
            at += 1
            continue
        try:
            count = int(lines[at + 1])
            ellipses = _ellipses(lines[at + 2 : at + 2 + count], count)
            picture = _picture(name)
        except (IndexError, ValueError):
            got = f"{path}: the entry at line {at + 1} does not parse"
            wanted = "a name, a count, then that many lines `major minor angle cx cy 1`"
            raise DatasetError(got, wanted=wanted, do=GET_IT) from None
        yield Entry(name, pictures / picture, boxes(ellipses))
        at += 2 + count


def _ellipses(lines: list[str], count: int) -> np.ndarray:
    rows = np.array([[float(word) for word in line.split()[:5]] for line in lines]).reshape(count, 5)
    if not np.isfinite(rows).all() or count < 0 or (rows[:, :2] <= 0).any():
        raise ValueError
    return rows


def _picture(name: str) -> PurePosixPath:
    """The file of a name; one that leads out of the folder is no name."""
    path = PurePosixPath(name + ".jpg")
    if path.is_absolute() or ".." in path.parts:
        raise ValueError
    return path
