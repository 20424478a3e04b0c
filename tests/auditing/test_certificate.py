"""Every formula against a slow oracle: algebra, scipy's entropies, the exact Jacobian, an attacker at the bound."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from sfumato.auditing import certificate
from sfumato.auditing.certificate import capacity, certify, fisher, rate
from sfumato.core import channel
from sfumato.core.errors import RequestError
from sfumato.core.obfuscator import Obfuscator, Shape
from sfumato.core.task import Image
from sfumato.tasks.classification import Classification
from sfumato.trusted.protect import Protected

SHAPE = Shape(channels=6, k=5, context=4, c_ref=20)
steady = settings(derandomize=True, deadline=None, max_examples=30)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def obfuscator(shape: Shape = SHAPE, seed: int = 0) -> Obfuscator:
    made = Obfuscator(shape).eval().requires_grad_(False)
    for number, tensor in enumerate(made.state_dict().values()):
        tensor.copy_(0.5 * random(*tensor.shape, seed=seed + number))
    made.std.abs_().add_(0.1)
    return made


def linear(weight: Tensor, bound: float = 1e3) -> Obfuscator:
    """b = W z where tanh is a line, for as long as B is far."""
    k, channels = weight.shape
    made = Obfuscator(Shape(channels=channels, k=k, context=2, bound=bound, c_ref=4 * k))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        made.linear.weight.copy_(weight[:, :, None, None])
    return made


def head() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.Tanh()).eval()


def protected(task: Classification | None = None, part: nn.Module | None = None) -> Protected:
    return Protected(part or head(), obfuscator(), task or Classification(mean=100.0, std=40.0), "ab" * 32)


def records(count: int = 6, side: int = 8) -> list[Image]:
    return list(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8))


def gains(made: Obfuscator, alpha: float) -> np.ndarray:
    bits = made.allocation(torch.tensor([alpha]))[0].detach().double().numpy()
    reach = np.maximum(np.sqrt(2 ** (2 * bits) - 1), channel.PEAK * (2**bits - 1))
    return np.asarray(reach / made.shape.bound)


# ---- capacity


@steady
@given(alpha=st.floats(0, 0.999), sites=st.integers(1, 5000), releases=st.integers(1, 100))
def test_capacity_is_the_algebra(alpha: float, sites: int, releases: int) -> None:
    made = obfuscator()
    share = 1 - float(np.float32(alpha))
    assert capacity(made, alpha, sites) == pytest.approx(sites * share * SHAPE.c_ref, rel=1e-4)
    reach = np.sqrt(releases) * gains(made, alpha) * SHAPE.bound
    want = sites * np.minimum(0.5 * np.log2(1 + reach**2), np.log2(1 + reach / channel.PEAK)).sum()
    assert capacity(made, alpha, sites, releases=releases) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(("sites", "releases"), [(0, 1), (1, 0), (-3, 1)])
def test_capacity_of_nothing_is_refused(sites: int, releases: int) -> None:
    with pytest.raises(RequestError, match="at least 1"):
        capacity(obfuscator(), 0.5, sites, releases=releases)


# ---- rate


@pytest.mark.parametrize("releases", [1, 7])
def test_the_rate_of_a_gaussian_is_the_difference_of_entropies(releases: int) -> None:
    """h(y) - h(eps), K releases being one of variance 1 / K."""
    draw = np.random.default_rng(3)
    root, gain = draw.standard_normal((5, 5)), draw.uniform(0.1, 3, 5)
    s = root @ root.T
    noise = np.eye(5) / releases
    y = stats.multivariate_normal(cov=np.diag(gain) @ s @ np.diag(gain) + noise)
    want = (y.entropy() - stats.multivariate_normal(cov=noise).entropy()) / math.log(2)
    assert float(certificate.gaussian_rate(s, gain, releases)) == pytest.approx(want, rel=1e-9)


def test_the_rate_of_a_known_gaussian_is_found_from_its_sample() -> None:
    weight, alpha = random(3, 4, seed=5), 0.5
    made = linear(weight)
    z = random(100, 4, 16, 16, seed=6).numpy()
    s = (weight @ weight.T).double().numpy()
    y = stats.multivariate_normal(cov=np.eye(3) + gains(made, alpha)[:, None] * s * gains(made, alpha))
    want = 256 * (y.entropy() - stats.multivariate_normal(cov=np.eye(3)).entropy()) / math.log(2)
    found = rate(made, z, alpha)
    assert found.mean == pytest.approx(want, rel=0.01)
    assert found.low < found.mean < found.high and found.low < want < found.high
    assert found.records == 100


def test_the_covariance_is_numpy_s_over_sites_and_records() -> None:
    made, z, a = obfuscator(), random(20, 6, 3, 4).numpy(), torch.full((20,), 0.4)
    found = certificate._signals(made, z, 0.4)
    assert found.shape == (20, 5, 1, 12)
    first, second = certificate._moments(found[:, :, 0], np.full((1, 20), 0.05))
    b = made.signal(torch.from_numpy(z), a).transpose(0, 1).flatten(1).double().numpy()
    want = np.cov(b, bias=True)
    np.testing.assert_allclose(certificate.covariance(first, second)[0], want, atol=1e-6)


def test_the_rate_in_blocks_is_the_sum_over_coefficients() -> None:
    shape = Shape(channels=6, k=5, context=4, c_ref=6, block=2)
    made, z, alpha, blocks = obfuscator(shape=shape), random(30, 6, 4, 6).numpy(), 0.3, 6
    a = torch.full((30,), alpha)
    b = made.signal(torch.from_numpy(z), a).view(30, 5, 4, blocks).double().numpy()
    bits = made.allocation(a[:1])[0].double().view(5, 4)
    gain, want = channel.gain(bits, shape.bound).numpy(), 0.0
    for f in range(4):
        s = np.cov(b[:, :, f].transpose(1, 0, 2).reshape(5, -1), bias=True)
        inside = np.eye(5) + gain[:, f, None] * s * gain[:, f]
        want += blocks * min(0.5 * np.linalg.slogdet(inside)[1] / math.log(2), bits[:, f].sum().item())
    assert rate(made, z, alpha).mean == pytest.approx(want, rel=1e-4)
    assert rate(made, z, alpha).mean < capacity(made, alpha, 24) * 0.999, "the data, not the cap, decides here"


@pytest.mark.parametrize(("block", "want"), [(1, 49), (8, 256), (4, 144)])
def test_a_region_counts_the_blocks_it_can_lie_in(block: int, want: int) -> None:
    assert certificate.touched(block, 49, 1024) == want
    assert certificate.touched(block, 49, 40) == 40


def test_the_interval_resamples_records_and_not_sites() -> None:
    """Records whose sites are all equal: as many records as there are decide the width, however many sites."""
    z, made = random(40, 6, 1, 1).numpy(), linear(random(5, 6))
    few, many = rate(made, z, 0.5), rate(made, np.tile(z, (1, 1, 8, 8)), 0.5)
    assert many.low == pytest.approx(64 * few.low, rel=1e-4) and many.high == pytest.approx(64 * few.high, rel=1e-4)
    assert few.high - few.low > 0.05 * few.mean


@steady
@given(
    alpha=st.floats(0, 0.999),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0, 1e4]),
    count=st.integers(2, 5),
    releases=st.integers(1, 64),
)
def test_the_rate_never_exceeds_the_capacity(alpha: float, seed: int, scale: float, count: int, releases: int) -> None:
    made, z = obfuscator(seed=seed), scale * random(count, 6, 2, 3, seed=seed).numpy()
    found, most = rate(made, z, alpha, releases=releases), capacity(made, alpha, 6, releases=releases)
    for value in (found.low, found.mean, found.high):
        assert -1e-9 <= value <= most * (1 + 1e-4) + 1e-6


def test_a_signal_always_at_its_bound_reaches_the_capacity_and_no_more() -> None:
    """Independent signs: E b = 0 and S = B^2 I, equality in Hadamard's inequality; few bits, where power decides."""
    made = linear(torch.eye(4), bound=2.0)
    z = 1e4 * np.array(np.meshgrid(*[[-1, 1]] * 4), np.float32).reshape(4, 16).T[:, :, None, None]
    assert rate(made, z, 0.3).mean == pytest.approx(capacity(made, 0.3, 1), rel=1e-5)


def test_vectors_and_tokens_have_a_rate_too() -> None:
    made, z = obfuscator(), random(9, 7, 6).numpy()
    folded = np.ascontiguousarray(z.transpose(0, 2, 1)[..., None])
    assert rate(made, z, 0.5).mean == pytest.approx(rate(made, folded, 0.5).mean)
    assert rate(made, z[:, 0], 0.5).mean < rate(made, z, 0.5).mean


# ---- Fisher


def exact(sender: Protected, record: Image, alpha: float) -> Tensor:
    """I = J^T J by the full Jacobian, in grey levels: x = (pixels - mean) / std."""
    task = sender.task
    assert isinstance(task, Classification)
    a = torch.tensor([alpha])

    def mean(x: Tensor) -> Tensor:
        z = sender.head(x[None])
        y: Tensor = sender.obfuscator(z, a, torch.zeros(1, SHAPE.k, *z.shape[2:]))
        return y.flatten()

    x = task.preprocess(record)
    j = torch.autograd.functional.jacobian(mean, x).flatten(1).double() / task.std
    matrix: Tensor = j.T @ j
    return matrix


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_trace_by_probes_is_the_jacobian_s(alpha: float) -> None:
    sender, seen = protected(), records(4)
    traces = [float(exact(sender, record, alpha).trace()) for record in seen]
    found = fisher(sender, seen, alpha, probes=300)
    want = math.sqrt(np.mean(traces) / (8 * 8 * 3))
    assert found.eta.mean == pytest.approx(want, rel=0.03)
    assert found.rmse.mean == pytest.approx(1 / want, rel=0.03)
    assert found.rmse.low <= found.rmse.mean <= found.rmse.high
    assert (found.eta.records, found.probes) == (4, 300)


def test_few_probes_are_right_on_average() -> None:
    sender, seen = protected(), records(2)
    want = np.mean([float(exact(sender, record, 0.5).trace()) for record in seen]) / 192
    squares = [fisher(sender, seen, 0.5, probes=1, seed=seed).eta.mean ** 2 for seed in range(150)]
    assert np.mean(squares) == pytest.approx(want, abs=4 * float(np.std(squares)) / math.sqrt(150))
    assert np.std(squares) > 0


def test_an_unbiased_attacker_reaches_the_bound_and_none_goes_below() -> None:
    """Least squares on y = J x + eps: with orthogonal columns of one length the bound is met, else it is exceeded."""
    draw = np.random.default_rng(0)
    for weight, equal in ((3 * torch.eye(4), True), (torch.diag(torch.tensor([1.0, 2, 4, 8])), False)):
        sender = Protected(nn.Identity(), linear(weight), Classification(std=10.0), "ab" * 32)
        shown = list(draw.integers(0, 256, (3, 2, 2, 4), np.uint8))
        bound = fisher(sender, shown, 0.5, probes=4).rmse.mean ** 2
        slope = gains(sender.obfuscator, 0.5) * np.diag(weight.numpy()) / 10
        error = float(np.mean((draw.standard_normal((20_000, 4)) / slope) ** 2))
        assert error == pytest.approx(bound, rel=0.03) if equal else error > 1.5 * bound


def test_the_unit_is_a_grey_level_whatever_the_preprocessing() -> None:
    """The same model behind another scale of its input."""

    class Rescaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = head()

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.inner((x * 2.0 + 60 - 100) / 40)
            return answer

    one = fisher(protected(), records(), 0.5)
    two = fisher(protected(Classification(mean=60.0, std=2.0), Rescaled()), records(), 0.5)
    assert two.rmse.mean == pytest.approx(one.rmse.mean, rel=1e-4)
    assert two.flat_rmse == pytest.approx(np.std(records()), rel=1e-4)


def test_modules_made_in_inference_mode_have_a_gradient_and_stay_as_they_are() -> None:
    with torch.inference_mode():
        sender = protected()
        assert next(sender.head.parameters()).is_inference()
        found = fisher(sender, records(), 0.5)
    assert found.rmse.mean == pytest.approx(fisher(protected(), records(), 0.5).rmse.mean, rel=1e-5)
    assert all(p.grad is None for p in sender.head.parameters())


def test_higher_alpha_means_a_larger_error() -> None:
    errors = [fisher(protected(), records(), alpha).rmse.mean for alpha in (0.1, 0.5, 0.9)]
    assert errors == sorted(errors) and errors[0] < errors[-1]


class Deaf(nn.Module):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 2, 1, 1)


@dataclass(frozen=True)
class Curved(Classification):
    def preprocess(self, record: Image) -> Tensor:
        return torch.from_numpy((record.astype(np.float32) / 255) ** 2.2).permute(2, 0, 1)


@dataclass(frozen=True)
class Blind(Classification):
    """The middle pixel does not reach the model at all."""

    def preprocess(self, record: Image) -> Tensor:
        x = super().preprocess(record)
        x[:, 4, 4] = 0
        return x


def test_what_has_no_bound_is_refused() -> None:
    with pytest.raises(RequestError, match="a head without a gradient"):
        fisher(protected(part=Deaf()), records(), 0.5)
    for task in (Curved(), Blind()):
        with pytest.raises(RequestError, match="not affine in pixels"):
            fisher(protected(task), records(), 0.5)
    with pytest.raises(RequestError, match="1 records"):
        fisher(protected(), records(1), 0.5)
    with pytest.raises(RequestError, match="0 probes"):
        fisher(protected(), records(), 0.5, probes=0)
    with pytest.raises(RequestError, match="1 records"):
        rate(obfuscator(), random(1, 6, 2, 2).numpy(), 0.5)


# ---- all of it


def test_a_certificate_holds_all_of_it() -> None:
    sender, seen = protected(), records(5, side=40)
    z = sender.cut(seen).half().numpy()
    made = certify(sender, seen, z, 0.6, probes=3)
    assert (made.alpha, made.sites, made.region_sites, made.repeats, made.probes) == (0.6, 100, 49, 64, 3)
    assert made.bits == capacity(sender.obfuscator, 0.6, 100) and made.region_bits == pytest.approx(0.49 * made.bits)
    assert made.repeated_bits == capacity(sender.obfuscator, 0.6, 100, releases=64) > made.bits
    assert made.rate == rate(sender.obfuscator, z, 0.6) and made.rate.high <= made.bits
    found = fisher(sender, seen, 0.6, probes=3)
    assert (made.eta, made.rmse, made.flat_rmse) == (found.eta, found.rmse, found.flat_rmse)
    small = certify(sender, records(), random(4, 6, 2, 2).numpy(), 0.6)
    assert small.region_sites == small.sites == 4
