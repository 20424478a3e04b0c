"""Head outputs of the fit's records, computed once: [records * views, C, h, w] in half precision on disk.

The head is frozen, so every step of a fit would compute the same z. The cache is bounded (`max_bytes`), grows record by
record and resumes after a kill: `cache.json` is replaced atomically after the data it counts is on disk.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sfumato.core.errors import OutputError, RequestError
from sfumato.core.files import atomic
from sfumato.core.sites import fold, stack
from sfumato.core.task import Image, Task

PATCH = 4  # the linear adversary reads a site's patch of the input as PATCH x PATCH colours
_FLUSH_EVERY = 32


@dataclass(frozen=True, eq=False)
class Cache:
    """z [n, C, h, w] float16; patches [n, PATCH^2 * 3, h, w] float16, or None where the input is no image."""

    z: np.ndarray
    patches: np.ndarray | None
    ndim: int
    digest: str
    views: int

    def __len__(self) -> int:
        return len(self.z)

    def batch(self, index: Sequence[int] | np.ndarray, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Rows `index` as float32 on the device; channels-last memory, a quarter faster to train on a CPU."""
        rows = np.asarray(index)
        z = torch.from_numpy(self.z[rows].astype(np.float32)).to(device, memory_format=torch.channels_last)
        if self.patches is None:
            return z, None
        return z, torch.from_numpy(self.patches[rows].astype(np.float32)).to(device)


def build(
    head: nn.Module,
    task: Task,
    records: Sequence[Image],
    folder: Path,
    *,
    key: str,
    device: torch.device,
    max_bytes: int = 6 * 2**30,
    quiet: bool = False,
) -> Cache:
    """Fill or reopen the cache in `folder`; another `key` (model and cut), task or record count starts anew."""
    if not len(records):
        raise RequestError("no records to fit on", wanted="a folder with photographs", do="sfumato fit --data FOLDER")
    probe = _rows(head, task, records[0], 0, device)
    views = len(probe[0])
    row_bytes = sum(t[0].numel() * 2 for t in probe[:2] if t is not None)
    total = min(len(records), max(1, max_bytes // (row_bytes * views)))
    meta = {"key": key, "task": repr(task), "records": total, "views": views, "z": list(probe[0].shape[1:])}
    folder.mkdir(parents=True, exist_ok=True)
    done, digests = _progress(folder, meta)
    z = _open(folder / "z.f16", probe[0], total * views, done)
    seen = None if probe[1] is None else _open(folder / "patches.f16", probe[1], total * views, done)
    arrays = [z, seen]
    bar = tqdm(range(done, total), "head outputs", total=total, initial=done, disable=quiet, unit="record")
    for i in bar:
        record = records[i]
        _store(arrays, _rows(head, task, record, i, device), i * views)
        digests.append(hashlib.sha256(np.ascontiguousarray(record).tobytes()).hexdigest())
        if (i + 1) % _FLUSH_EVERY == 0 or i + 1 == total:
            _commit(folder, meta, i + 1, digests, arrays)
    digest = hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()
    return Cache(z, seen, probe[2], digest, views)


def _rows(
    head: nn.Module, task: Task, record: Image, index: int, device: torch.device
) -> tuple[Tensor, Tensor | None, int]:
    """z of every view of one record, its patches, and the dimensions of the cut tensor."""
    inputs = [task.preprocess(view) for view in task.views(record, index)]
    if len({tuple(x.shape) for x in inputs}) != 1:
        raise _uneven(inputs[-1], inputs[0])
    x = stack(inputs).to(device)
    with torch.inference_mode():
        cut = head(x)
        z = fold(cut)
        return z, patches(x, z), cut.ndim


def patches(x: Tensor, z: Tensor) -> Tensor | None:
    """Input [N, 3, H, W] -> what each site of z [N, C, h, w] covers, as [N, 3 * PATCH^2, h, w]; None for non-images."""
    if x.ndim != 4 or z.shape[2] * PATCH > x.shape[2] or z.shape[3] * PATCH > x.shape[3]:
        return None
    small = torch.nn.functional.adaptive_avg_pool2d(x, (z.shape[2] * PATCH, z.shape[3] * PATCH))
    return torch.nn.functional.pixel_unshuffle(small, PATCH)


def _open(path: Path, like: Tensor, rows: int, done: int) -> np.ndarray:
    shape = (rows, *like.shape[1:])
    if not (done and path.exists()):
        _reserve(path, 2 * math.prod(shape))
    return np.memmap(path, np.float16, "r+", shape=shape)


def _reserve(path: Path, size: int) -> None:
    """All blocks of the file now: a disk that fills up under a mapped file kills the process (SIGBUS)."""
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        got = f"{path} cannot be written: {error.strerror}"
        raise OutputError(got, wanted=f"{size >> 20} MiB there", do="another --out, or fewer records") from error


def _store(arrays: list[np.ndarray | None], rows: tuple[Tensor, Tensor | None, int], start: int) -> None:
    for array, value in zip(arrays, rows[:2], strict=True):
        if array is not None and value is not None:
            if value.shape[1:] != array.shape[1:]:
                raise _uneven(value[0], array[0])
            array[start : start + len(value)] = value.half().cpu().numpy()


def _uneven(got: Tensor, wanted: Tensor | np.ndarray) -> RequestError:
    return RequestError(
        f"a record of shape {list(got.shape)}",
        wanted=f"{list(wanted.shape)}, as the first one's",
        do="give the task a fixed input size while fitting",
    )


def _progress(folder: Path, meta: dict[str, object]) -> tuple[int, list[str]]:
    try:
        saved = json.loads((folder / "cache.json").read_text())
    except (OSError, ValueError):
        return 0, []
    if {k: saved.get(k) for k in meta} != meta or not (folder / "z.f16").exists():
        return 0, []
    return int(saved["done"]), list(saved["digests"])


def _commit(
    folder: Path, meta: dict[str, object], done: int, digests: list[str], arrays: list[np.ndarray | None]
) -> None:
    for array in arrays:
        if isinstance(array, np.memmap):
            array.flush()
    with atomic(folder / "cache.json") as temporary:
        temporary.write_text(json.dumps({**meta, "done": done, "digests": digests}))
