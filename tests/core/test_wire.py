"""A release as tensors and back; whatever is not one is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.core import wire
from sfumato.core.errors import ReleaseError
from sfumato.core.release import Release

DIGEST = "ab" * 32


def made(
    records: int, sent: int, block: int, size: tuple[int, int], seed: int, channels: int
) -> tuple[Release, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    high, wide = (-(-side // block) for side in size)
    codes = torch.randint(-127, 128, (records, sent, high, wide), generator=generator).to(torch.int8)
    some = torch.randperm(sent, generator=generator)[: min(channels, sent)].sort().values
    rest = torch.ones(sent, dtype=torch.bool)
    rest[some] = False
    codes[:, rest] = 0
    alpha = torch.rand(records, generator=generator) * 0.99
    return Release(codes, alpha, DIGEST, torch.full((records,), torch.nan), 4, block, size), some.numpy()


@settings(deadline=None, derandomize=True)
@given(
    st.integers(1, 3), st.integers(1, 70), st.integers(1, 4), st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(0, 99), st.integers(0, 70),
)  # fmt: skip
def test_a_release_comes_back(
    records: int, sent: int, block: int, size: tuple[int, int], seed: int, channels: int
) -> None:
    release, some = made(records, sent, block, size, seed, channels)
    tensors = wire.to_tensors(release, some)
    assert list(tensors) == list(wire.TYPES) and tensors["CODES"].shape[1] == len(some)
    back = wire.from_tensors(tensors, sent, block, 4)
    assert torch.equal(back.tensor, release.tensor) and torch.equal(back.alpha, release.alpha)
    assert (back.digest, back.sites, back.block, back.ndim) == (DIGEST, size, block, 4)


def test_codes_of_channels_that_do_not_travel_are_no_release() -> None:
    release, some = made(1, 12, 2, (4, 4), 0, 12)
    with pytest.raises(ReleaseError):
        wire.to_tensors(release, some[1:])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CODES", np.zeros((2, 5, 2, 2), np.uint8)),
        ("CODES", np.full((2, 5, 2, 2), -128, np.int8)),
        ("CODES", np.zeros((2, 4, 2, 2), np.int8)),
        ("CODES", np.zeros((2, 5, 2, 3), np.int8)),
        ("CODES", np.zeros((0, 5, 2, 2), np.int8)),
        ("CODES", np.zeros((2, 5, 4), np.int8)),
        ("CHANNELS", np.full((2, 2), 255, np.uint8)),
        ("CHANNELS", np.zeros((2, 3), np.uint8)),
        ("ALPHA", np.array([[1.0], [0.5]], np.float32)),
        ("ALPHA", np.array([[np.nan], [0.5]], np.float32)),
        ("ALPHA", np.array([[-0.0], [0.5]], np.float32)),
        ("ALPHA", np.array([[0.5], [0.5]], np.float64)),
        ("SITES", np.array([[4, 4], [4, 3]], np.int32)),
        ("SITES", np.array([[0, 4], [0, 4]], np.int32)),
        ("SITES", np.array([[-4, 4], [-4, 4]], np.int32)),
        ("SITES", np.array([[2**31 - 1] * 2] * 2, np.int32)),
        ("DIGEST", np.stack([np.zeros(32, np.uint8), np.ones(32, np.uint8)])),
        ("DIGEST", np.zeros((2, 31), np.uint8)),
    ],
)
def test_what_is_no_release_is_refused(name: str, value: np.ndarray) -> None:
    release, some = made(2, 12, 2, (4, 4), 3, 5)
    tensors = wire.to_tensors(release, some)
    wire.from_tensors(tensors, 12, 2, 4)
    with pytest.raises(ReleaseError):
        wire.from_tensors({**tensors, name: value}, 12, 2, 4)
    with pytest.raises(ReleaseError):
        wire.from_tensors({key: value for key, value in tensors.items() if key != name}, 12, 2, 4)


def test_a_forged_size_asks_for_no_memory() -> None:
    side = 2**14
    tensors: wire.Tensors = {
        "CODES": np.zeros((1, 0, side, side), np.int8),
        "CHANNELS": np.zeros((1, 512), np.uint8),
        "ALPHA": np.zeros((1, 1), np.float32),
        "SITES": np.array([[side, side]], np.int32),
        "DIGEST": np.zeros((1, 32), np.uint8),
    }
    with pytest.raises(ReleaseError, match="fewer"):
        wire.from_tensors(tensors, 4096, 1, 4)
