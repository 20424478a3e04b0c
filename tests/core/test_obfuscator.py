"""The obfuscator's promises for any input: bounded signal, declared capacity, honest quantisation, alpha per record."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.core import channel
from sfumato.core.obfuscator import Allocation, Obfuscator, Shape

SHAPE = Shape(channels=6, k=5, bound=2.0, c_ref=7.5, context=4)
BLOCKS = Shape(channels=6, k=5, bound=2.0, c_ref=7.5, context=4, block=3)
shapes = st.sampled_from([SHAPE, BLOCKS])
steady = settings(derandomize=True, deadline=None, max_examples=40)
alphas = st.floats(0, 0.999)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def obfuscator(seed: int = 0, shape: Shape = SHAPE) -> Obfuscator:
    """Learned-like: no weight at its starting value, the bits unevenly spread and moving with alpha."""
    made = Obfuscator(shape).eval().requires_grad_(False)
    for number, tensor in enumerate(made.state_dict().values()):
        tensor.copy_(0.5 * random(*tensor.shape, seed=seed + number))
    made.std.abs_().add_(0.1)
    return made


def driven(sign: float, shape: Shape = SHAPE) -> Obfuscator:
    """Its signal is at the bound whatever comes in."""
    made = obfuscator(shape=shape)
    made.linear.weight.zero_()
    assert made.linear.bias is not None
    made.linear.bias.fill_(sign * 1e6)
    return made


@steady
@given(size=sizes, scale=st.sampled_from([0.0, 1.0, 1e3, 1e6, 1e30, 3e38]), seed=st.integers(0, 99), shape=shapes)
def test_signal_is_bounded(size: tuple[int, int], scale: float, seed: int, shape: Shape) -> None:
    z = (random(2, 6, *size, seed=seed) * scale).clamp(-3e38, 3e38)
    b = obfuscator(seed, shape).signal(z, torch.tensor([0.0, 0.9]))
    assert b.shape == (2, *shape.codes(size)) and bool((b.abs() <= SHAPE.bound).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_leaves_no_mark(bad: float) -> None:
    z = random(1, 6, 8, 8)
    z[0, 3, 4, 4] = bad
    made, noise = obfuscator(), random(1, 5, 8, 8, seed=1)
    a = torch.tensor([0.5])
    b, y = made.signal(z, a), made(z, a, noise)
    assert bool((b.abs() <= SHAPE.bound).all()) and bool(torch.isfinite(y).all())
    other = made.codes(z, torch.tensor([0.5]), noise + 1)
    carrying = made.allocation.carrying(a)
    assert bool((other != made.codes(z, a, noise))[:, carrying].all())  # noise touches every code


@steady
@given(size=sizes, alpha=alphas, seed=st.integers(0, 99), shape=shapes)
def test_codes_are_the_rounded_signal(size: tuple[int, int], alpha: float, seed: int, shape: Shape) -> None:
    made, a = obfuscator(seed, shape), torch.tensor([alpha])
    z, noise = random(1, 6, *size, seed=seed), random(1, *shape.codes(size), seed=seed + 1).clamp(-4, 4)
    step = made.allocation.steps(a)
    codes = made.codes(z, a, noise)
    assert codes.dtype == torch.int8 and codes.shape == noise.shape
    carrying = made.allocation.carrying(a)
    gap = ((codes * step - made(z, a, noise)).abs() / step)[:, carrying]
    assert gap.max().item() <= 0.5 + 1e-4
    silent = sorted(set(range(shape.sent)) - set(carrying.tolist()))
    assert not bool(codes[:, silent].any()) and not bool(made.allocation(a)[:, silent].any())


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.99])
def test_codes_saturate_past_four_sigma_only(sign: float, alpha: float) -> None:
    made, a = driven(sign), torch.tensor([alpha])
    z, step = torch.zeros(1, 6, 3, 3), made.allocation.steps(a)
    within = torch.full((1, 5, 3, 3), sign * 3.99)
    carrying = made.allocation.carrying(a)
    gap = ((made.codes(z, a, within) * step - made(z, a, within)).abs() / step)[:, carrying]
    assert gap.max().item() <= 0.5 + 1e-4
    for beyond in (6.0, 1e6):
        codes = made.codes(z, a, sign * beyond * torch.ones(1, 5, 3, 3))
        assert bool((codes[:, carrying] == sign * 127).all())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 0.95])
def test_measured_capacity_is_the_declared_one(alpha: float) -> None:
    """Signal driven to +-B: power over the measured noise gives the declared bits, in y and after int8."""
    a, side = torch.tensor([alpha]), 128
    z, noise = torch.zeros(1, 6, side, side), random(1, 5, side, side, seed=3)
    high, low = driven(1.0), driven(-1.0)
    step, carrying = high.allocation.steps(a), high.allocation.carrying(a)
    for up, down, slack in (
        (high(z, a, noise), low(z, a, noise.flip(-1)), 0.0),
        (high.codes(z, a, noise) * step, low.codes(z, a, noise.flip(-1)) * step, 0.03),
    ):
        up, down = up[:, carrying].double(), down[:, carrying].double()
        amplitude = (up.mean((0, 2, 3)) - down.mean((0, 2, 3))) / 2
        variance = (up.var((0, 2, 3)) + down.var((0, 2, 3))) / 2
        reach = amplitude / variance.sqrt()
        bits = torch.minimum(0.5 * torch.log2(1 + reach**2), torch.log2(1 + reach / channel.PEAK))
        want = high.allocation(a)[0, carrying].double()
        assert bool(((bits - want).abs() <= 0.03 + slack).all())
        assert bits.sum().item() == pytest.approx(high.bits_per_site(alpha).item(), abs=0.1 + 5 * slack)


def test_averaging_releases_buys_what_the_formula_says() -> None:
    a, releases = torch.tensor([0.6]), 9
    made, z = driven(1.0), torch.zeros(1, 6, 96, 96)
    mean = torch.stack([made(z, a, random(1, 5, 96, 96, seed=i)) for i in range(releases)]).mean(0).double()
    reach = mean.mean((0, 2, 3)).abs() / mean.std((0, 2, 3))
    bits = torch.minimum(0.5 * torch.log2(1 + reach**2), torch.log2(1 + reach / channel.PEAK))
    assert bits.sum().item() == pytest.approx(made.bits_per_site(0.6, releases=releases).item(), abs=0.1)


@steady
@given(alpha=st.lists(alphas, min_size=1, max_size=5), sites=st.integers(1, 5000))
def test_bits_of_a_record(alpha: list[float], sites: int) -> None:
    made = obfuscator()
    want = [(1 - float(np.float32(a))) * SHAPE.c_ref for a in alpha]
    np.testing.assert_allclose(made.bits_per_site(alpha), want, rtol=1e-5)
    np.testing.assert_allclose(made.bits_per_record(alpha, sites), np.multiply(want, sites), rtol=1e-5)
    assert bool((made.bits_per_site(alpha, releases=2) > made.bits_per_site(alpha)).all())


@steady
@given(alpha=st.lists(alphas, min_size=2, max_size=5), size=sizes)
def test_a_batch_of_alphas_is_each_alone(alpha: list[float], size: tuple[int, int]) -> None:
    n, made = len(alpha), obfuscator()
    z, noise, a = random(n, 6, *size), random(n, 5, *size, seed=1), torch.tensor(alpha)
    together = made(z, a, noise)
    for i in range(n):
        alone = made(z[i : i + 1], a[i : i + 1], noise[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)
        one = made.codes(z[i : i + 1], a[i : i + 1], noise[i : i + 1]).int()
        assert int((made.codes(z, a, noise)[i : i + 1].int() - one).abs().max()) <= 1


def test_alpha_changes_the_signal_not_the_noise() -> None:
    made, z = obfuscator(), random(1, 6, 4, 4)
    noise = random(1, 5, 4, 4, seed=1)
    for alpha in (0.0, 0.5, 0.9):
        a = torch.tensor([alpha])
        gain = channel.gain(made.allocation(a), SHAPE.bound)[:, :, None, None]
        torch.testing.assert_close(made(z, a, noise) - gain * made.signal(z, a), noise, rtol=1e-5, atol=1e-5)
        assert torch.equal(made(z, a, noise), made(z, a, noise))  # the module draws nothing of its own


def test_both_sides_know_the_same_step() -> None:
    made, other = obfuscator(), Allocation(SHAPE)
    other.load_state_dict(made.allocation.state_dict())
    a = torch.linspace(0, 0.999, 50)
    assert torch.equal(other.steps(a), made.allocation.steps(a))


def test_gradients_reach_every_weight() -> None:
    made = obfuscator().requires_grad_(True)
    made(random(2, 6, 3, 3), torch.tensor([0.2, 0.7]), random(2, 5, 3, 3, seed=1)).square().mean().backward()
    for name, weight in made.named_parameters():
        assert weight.grad is not None and bool(torch.isfinite(weight.grad).all()), name
        assert bool((weight.grad != 0).any()), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu() -> None:
    made, a = obfuscator(), torch.tensor([0.2, 0.9])
    z, noise = random(2, 6, 32, 32), random(2, 5, 32, 32, seed=1)
    codes = made.codes(z, a, noise).int()
    moved = obfuscator().cuda().codes(z.cuda(), a.cuda(), noise.cuda()).int().cpu()
    assert int((codes - moved).abs().max()) <= 1 and float((codes != moved).float().mean()) < 0.01
