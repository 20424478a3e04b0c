from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sfumato.core.errors import RequestError
from sfumato.learn.cache import PATCH, Cache, build, patches
from sfumato.tasks.detection.task import FaceDetection

CPU = torch.device("cpu")
TASK = FaceDetection(size=(64, 96))


class Records(Sequence[np.ndarray]):
    """Pictures that cost one look each, and a power cut at the record named."""

    def __init__(self, count: int, fail_at: int | None = None) -> None:
        self.size, self.fail_at, self.read = count, fail_at, 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        if index >= self.size:
            raise IndexError(index)
        if index == self.fail_at:
            raise KeyboardInterrupt
        self.read += 1
        return np.random.default_rng(index).integers(0, 256, (40, 50, 3), np.uint8)


def head() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(3, 5, 8, 8).eval()


def filled(folder: Path, records: Records, **more: int) -> Cache:
    return build(head(), TASK, records, folder, key="k", device=CPU, quiet=True, **more)


def test_rows_are_the_heads_output_of_every_view(tmp_path: Path) -> None:
    records = Records(3)
    cache = filled(tmp_path, records)
    views = TASK.views(records[1], 1)
    assert (len(cache), cache.views, cache.ndim) == (3 * len(views), len(views), 4)
    with torch.no_grad():
        want = head()(torch.stack([TASK.preprocess(v) for v in views]))
    got, patch = cache.batch(range(len(views), 2 * len(views)), CPU)
    assert torch.allclose(got, want, atol=0.1)
    assert patch is not None
    assert patch.shape == (3, 3 * PATCH**2, 8, 12)


def test_resumed_after_a_kill_it_holds_the_same(tmp_path: Path) -> None:
    whole = filled(tmp_path / "a", Records(70))
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "b", Records(70, fail_at=50))
    again = Records(70)
    resumed = filled(tmp_path / "b", again)
    assert again.read < 50, "what was flushed is not computed again"
    assert np.array_equal(whole.z, resumed.z)
    assert whole.digest == resumed.digest


def test_a_finished_cache_reads_no_record_but_the_first(tmp_path: Path) -> None:
    filled(tmp_path, Records(5))
    again = Records(5)
    filled(tmp_path, again)
    assert again.read == 1


def test_another_model_starts_anew(tmp_path: Path) -> None:
    filled(tmp_path, Records(5))
    again = Records(5)
    build(head(), TASK, again, tmp_path, key="another", device=CPU, quiet=True)
    assert again.read == 6


def test_bounded(tmp_path: Path) -> None:
    cache = filled(tmp_path, Records(50), max_bytes=200_000)
    assert len(cache) < 150
    assert sum(f.stat().st_size for f in tmp_path.glob("*.f16")) <= 200_000


def test_records_of_another_size_are_refused(tmp_path: Path) -> None:
    class Uneven(Records):
        def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
            return np.zeros((40 + 8 * index, 40, 3), np.uint8)

    with pytest.raises(RequestError, match="fixed input size"):
        build(head(), FaceDetection(size=None), Uneven(3), tmp_path, key="k", device=CPU, quiet=True)


def test_a_patch_is_the_colour_of_what_the_site_covers() -> None:
    x = torch.zeros(1, 3, 64, 64)
    x[:, 1, 32:, :32] = 7.0
    patch = patches(x, torch.zeros(1, 9, 2, 2))
    assert patch is not None
    site = patch[0, :, 1, 0].reshape(3, PATCH, PATCH)
    assert site[1].eq(7).all()
    assert site[0].eq(0).all()
    assert patches(torch.zeros(1, 3, 8, 8), torch.zeros(1, 9, 8, 8)) is None
