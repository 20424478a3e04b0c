"""Honest noise is never called a leak; every leak planted in the noise, the gain or the declaration is, by its name."""

import math
import random as python_random
import re
import threading
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from sfumato.attack import reuse
from sfumato.attack.base import QUICK, Attacker, Clean, Outcome, Prey, Releases
from sfumato.attack.reuse import Reuse
from sfumato.core import channel
from sfumato.core.obfuscator import Obfuscator, Shape
from sfumato.core.release import Release
from sfumato.tasks.classification import Classification
from sfumato.trusted.noise import Fresh, Keyed, OfRecord
from sfumato.trusted.protect import Noise, Protected

SHAPE = Shape(channels=6, k=5, context=4)
ALPHAS = (0.0, 0.5, 0.8, 0.95)
EXTREME = 0.9999


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def obfuscator(shape: Shape = SHAPE) -> Obfuscator:
    """Learned-like; its last channel has no bits at high alpha."""
    made = Obfuscator(shape).eval().requires_grad_(False)
    for number, tensor in enumerate(made.state_dict().values()):
        tensor.copy_(0.5 * random(*tensor.shape, seed=number))
    made.std.abs_().add_(0.1)
    made.allocation.w[-1] = -4.0
    return made


def protected(noise: Noise | Keyed | None = None, kind: type[Protected] = Protected) -> Protected:
    return kind(nn.Identity(), obfuscator(), Classification(), "ab" * 32, noise=noise)


def prey(records: int = 80, side: int = 8, seed: int = 0) -> Prey:
    z = random(records, 6, side, side, seed=100 + seed).numpy().astype(np.float16)
    pictures, rows = np.zeros((records, 16, 16, 3), np.uint8), np.arange(records)
    return Prey(z, pictures, None, rows[: records // 2], rows[records // 2 :], seed)


def outcome(sender: Protected, alpha: float = 0.8, seed: int = 0) -> Outcome:
    return Reuse().attack(prey(seed=seed), Releases(sender, alpha), QUICK)


class Off:
    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(records, *shape)


class Weak:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        return self.scale * Fresh().normals(records, shape)


class OnePerBatch:
    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        return Fresh().normals(1, shape).expand(records, *shape)


class OnePerPair:
    """Only neighbours in a batch share: the twins, half a batch apart, do not."""

    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        return Fresh().normals(-(-records // 2), shape).repeat_interleave(2, 0)[:records]


class FixedSeed:
    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(records, *shape, generator=torch.Generator().manual_seed(7))


class OneForAll:
    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        return random(*shape, seed=7).expand(records, *shape)


class GlobalTorch:
    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(records, *shape)


class GlobalNumpy:
    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(np.random.standard_normal((records, *shape))).float()  # noqa: NPY002


class Stateful:
    def __init__(self) -> None:
        self.draw = np.random.default_rng(7)

    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(self.draw.standard_normal((records, *shape), dtype=np.float32))


class Smooth:
    """Each site draws half of its noise's variance from the site before it."""

    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        eps = Fresh().normals(records, shape)
        return (eps + eps.roll(1, 2)) / math.sqrt(2)


class Broadcast:
    """One sample for every two channels of a site: shape is (h, w, channels)."""

    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        drawn = Fresh().normals(records, shape)
        drawn[..., 1::2] = drawn[..., : shape[-1] // 2 * 2 : 2]
        return drawn


class MagnitudesRepeat:
    """In a quarter of the rows; signs are fresh, so nothing is correlated, and yet half of their codes come again."""

    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        eps = Fresh().normals(records, shape)
        eps[:, ::4] = FixedSeed().normals(records, shape)[:, ::4].abs() * eps[:, ::4].sign()
        return eps


class PicklesItsState(Stateful):
    """Refuses to be copied in memory."""

    def __deepcopy__(self, memo: object) -> "PicklesItsState":
        raise TypeError


class Stray(Protected):
    """The channel without bits carries a picture nobody counts."""

    def obfuscate(self, z: Tensor, alpha: channel.Alpha = 0.8, **rest: Any) -> Release:
        honest = super().obfuscate(z, alpha)
        honest.tensor[:, -1] = z[:, 0].mul(20).clamp(-127, 127).to(torch.int8)
        return honest


class SilentChannel:
    """One channel that is sent carries no noise."""

    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        eps = Fresh().normals(records, shape)
        eps[..., -1] = 0
        return eps


class AlphaIgnored(Protected):
    """And says so."""

    def obfuscate(self, z: Tensor, alpha: channel.Alpha = 0.8, **rest: Any) -> Release:
        return super().obfuscate(z, 0.0)


class AlphaIgnoredInSilence(Protected):
    def obfuscate(self, z: Tensor, alpha: channel.Alpha = 0.8, **rest: Any) -> Release:
        honest, zero = super().obfuscate(z, alpha), super().obfuscate(z, 0.0)
        return Release(zero.tensor, honest.alpha, honest.digest, honest.bits)


class GainTooLarge(Protected):
    def obfuscate(self, z: Tensor, alpha: channel.Alpha = 0.8, **rest: Any) -> Release:
        honest, a = super().obfuscate(z, alpha), torch.full((len(z),), float(str(alpha)))
        eps = Fresh().normals(len(z), (*z.shape[2:], SHAPE.k)).permute(0, 3, 1, 2)
        more = eps + 0.5 * self.obfuscator(z, a, torch.zeros_like(eps))
        return Release(self.obfuscator.codes(z, a, more), honest.alpha, honest.digest, honest.bits)


class BitsUnderstated(Protected):
    def obfuscate(self, z: Tensor, alpha: channel.Alpha = 0.8, **rest: Any) -> Release:
        honest = super().obfuscate(z, alpha)
        return Release(honest.tensor, honest.alpha, honest.digest, honest.bits / 2)


def test_it_is_an_attacker() -> None:
    attacker: Attacker = Reuse()
    assert (attacker.name, attacker.needs) == ("noise reuse", "white box, two releases of one record")
    assert attacker.missing(prey()) is None
    assert "12 records" in str(attacker.missing(prey(12)))


@pytest.mark.parametrize("alpha", [*ALPHAS, EXTREME])
def test_honest_noise_is_not_caught(alpha: float) -> None:
    sender = protected()
    carrying = len(sender.obfuscator.allocation.carrying(torch.tensor([alpha])))
    wide = max(0.1, 5 * math.sqrt(2 / (16 * 64 * carrying)))  # deviations of the least sample's variance, a batch of 16
    for seed in range(5):
        found = outcome(sender, alpha, seed)
        assert found.caught is None, found.caught
        assert found.figures.keys() == found.anchors.keys()
        for name in ("difference variance, two calls", "difference variance, one batch", "noise variance"):
            assert found.figures[name] == pytest.approx(found.anchors[name], abs=wide), name
        for name in ("identical codes, two calls", "identical codes, one batch"):
            assert found.figures[name] == pytest.approx(found.anchors[name], abs=0.03), name
        assert found.figures["signal gain"] == pytest.approx(1, abs=0.1) or alpha == EXTREME  # next to no signal
        assert found.figures["declared bits"] == pytest.approx((1 - alpha) * SHAPE.c_ref * 64, rel=1e-3)


@pytest.mark.parametrize("alpha", ALPHAS[1:])
@pytest.mark.parametrize(
    ("noise", "sentence"),
    [
        (Off(), "Noise is off or too weak: in a record it has 0"),
        # Where steps are wide, codes under weak noise come again; whichever is certain first is said.
        (Weak(0.5), r"Noise is off or too weak: in a (record|channel) it has 0\.[1-4]|The noise of one call"),
        (Weak(2.0), "Noise is too strong"),
        (OnePerBatch(), "The records of a batch share one noise sample"),
        (OnePerPair(), "Noise is shared between some records"),
        (FixedSeed(), "The noise of one call comes again with the next: its seed or state is fixed"),
        (OneForAll(), "One noise sample serves every record of every call"),
        (GlobalTorch(), "The noise follows a global seed"),
        (GlobalNumpy(), "The noise follows a global seed"),
        (Stateful(), "Copies of the sender draw the same noise"),
        (PicklesItsState(), "Copies of the sender draw the same noise"),
        (Smooth(), "Noise is shared between neighbouring sites"),
        (Broadcast(), "Noise is shared between channels"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_leak_in_the_noise_is_caught_by_its_name(noise: Noise, sentence: str, alpha: float) -> None:
    found = outcome(protected(noise), alpha)
    assert found.caught is not None and re.match(sentence, found.caught), found.caught


@pytest.mark.parametrize("alpha", ALPHAS[1:])
@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (AlphaIgnored, "Alpha is ignored: alpha"),
        (AlphaIgnoredInSilence, "Alpha is ignored: the releases are drawn as at alpha 0, not"),
        (GainTooLarge, "The gain is wrong: the signal arrives 1."),
        (BitsUnderstated, "The capacity is declared wrongly"),
    ],
)
def test_a_leak_in_the_sender_is_caught_by_its_name(kind: type[Protected], sentence: str, alpha: float) -> None:
    found = outcome(protected(kind=kind), alpha)
    assert found.caught is not None and found.caught.startswith(sentence), found.caught


def test_a_channel_without_noise_is_found() -> None:
    caught = outcome(protected(SilentChannel())).caught
    assert caught is not None and caught.startswith("Noise is off or too weak: in a channel"), caught


def test_a_channel_without_bits_must_be_empty() -> None:
    made = protected(kind=Stray)
    assert float(made.obfuscator.allocation(torch.tensor([0.8]))[0, -1]) == 0
    caught = outcome(made).caught
    assert caught is not None and caught.startswith("Channels without bits are not empty: "), caught


def test_where_the_step_is_wide_and_codes_saturate_the_noise_read_is_still_normal() -> None:
    draw = np.random.default_rng(0)
    signal = torch.from_numpy(draw.uniform(-12, 12, (1, 2, 200, 100)))
    step = torch.tensor([0.04, 5.0], dtype=torch.float64)[None, :, None, None]
    y = signal + torch.from_numpy(draw.standard_normal(signal.shape))
    codes = (y / step).round().clamp(-127, 127).to(torch.int8)
    assert 0.1 < float((codes[:, 0].abs() == 127).double().mean()) < 0.9
    r, chance = reuse.noise_of(codes, signal, step, draw)
    assert stats.kstest(r[0, 0].ravel().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(r[0, 1].ravel().numpy(), "norm").pvalue > 1e-3
    at = step * codes.double() - signal
    inside = codes.abs() < 127
    want = stats.norm.cdf((at + step / 2).numpy()) - stats.norm.cdf((at - step / 2).numpy())
    np.testing.assert_allclose(chance.numpy()[inside], want[inside], atol=1e-12)
    again = (torch.from_numpy(draw.standard_normal(signal.shape)) + signal) / step
    hits = again.round().clamp(-127, 127) == codes
    assert float(hits.double().mean()) == pytest.approx(float(chance.mean()), abs=0.01)


def test_noise_that_is_too_strong_is_not_taken_for_a_gain_and_a_gain_is() -> None:
    signal, r = random(2000, 1, 10, 10, seed=1), random(2000, 1, 10, 10, seed=2)
    assert not reuse._gain_is_off(r, signal) and not reuse._gain_is_off(3 * r, signal)
    assert reuse._gain_is_off(r + signal, signal) and reuse._gain_is_off(r - 3 * signal, signal)


@pytest.mark.parametrize("alpha", [0.8, 0.95])
def test_codes_that_come_again_without_a_correlation_are_caught_too(alpha: float) -> None:
    caught = outcome(protected(MagnitudesRepeat()), alpha).caught
    assert caught == "Codes of one record come again more often than fresh noise lets them."


@pytest.mark.parametrize("offset", [-1e6, -50.0, 50.0, 1e6])
def test_a_code_that_honest_noise_cannot_give_is_read_as_far_away(offset: float) -> None:
    step, draw = torch.full((1, 1, 1, 1), 0.1, dtype=torch.float64), np.random.default_rng(0)
    r, _ = reuse.noise_of(
        torch.zeros(1, 1, 1, 1, dtype=torch.int8), torch.full((1, 1, 1, 1), offset).double(), step, draw
    )
    assert math.isfinite(float(r)) and float(r) * offset < 0 and abs(float(r)) > 30


def test_bounds_hold_where_the_distribution_is_known() -> None:
    """Each is at or beyond the exact quantile, and not far beyond where there are many elements."""
    share = math.exp(-reuse.nats())  # of one side
    for size in (5, 50, 5000):
        exact = math.sqrt(stats.beta.isf(2 * share, 0.5, (size - 1) / 2))
        assert exact <= reuse.cosine_bound(size) and (size < 50 or reuse.cosine_bound(size) < 1.3 * exact)
        low, high = reuse.variance_bounds(size)
        assert low <= stats.chi2.ppf(share, size) / size and stats.chi2.isf(share, size) / size <= high
    assert stats.norm.isf(share) < math.sqrt(2 * reuse.nats()) < 1.2 * stats.norm.isf(share)


def test_global_generators_go_on_as_if_nothing_had_been() -> None:
    sender = protected()
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    python_random.seed(3)
    want = torch.rand(4), np.random.rand(4), python_random.random()  # noqa: NPY002
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    python_random.seed(3)
    outcome(sender)
    assert torch.equal(torch.rand(4), want[0])
    np.testing.assert_array_equal(np.random.rand(4), want[1])  # noqa: NPY002
    assert python_random.random() == want[2]


def test_a_source_that_cannot_be_copied_is_no_leak() -> None:
    class Locked(Fresh):
        def __init__(self) -> None:
            self.lock = threading.Lock()

    assert list(reuse.copies(protected(Locked()))) == []
    assert len(list(reuse.copies(protected()))) == 4
    assert outcome(protected(Locked())).caught is None


def test_copies_share_the_models_and_not_the_noise() -> None:
    made = protected(Stateful())
    for copy in reuse.copies(made):
        assert copy.head is made.head and copy.obfuscator is made.obfuscator and copy.noise is not made.noise


def test_it_has_nothing_to_say_of_other_taps() -> None:
    assert Reuse().attack(prey(), Clean(), QUICK) == Outcome("noise reuse", "clean head output", None, {})


def test_vectors_work_too() -> None:
    """One site a record: too few elements for a verdict by record, enough over all of them."""
    tap = Releases(protected(), 0.8)
    assert Reuse().attack(prey(side=1), tap, QUICK).caught is None
    for noise in (Off(), OnePerBatch(), FixedSeed(), OneForAll()):
        assert Reuse().attack(prey(side=1), Releases(protected(noise), 0.8), QUICK).caught is not None


KEY = bytes(range(32))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_keyed_noise_that_keeps_its_promise_is_not_caught(alpha: float) -> None:
    found = outcome(protected(Keyed(KEY)), alpha)
    assert found.caught is None, found.caught
    assert found.figures["identical codes, two calls"] == 1 == found.anchors["identical codes, two calls"]
    assert "correlation of copies" not in found.figures and found.figures.keys() == found.anchors.keys()


class Forgetful(Keyed):
    """Another epoch at every call."""

    def of(self, one: NDArray[np.generic], artefact: str, alpha: float, way: str = "") -> OfRecord:
        self.epoch += 1
        return super().of(one, artefact, alpha, way)


class Careless(Keyed):
    """The same noise whatever the record is."""

    def of(self, one: NDArray[np.generic], artefact: str, alpha: float, way: str = "") -> OfRecord:
        return super().of(np.zeros(1), artefact, alpha, way)


@pytest.mark.parametrize(
    ("noise", "sentence"),
    [(Forgetful(KEY), "Keyed noise does not repeat: of two"), (Careless(KEY), "Noise is shared between")],
)
def test_keyed_noise_that_breaks_its_promise_is_caught(noise: Keyed, sentence: str) -> None:
    caught = outcome(protected(noise)).caught
    assert caught is not None and caught.startswith(sentence), caught
