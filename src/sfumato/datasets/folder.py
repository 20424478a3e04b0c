"""A folder of photographs as records: what a fit without labels and a detection over many files read."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import overload

import cv2
import numpy as np
from tqdm.auto import tqdm

from sfumato.core.errors import DatasetError, ImageError
from sfumato.datasets import images

LONGEST = 4096  # pixels of a side: four times the detector's input, and a view of it fits into memory four times over


class Folder:
    """Iterates (name, image) in the order of names, as often as asked; images are read when their turn comes.

    name: path inside the folder with `/`; image: [H, W, 3] uint8 BGR. Errors say the image's place in the order,
    never its name: the user typed the folder, not the record.
    Raises DatasetError for no folder or no image in it, ImageError at the image that cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.paths = images.paths(path)
        if not self.paths:
            raise DatasetError(f"{os.fspath(path)}: no image in it", wanted="a folder of images (JPEG, PNG ...)")

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        for number, path in enumerate(self.paths, start=1):
            called = f"image {number} of {len(self)} (by name) in {self.path}"
            yield path.relative_to(self.path).as_posix(), images.read(path, called=called)


class Photographs(Sequence[np.ndarray]):
    """The images of a folder that can be read, by place in the order of names: the records of a fit.

    Every file is decoded once here, so that hours of work do not end at a damaged one; `skipped` holds the errors of
    those left out. An image is read again when asked for, [H, W, 3] uint8 BGR, no side beyond LONGEST.
    Raises DatasetError for no folder, no image in it, or none that can be read.
    """

    def __init__(self, path: str | os.PathLike[str], *, quiet: bool = False) -> None:
        folder = Folder(path)
        self.path, self.skipped, self._readable = folder.path, list[ImageError](), list[tuple[Path, str]]()
        named = [
            (found, f"image {number} of {len(folder)} (by name) in {folder.path}")
            for number, found in enumerate(folder.paths, start=1)
        ]
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            tried = tqdm(pool.map(_error, named), "photographs", total=len(named), disable=quiet, unit="image")
            for one, error in zip(named, tried, strict=True):
                if error is None:
                    self._readable.append(one)
                else:
                    self.skipped.append(error)
        finally:
            pool.shutdown(cancel_futures=True)
        if not self._readable:
            got = f"{os.fspath(path)}: none of {len(folder)} images can be read, the first: {self.skipped[0].got}"
            raise DatasetError(got, wanted="a folder of images (JPEG, PNG ...)")

    def __len__(self) -> int:
        return len(self._readable)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        path, called = self._readable[index]
        image = images.read(path, called=called)
        scale = LONGEST / max(image.shape[:2])
        if scale >= 1:
            return image
        size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
        return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _error(named: tuple[Path, str]) -> ImageError | None:
    try:
        images.read(named[0], called=named[1])
    except ImageError as error:
        return error
    return None
