"""The restorer scales as Wiener does, dequantises what crossed, and treats each record by its own alpha."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.core import channel
from sfumato.core.obfuscator import Shape
from sfumato.core.restorer import Restorer

SHAPE = Shape(channels=6, k=5, bound=2.0, c_ref=7.5, context=4)
steady = settings(derandomize=True, deadline=None, max_examples=40)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def restorer(seed: int = 0) -> Restorer:
    made = Restorer(SHAPE).eval().requires_grad_(False)
    for number, tensor in enumerate(made.state_dict().values()):
        tensor.copy_(0.3 * random(*tensor.shape, seed=seed + number))
    return made


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_wiener_is_the_least_squares_estimate(alpha: float) -> None:
    made, a = restorer(), torch.tensor([alpha])
    made.growth.zero_()  # the units of the signal itself
    made.spread.zero_()
    deviation = (0.5 * (made.log_variance + alpha * made.variance_growth)).exp()[None, :, None, None]
    b = random(1, 5, 200, 200, seed=1) * deviation
    y = channel.gain(made.allocation(a), SHAPE.bound)[:, :, None, None] * b + random(1, 5, 200, 200, seed=2)
    estimate = made.wiener(made.allocation(a), a)[:, :, None, None] * y
    slope = (y * b).sum((0, 2, 3)) / (y * y).sum((0, 2, 3))
    want = slope[None, :, None, None] * y
    assert (estimate - want).square().mean() < 1e-4 * b.square().mean()
    for factor in (0.8, 1.2):
        assert (estimate - b).square().mean() < (factor * estimate - b).square().mean()


def test_a_part_block_is_cut_off() -> None:
    shape = Shape(channels=6, k=5, context=4, block=3)
    made = Restorer(shape).eval().requires_grad_(False)
    codes = (40 * random(1, *shape.codes((4, 8)))).round().clamp(-127, 127).to(torch.int8)
    cut, whole = made.restore(codes, torch.tensor([0.3]), (4, 8)), made.restore(codes, torch.tensor([0.3]))
    assert codes.shape == (1, 45, 2, 3) and cut.shape == (1, 6, 4, 8) and whole.shape == (1, 6, 6, 9)


@steady
@given(
    alpha=st.lists(st.floats(0, 0.999), min_size=1, max_size=4),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_any_size_and_each_record_by_its_own_alpha(alpha: list[float], size: tuple[int, int]) -> None:
    made, a = restorer(), torch.tensor(alpha)
    codes = (40 * random(len(alpha), 5, *size)).round().clamp(-127, 127).to(torch.int8)
    together = made.restore(codes, a)
    assert together.shape == (len(alpha), 6, *size) and bool(torch.isfinite(together).all())
    for i in range(len(alpha)):
        alone = made.restore(codes[i : i + 1], a[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_restore_dequantises_with_the_step() -> None:
    made, a = restorer(), torch.tensor([0.3])
    codes = torch.arange(-127, 128, dtype=torch.int8)[None, None].expand(1, 5, 255)[..., None]
    want = made(codes.float() * made.allocation.steps(a), a)
    torch.testing.assert_close(made.restore(codes, a), want)


def test_gradients_reach_every_weight() -> None:
    made = restorer().requires_grad_(True)
    made(random(2, 5, 4, 4), torch.tensor([0.2, 0.7])).square().mean().backward()
    for name, weight in made.named_parameters():
        assert weight.grad is not None and bool(torch.isfinite(weight.grad).all()), name
        assert bool((weight.grad != 0).any()), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu() -> None:
    codes, a = (40 * random(2, 5, 16, 16)).to(torch.int8), torch.tensor([0.2, 0.9])
    moved = restorer().cuda().restore(codes.cuda(), a.cuda()).cpu()
    torch.testing.assert_close(moved, restorer().restore(codes, a), rtol=1e-3, atol=1e-3)
