"""The capacity algebra against slow oracles: bits add up, gains spend exactly them, and the wire carries no more."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from sfumato.core import channel
from sfumato.core.errors import AlphaError

alphas = st.floats(0, 1, exclude_max=True, width=32)
weights = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40)
budgets = st.floats(0.01, 60)
steady = settings(derandomize=True, deadline=None, max_examples=100)


def blahut_arimoto(law: NDArray[np.float64], rounds: int = 1000) -> float:
    """Capacity in bits of a channel p(code | b) [inputs, codes], from below (Cover & Thomas, section 10.8)."""
    prior = np.full(len(law), 0.5 / len(law))
    prior[[0, -1]] += 0.25  # a good start: of little capacity the extremes make the most
    for _ in range(rounds):
        out = prior @ law
        gaps = np.sum(law * np.log(np.where(law > 0, law, 1) / np.where(out > 0, out, 1)), axis=1)
        prior = prior * np.exp(gaps)
        total = prior.sum()
        prior /= total
    return float(np.log2(total))


def capacity(reach: float) -> float:
    """The better of the two bounds on what a channel of this peak and unit noise carries, in bits."""
    return min(0.5 * math.log2(1 + reach**2), math.log2(1 + 2 * reach / math.sqrt(2 * math.pi * math.e)))


def test_minus_zero_is_zero() -> None:
    assert not bool(torch.signbit(channel.as_alpha([-0.0, 0.5], 2)).any())


@pytest.mark.parametrize("alpha", [0.8, [0.8], torch.tensor(0.8), torch.tensor([0.8]), np.float64(0.8)])
def test_one_alpha_serves_every_record(alpha: channel.Alpha) -> None:
    got = channel.as_alpha(alpha, 3)
    assert got.dtype == torch.float32 and got.tolist() == pytest.approx([0.8] * 3)


def test_one_alpha_a_record() -> None:
    assert channel.as_alpha([0, 0.5, 0.25], 3).tolist() == [0, 0.5, 0.25]


@pytest.mark.parametrize(
    "alpha",
    [1, 1.0, -0.1, -1e-9, 2, math.nan, math.inf, [0.5, 1], [], [0.1, 0.2], "half", None, 10**400, 1 - 1e-12, object()],
)
def test_any_other_alpha_is_refused(alpha: channel.Alpha) -> None:
    with pytest.raises(AlphaError) as caught:
        channel.as_alpha(alpha, 3)
    assert caught.value.wanted


def test_the_message_says_which() -> None:
    with pytest.raises(AlphaError, match=r"alpha = 1\.5"):
        channel.as_alpha([0.5, 1.5, 2.5], 3)
    with pytest.raises(AlphaError, match="alpha = -1e-09"):
        channel.as_alpha(-1e-9, 3)
    with pytest.raises(AlphaError, match="2 alphas for 3 records"):
        channel.as_alpha([0.1, 0.2], 3)


@steady
@given(w=weights, alpha=alphas, c_ref=budgets, data=st.data())
def test_allocation_spends_the_budget(w: list[float], alpha: float, c_ref: float, data: st.DataObject) -> None:
    v = data.draw(st.lists(st.floats(-20, 20, width=32), min_size=len(w), max_size=len(w)))
    bits = channel.allocate(torch.tensor(w), torch.tensor(v), torch.tensor([alpha, 0.0]), c_ref)
    assert bits.shape == (2, len(w)) and bool((bits >= 0).all())
    np.testing.assert_allclose(bits.sum(1), [(1 - alpha) * c_ref, c_ref], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 0.99])
def test_allocation_is_water_poured_over_the_levels(alpha: float) -> None:
    draw = np.random.default_rng(0)
    w, v = draw.normal(0, 2, (2, 9))
    low, high = -100.0, 100.0  # theta by bisection
    for _ in range(200):
        theta = (low + high) / 2
        low, high = (theta, high) if np.maximum(0, w + alpha * v - theta).sum() > (1 - alpha) * 16 else (low, theta)
    got = channel.allocate(torch.tensor(w), torch.tensor(v), torch.tensor([alpha], dtype=torch.float64), 16.0)[0]
    np.testing.assert_allclose(got, np.maximum(0, w + alpha * v - theta), atol=1e-9)


@steady
@given(w=weights, a=st.floats(0, 0.999), b=st.floats(0, 0.999), c_ref=budgets)
def test_capacity_falls_with_alpha(w: list[float], a: float, b: float, c_ref: float) -> None:
    low, high = min(a, b), max(a, b) if abs(a - b) > 1e-4 else min(a, b) + 1e-3 * (1 - min(a, b))
    tensor = torch.tensor(w)
    total = channel.allocate(tensor, tensor.flip(0), torch.tensor([low, high]), c_ref).double().sum(1)
    assert total[0] > total[1] > 0


@steady
@given(bits=st.floats(0, 20), bound=st.floats(0.1, 10))
def test_gain_spends_exactly_the_bits(bits: float, bound: float) -> None:
    g = channel.gain(torch.tensor([bits], dtype=torch.float64), bound).item()
    spent = capacity(g * bound)
    assert spent == pytest.approx(bits, rel=1e-9, abs=1e-9)
    assert spent <= bits + 1e-12


def test_gain_keeps_a_gradient_at_no_bits() -> None:
    bits = torch.tensor([0.0, 1e-20, 1e-6, 1.0], requires_grad=True)
    channel.gain(bits, 2.0).sum().backward()
    assert bits.grad is not None and bool(torch.isfinite(bits.grad).all()) and bool((bits.grad > 0).all())
    assert channel.gain(torch.zeros(1), 2.0).item() == 0


@steady
@given(bits=st.floats(0, 30), bound=st.floats(0.1, 10))
def test_step_leaves_room_for_signal_and_four_sigma(bits: float, bound: float) -> None:
    tensor = torch.tensor([bits], dtype=torch.float64)
    reach = channel.step(tensor, bound).item() * channel.INT8_MAX
    assert reach == pytest.approx(channel.gain(tensor, bound).item() * bound + 4)


@steady
@given(bits=st.floats(0, 20), releases=st.integers(1, 1000))
def test_repeats_are_the_formula(bits: float, releases: int) -> None:
    tensor = torch.tensor([bits], dtype=torch.float64)
    got = channel.repeated(tensor, releases).item()
    assert got == pytest.approx(capacity(math.sqrt(releases) * channel.reach(tensor).item()), rel=1e-9, abs=1e-9)
    assert bits - 1e-12 <= got <= bits * releases + 1e-9


def test_repeats_are_exact_for_one_release_and_finite_for_any_bits() -> None:
    bits = torch.tensor([0.0, 1e-8, 1e-3, 0.6, 0.7, 1.0, 64.0, 1e4])
    torch.testing.assert_close(channel.repeated(bits, 1), bits, rtol=1e-6, atol=0)
    assert torch.equal(channel.repeated(bits, 4)[-2:], bits[-2:] + 1)
    assert channel.repeated(bits, 5)[1].item() == pytest.approx(5e-8)


def test_the_peak_bound_by_its_proof() -> None:
    """No input of peak A is further, in relative entropy, from the proof's output density than log2(1 + A / q)."""
    y, width = np.linspace(-20, 20, 80_001, retstep=True)
    for reach in (1.0, 3.0, 12.0):
        weight = 2 * reach / (2 * reach + math.sqrt(2 * math.pi * math.e))
        tails = (1 - weight) * stats.norm.pdf(np.maximum(0, np.abs(y) - reach))
        density = np.where(np.abs(y) <= reach, weight / (2 * reach), tails)
        bits = [
            float((p * np.log2(np.where(p > 0, p, 1) / density)).sum() * width)
            for p in (stats.norm.pdf(y, x) for x in np.linspace(-reach, reach, 41))
        ]
        assert max(bits) == pytest.approx(math.log2(1 + reach / channel.PEAK), abs=0.02), "reached at the ends"
        assert max(bits) <= math.log2(1 + reach / channel.PEAK) + 1e-3


@pytest.mark.parametrize("bits", [0.01, 0.1, 0.5, 1.0, 2.0, 3.0])
def test_the_wire_carries_no_more_than_the_bits(bits: float) -> None:
    """The real channel, bounded input to int8 codes, has a capacity of its own: under the cap, and not far under."""
    bound, inputs = 2.0, np.linspace(-2, 2, 41)
    c = torch.tensor([bits], dtype=torch.float64)
    g, step = channel.gain(c, bound).item(), channel.step(c, bound).item()
    edges = (np.arange(-127, 127) + 0.5) * step
    below = stats.norm.cdf(edges[None] - g * inputs[:, None])
    law = np.diff(np.concatenate([np.zeros((41, 1)), below, np.ones((41, 1))], 1), axis=1)
    np.testing.assert_allclose(law.sum(1), 1)
    assert 0.75 * bits < blahut_arimoto(law) <= bits + 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu() -> None:
    bits = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)) * 3
    moved = bits.cuda()
    torch.testing.assert_close(channel.gain(moved, 2.0).cpu(), channel.gain(bits, 2.0))
    torch.testing.assert_close(channel.step(moved, 2.0).cpu(), channel.step(bits, 2.0))
    torch.testing.assert_close(channel.repeated(moved, 7).cpu(), channel.repeated(bits, 7))
    assert channel.as_alpha(0.5, 3, "cuda").device.type == "cuda"
