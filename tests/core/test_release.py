"""What crosses the wire comes back as it was, is small, and anything else is refused with ReleaseError."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.core.errors import ReleaseError, RequestError
from sfumato.core.release import Release
from sfumato.core.sites import fold, unfold

steady = settings(derandomize=True, deadline=None, max_examples=150)
axes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))


def release(n: int = 2, k: int = 3, h: int = 4, w: int = 5, ndim: int = 4, seed: int = 0) -> Release:
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (n, k, h, w), generator=rng).to(torch.int8)
    alpha = torch.rand(n, generator=rng).clamp_max(0.999)
    return Release(codes, alpha, f"{seed:02x}" * 32, torch.full((n,), 9.0), ndim)


def forged(n: int, k: int, h: int, w: int, *, body: int, ndim: int = 4, alpha: float = 0.5, block: int = 1) -> bytes:
    head = struct.pack("<4sBBHHIII32s", b"SFUM", 3, ndim, k, block, h, w, n, bytes(32))
    mask = ((1 << k) - 1).to_bytes(-(-k // 8), "little")
    return head + struct.pack("<f", alpha) * min(n, 99) + mask + b"\x01" * body


def same(a: Release, b: Release) -> bool:
    tensors = torch.equal(a.tensor, b.tensor) and a.tensor.dtype == b.tensor.dtype and torch.equal(a.alpha, b.alpha)
    return tensors and (a.digest, a.ndim, a.block, a.sites) == (b.digest, b.ndim, b.block, b.sites)


@steady
@given(axes=axes, seed=st.integers(0, 255))
def test_round_trip(axes: tuple[int, int, int, int], seed: int) -> None:
    sent = release(*axes, seed=seed)
    data = sent.to_bytes()
    got = Release.from_bytes(data)
    assert same(sent, got) and len(data) == sent.nbytes and got.to_bytes() == data
    assert bool(got.bits.isnan().all())  # only the artefact knows them


def test_the_layout_is_the_documented_one() -> None:
    data = release(1, 2, 1, 3, seed=7).to_bytes()
    assert data[:6] == b"SFUM\x03\x04" and struct.unpack_from("<HHIII", data, 6) == (2, 1, 1, 3, 1)
    assert data[22:54] == bytes([7]) * 32 and data[58] == 0b11 and len(data) == 54 + 4 + 1 + 6


def test_empty_channels_do_not_travel() -> None:
    plain = release(2, 11, 2, 3)
    plain.tensor[:, [0, 4, 9]] = 0
    data = plain.to_bytes()
    assert same(plain, Release.from_bytes(data)) and len(data) == plain.nbytes == 54 + 2 * 4 + 2 + 2 * 8 * 6
    assert data[62:64] == bytes([0b11101110, 0b101])
    silent = Release(torch.zeros_like(plain.tensor), plain.alpha, plain.digest, plain.bits)
    assert same(silent, Release.from_bytes(silent.to_bytes())) and silent.nbytes == 54 + 8 + 2


@pytest.mark.parametrize("mask", [0b0111, 0b1100_0111])
def test_a_mask_that_is_not_of_these_codes_is_refused(mask: int) -> None:
    data = bytearray(release(1, 6, 2, 2).to_bytes())
    data[58] = mask
    with pytest.raises(ReleaseError):
        Release.from_bytes(bytes(data))


def test_minus_zero_and_a_code_that_is_never_made_are_refused() -> None:
    data = bytearray(release(1, 2, 1, 1).to_bytes())
    for place, byte in ((57, 0x80), (59, 0x80)):
        other = bytearray(data)
        other[place] = byte
        if place == 57:
            other[54:57] = bytes(3)
        with pytest.raises(ReleaseError):
            Release.from_bytes(bytes(other))


def test_a_channel_said_to_travel_that_is_empty_is_refused() -> None:
    data = bytearray(release(1, 2, 1, 1).to_bytes())
    assert data[58] == 0b11 and Release.from_bytes(bytes(data))
    data[60] = 0
    with pytest.raises(ReleaseError):
        Release.from_bytes(bytes(data))


def test_blocks_and_the_sites_they_cover_travel() -> None:
    plain = release(2, 12, 2, 3)
    sent = Release(plain.tensor, plain.alpha, plain.digest, plain.bits, block=2, sites=(3, 6))
    got = Release.from_bytes(sent.to_bytes())
    assert same(got, sent) and (got.block, got.sites) == (2, (3, 6))
    assert Release(plain.tensor, plain.alpha, plain.digest, plain.bits, block=2).sites == (4, 6)


def test_a_frame_is_at_most_70_kb() -> None:
    assert release(1, 64, 32, 32).nbytes == len(release(1, 64, 32, 32).to_bytes()) <= 70_000


def test_views_and_other_orders_travel_too() -> None:
    turned = release().tensor.transpose(2, 3)
    sent = Release(turned, torch.tensor(0.5).expand(2), "ab" * 32, torch.zeros(2))
    assert same(Release.from_bytes(sent.to_bytes()), sent)


@steady
@given(data=st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ReleaseError):
        Release.from_bytes(data)


@steady
@given(flips=st.lists(st.tuples(st.integers(0, 182), st.integers(1, 255)), min_size=1, max_size=4))
def test_mutated_bytes_are_refused_or_another_release(flips: list[tuple[int, int]]) -> None:
    data = bytearray(release().to_bytes())
    assert len(data) == 183
    for place, flip in flips:
        data[place % 183] ^= flip
    try:
        got = Release.from_bytes(bytes(data))
    except ReleaseError:
        return
    assert got.to_bytes() == bytes(data) and bool(((got.alpha >= 0) & (got.alpha < 1)).all())
    assert unfold(torch.empty(1, 1, *got.sites, device="meta"), got.ndim).ndim == got.ndim


@steady
@given(cut=st.integers(0, 182), extra=st.binary(min_size=1, max_size=9))
def test_truncated_and_padded_are_refused(cut: int, extra: bytes) -> None:
    data = release().to_bytes()
    for wrong in (data[:cut], data + extra):
        with pytest.raises(ReleaseError):
            Release.from_bytes(wrong)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        forged(2**32 - 1, 65535, 2**32 - 1, 2**32 - 1, body=0),
        forged(0, 3, 4, 4, body=0),
        forged(1, 0, 4, 4, body=0),
        forged(1, 1, 0, 4, body=0),
        forged(1, 1, 1, 2**31, body=2),
        forged(1, 65535, 4, 2**30, body=0),
        forged(1, 1, 4, 4, body=16, block=2),
        forged(1, 1, 4, 4, body=16, block=0),
        forged(1, 1, 1, 1, body=1, ndim=5),
        forged(1, 1, 1, 1, body=1, ndim=0),
        forged(1, 1, 2, 2, body=4, ndim=3),
        forged(1, 1, 2, 1, body=2, ndim=2),
        forged(1, 1, 1, 1, body=1, alpha=1.0),
        forged(1, 1, 1, 1, body=1, alpha=-0.5),
        forged(1, 1, 1, 1, body=1, alpha=float("nan")),
        forged(1, 1, 1, 1, body=1).replace(b"SFUM\x03", b"SFUM\x01"),
    ],
)
def test_forged_headers_are_refused(data: bytes) -> None:
    with pytest.raises(ReleaseError):
        Release.from_bytes(data)
    assert Release.from_bytes(forged(1, 1, 2, 2, body=4)).tensor.shape == (1, 1, 2, 2)  # the forge itself works


@steady
@given(shape=st.lists(st.integers(1, 5), min_size=2, max_size=4))
def test_fold_and_unfold(shape: list[int]) -> None:
    z = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    sites = fold(z)
    assert sites.shape[:2] == (shape[0], shape[2] if len(shape) == 3 else shape[1]) and sites.ndim == 4
    assert torch.equal(unfold(sites, z.ndim), z)


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3, 4, 5)])
def test_fold_refuses_other_ranks(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="cut tensor of shape"):
        fold(torch.zeros(shape))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_release_on_cuda_is_the_same_bytes() -> None:
    sent = release()
    moved = Release(sent.tensor.cuda(), sent.alpha.cuda(), sent.digest, sent.bits.cuda())
    assert moved.to_bytes() == sent.to_bytes()
