"""The transform of blocks of sites is the cosine transform, loses nothing, and keeps white noise white."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn

from sfumato.core.blocks import Part, sites_of, spectrum


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(side=st.sampled_from([1, 2, 3, 8]), size=st.tuples(st.integers(1, 20), st.integers(1, 20)))
def test_back_and_forth_is_the_same(side: int, size: tuple[int, int]) -> None:
    u = random(2, 3, *size)
    coefficients = spectrum(u, side)
    assert coefficients.shape == (2, 3 * side**2, -(-size[0] // side), -(-size[1] // side))
    torch.testing.assert_close(sites_of(coefficients, side, size), u, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [2, 4, 8])
def test_it_is_the_cosine_transform_of_every_block(side: int) -> None:
    u = random(1, 2, 2 * side, side)
    want = dctn(u[0, 1, side:].double().numpy(), norm="ortho")
    got = spectrum(u, side)[0, side**2 :, 1, 0].view(side, side)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_energy_is_kept_and_a_flat_block_is_one_number() -> None:
    u = random(1, 4, 16, 8)
    assert spectrum(u, 8).square().sum().item() == pytest.approx(u.square().sum().item(), rel=1e-5)
    flat = spectrum(torch.ones(1, 1, 8, 8), 8).flatten()
    assert flat[0].item() == pytest.approx(8.0) and flat[1:].abs().max().item() < 1e-5


def test_memory_order_does_not_matter() -> None:
    u = random(2, 3, 8, 16)
    turned = u.to(memory_format=torch.channels_last)
    assert torch.equal(spectrum(u, 4), spectrum(turned, 4))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    side=st.sampled_from([1, 2, 3, 8]), size=st.tuples(st.integers(1, 20), st.integers(1, 20)), data=st.data(),
)  # fmt: skip
def test_a_part_is_some_of_the_whole(side: int, size: tuple[int, int], data: st.DataObject) -> None:
    numbers = torch.tensor(sorted(data.draw(st.sets(st.integers(0, 3 * side**2 - 1), min_size=1))))
    u, part = random(2, 3, *size), Part(numbers, side)
    live = sorted({int(n) // side**2 for n in numbers})
    assert part.channels.tolist() == live
    some = part.spectrum(u.permute(0, 2, 3, 1)[..., live])
    torch.testing.assert_close(some, spectrum(u, side)[:, numbers].permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)
    alone = torch.zeros_like(spectrum(u, side))
    alone[:, numbers] = some.permute(0, 3, 1, 2)
    want = sites_of(alone, side, size)[:, live].permute(0, 2, 3, 1)
    torch.testing.assert_close(part.sites_of(some, size), want, rtol=1e-5, atol=1e-5)
