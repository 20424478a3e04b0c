"""r = Phi^-1(Phi(lo) + U (Phi(hi) - Phi(lo))): the noise behind a code, N(0, 1) exactly if the noise source is honest.

lo, hi = (code -+ 1/2) step - g b are the ends between which eps lay, open where a code is clipped, and U is a uniform
draw of the attacker's own: r is eps drawn anew from what its code leaves possible. So rounding (step^2 / 12) and
saturation need no correction, and every bound below is exact or errs towards silence. Shapes: codes and r as a
release's tensor [N, k, h, w]: where blocks of sites are coded as one, a site here is a block and a channel one of its
coefficients.

Tried, and what honest noise gives: two releases of a record by two calls, and by one batch, Var(y1 - y2) / 2 = 1 and no
more identical codes than chance; Var r = 1 in every record and channel; slope of y on g b = 1; nothing at all in
channels without bits; no correlation between records, neighbouring sites or channels; copies of the sender and reset
seeds repeat nothing; alpha and bits are declared as asked. `caught` names the first that fails. Honest noise fails any
with a probability below ALARM, by these bounds, each with its share of ALARM (t nats):

    |cos(r, r')| <= sqrt(2 t / n)                                  Ball, Modern Convex Geometry (1997), lemma 2.2
    1 - 2 sqrt(t / n) <= |r|^2 / n <= 1 + 2 sqrt(t / n) + 2 t / n  Laurent and Massart, Ann. Statist. 28 (2000), lemma 1
    |sum r g b| / |g b| <= sqrt(2 t)                               a normal's tail
    |hits - sum p| <= t / 3 + sqrt(t^2 / 9 + 2 t sum p (1 - p))    Bernstein; p: the chance of a code to come again

Where a step is many deviations wide the noise hardly crosses the wire, and little can be seen of it: r then is mostly
the attacker's own draw. Honest means what the noise promises: fresh noise that repeats is caught, and keyed noise that
does not repeat for the same record, or does for another.

Needs: white box (g, b and step are computed), the same record twice, no training. Source of r: randomised quantile
residuals, Dunn and Smyth, J. Comput. Graph. Stat. 5 (1996).
"""

import math
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from sfumato.attack.base import Effort, Outcome, Prey, Releases, Tap, batches
from sfumato.core import channel
from sfumato.core.sites import fold
from sfumato.trusted.noise import Keyed
from sfumato.trusted.protect import Protected

RECORDS = 64
ALARM = 1e-6  # probability that honest noise is called a leak, all tests of one attack together
_TESTS = 11
_BATCH = 16
_OTHERS = tuple(i / 20 for i in range(20))  # alphas that a sender who ignores alpha may use instead: 0, .05, ... .95
_LEAST = 1e-300  # of a double's logarithm; a residual of 37 deviations is far enough


@dataclass(frozen=True, eq=False)
class Reading:
    """Releases as the white box reads them, [N, k, h, w] each: codes, g b, r, and p, the chance of this very code.

    Of the channels that carry bits; `stray` counts the codes [N] that are not 0 in the others.
    """

    codes: Tensor
    signal: Tensor
    noise: Tensor
    chance: Tensor
    alpha: Tensor
    bits: Tensor
    stray: Tensor


@dataclass(frozen=True)
class Reuse:
    """Looks for noise that is missing, weak, shared, repeated or predictable; finds nothing where it is honest."""

    name: str = "noise reuse"
    needs: str = "white box, two releases of one record"

    def missing(self, prey: Prey) -> str | None:
        have = len(prey.test) + len(prey.train)
        return None if have >= RECORDS else f"{have} records; clustering is looked for among {RECORDS}"

    def attack(self, prey: Prey, tap: Tap, effort: Effort) -> Outcome:
        """No training: the statistics of RECORDS records. No figures of a tap that is not `Releases`."""
        if not isinstance(tap, Releases):
            return Outcome(self.name, tap.name, tap.alpha, {})
        rows = np.concatenate([prey.test, prey.train])[:RECORDS]
        found = _Suspect(tap.protected, tap.alpha or 0.0, prey.cut(rows), np.random.default_rng([prey.seed, 1996]))
        figures, anchors = found.figures()
        return Outcome(self.name, tap.name, tap.alpha, figures, anchors, caught=found.verdict(figures))


def cosine(a: Tensor, b: Tensor) -> float:
    """a . b / |a| |b| over all elements."""
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(_LEAST))


def nats(many: int = 1) -> float:
    """t: each side of each of `many` comparisons keeps its share of ALARM."""
    return math.log(2 * many * _TESTS / ALARM)


def cosine_bound(size: int, many: int = 1) -> float:
    """What the largest of `many` |cosines| of `size` elements stays under."""
    return math.sqrt(2 * nats(many) / size)


def variance_bounds(size: int, many: int = 1) -> tuple[float, float]:
    """Between what the mean squares of `many` times `size` elements stay."""
    share = nats(many) / size
    return 1 - 2 * math.sqrt(share), 1 + 2 * math.sqrt(share) + 2 * share


def noise_of(codes: Tensor, signal: Tensor, step: Tensor, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """r and p of codes [N, k, h, w] with g b of that shape and step [N, k, 1, 1], all double."""
    at, half = codes.double() * step - signal, step / 2
    lo = torch.where(codes <= -channel.INT8_MAX, -torch.inf, at - half)
    hi = torch.where(codes >= channel.INT8_MAX, torch.inf, at + half)
    # On the far right Phi rounds to 1; mirrored to the left it keeps its digits.
    right = lo + hi > 0
    lo, hi = torch.where(right, -hi, lo), torch.where(right, -lo, hi)
    below, chance = torch.special.ndtr(lo), torch.special.ndtr(hi) - torch.special.ndtr(lo)
    uniform = torch.from_numpy(draw.random(tuple(codes.shape)))
    left = torch.special.ndtri((below + uniform * chance).clamp_min(_LEAST))
    return torch.where(right, -left, left), chance


@torch.inference_mode()
def read(protected: Protected, z: Tensor, alpha: float, draw: np.random.Generator) -> Reading:
    """One call of the sender, and what the white box makes of its release."""
    release = protected.obfuscate(z.to(protected.obfuscator.mean.device), alpha)
    codes, (signal, step) = release.tensor.cpu(), expected(protected, z, alpha)
    sent = carrying(protected, alpha)
    silent = torch.ones(codes.shape[1], dtype=torch.bool).index_fill_(0, sent, value=False)
    stray = codes[:, silent].ne(0).flatten(1).sum(1)
    codes, signal = codes[:, sent], signal[:, sent]
    noise, chance = noise_of(codes, signal, step[:, sent], draw)
    return Reading(codes, signal, noise, chance, release.alpha.cpu(), release.bits.cpu(), stray)


@torch.inference_mode()
def expected(protected: Protected, z: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """g b [N, k, h, w] and the step [N, k, 1, 1] at alpha, as anyone computes them who has the client's artefact."""
    obfuscator = protected.obfuscator
    sites, a = fold(z.to(obfuscator.mean.device)), channel.as_alpha(alpha, len(z), obfuscator.mean.device)
    silence = torch.zeros(len(z), *obfuscator.shape.codes(sites.shape[2:]), device=sites.device)
    return obfuscator(sites, a, silence).cpu().double(), obfuscator.allocation.steps(a).cpu().double()


def carrying(protected: Protected, alpha: float) -> Tensor:
    """Numbers of the channels that have bits at alpha."""
    obfuscator = protected.obfuscator
    return obfuscator.allocation.carrying(channel.as_alpha(alpha, 1, obfuscator.mean.device)).cpu()


def joined(readings: list[Reading]) -> Reading:
    """Several calls as one reading."""
    return Reading(*(torch.cat([getattr(r, name) for r in readings]) for name in Reading.__dataclass_fields__))


def copies(protected: Protected) -> Iterator[Protected]:
    """The sender as it is copied, in memory and by pickle; the models are shared, they draw nothing.

    A noise source that refuses cannot be copied by an attacker either.
    """
    models = (protected.head, protected.obfuscator, protected.outside, protected.reference)

    def in_memory() -> Protected:
        return deepcopy(protected, {id(model): model for model in models})

    def pickled() -> Protected:
        return protected.with_noise(pickle.loads(pickle.dumps(protected.noise)))

    for copied in (in_memory, in_memory, pickled, pickled):
        with suppress(TypeError, AttributeError, pickle.PicklingError):
            yield copied()


@contextmanager
def reset_seeds() -> Iterator[None]:
    """Every global generator starts from 0 inside, and goes on outside as if nothing had been."""
    numbers, own = np.random.get_state(), random.getstate()  # noqa: NPY002 - the global one on purpose
    with torch.random.fork_rng():
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        try:
            yield
        finally:
            np.random.set_state(numbers)  # noqa: NPY002
            random.setstate(own)


class _Suspect:
    """Everything asked of one sender at one alpha; `figures` first, then `verdict` on them."""

    def __init__(self, protected: Protected, alpha: float, z: Tensor, draw: np.random.Generator) -> None:
        self.protected, self.alpha, self.z, self.draw = protected, alpha, z, draw
        self.keyed = isinstance(protected.noise, Keyed)
        self.first, self.second = self._call(), self._call()
        some = z[:_BATCH]
        both = self._read(protected, torch.cat([some, some]))
        self.batch = [Reading(*(getattr(both, f).chunk(2)[i] for f in Reading.__dataclass_fields__)) for i in (0, 1)]
        self.copied = [self._read(copy, some) for copy in copies(protected)]
        self.seeded = [self._seeded(some) for _ in range(2)]

    def _read(self, protected: Protected, z: Tensor) -> Reading:
        return read(protected, z, self.alpha, self.draw)

    def _seeded(self, z: Tensor) -> Reading:
        with reset_seeds():
            return self._read(self.protected, z)

    def _call(self) -> Reading:
        return joined([self._read(self.protected, self.z[rows]) for rows in batches(np.arange(len(self.z)), _BATCH)])

    def figures(self) -> tuple[dict[str, float], dict[str, float]]:
        """What was measured, and what honest noise gives: its expectation; of a largest correlation, the bound."""
        found: dict[str, tuple[float, float]] = {}
        for name, (a, b) in {
            "two calls": (self.first, self.second),
            "one batch": (self.batch[0], self.batch[1]),
        }.items():
            by_chance = 1.0 if self.keyed else float(a.chance.mean())
            found[f"identical codes, {name}"] = _share(a.codes == b.codes), by_chance
            if not self.keyed:
                found[f"difference variance, {name}"] = float((a.noise - b.noise).square().mean()) / 2, 1.0
                found[f"correlation, {name}"] = cosine(a.noise, b.noise), 0.0
        r, signal = self.first.noise, self.first.signal
        found["noise variance"] = float(r.square().mean()), 1.0
        found["signal gain"] = 1 + float((r * signal).sum() / signal.square().sum().clamp_min(_LEAST)), 1.0
        found["correlation of records"] = self._largest_between_records(), cosine_bound(r[0].numel(), self._pairs)
        even, odd = _neighbours(r)
        found["correlation of sites"] = cosine(even, odd), 0.0
        found["correlation of channels"] = cosine(*_beside(r)), 0.0
        if not self.keyed:
            size = self.batch[0].noise.numel()
            found["correlation of copies"] = _largest(self.copied), cosine_bound(size, 6)
            found["correlation of reset seeds"] = _largest(self.seeded), cosine_bound(size)
        found["codes in channels without bits"] = float(self.first.stray.sum()), 0.0
        found["declared alpha"] = float(self.first.alpha.mean()), self.alpha
        found["declared bits"] = float(self.first.bits.mean()), self._bits
        return {k: v for k, (v, _) in found.items()}, {k: v for k, (_, v) in found.items()}

    def verdict(self, figures: dict[str, float]) -> str | None:
        """The first leak in an order in which none is taken for another: each test holds whatever a later one finds."""
        looks = [self._declared, self._sizes, self._stray]
        fresh = [self._repeated, self._clustered, self._state]
        for look in [*looks, self._unrepeated, self._clustered] if self.keyed else [*looks, *fresh]:
            if sentence := look(figures):
                return sentence
        return self._channels() or (None if self.keyed else self._identical())

    @property
    def _bits(self) -> float:
        # The release counts in float32, which close to alpha 1 is another alpha.
        withheld, places = float(np.float32(self.alpha)), self.first.codes.shape[2:].numel()
        shape = self.protected.obfuscator.shape
        return (1 - withheld) * shape.c_ref * shape.block**2 * places

    @property
    def _unlike(self) -> Tensor:
        """Noise of releases that should have nothing in common, [N, k, h, w]: of keyed noise one of each record."""
        return self.first.noise if self.keyed else torch.cat([self.first.noise, self.second.noise])

    @property
    def _pairs(self) -> int:
        many = len(self.z) if self.keyed else 2 * len(self.z)
        return many * (many - 1) // 2

    def _largest_between_records(self) -> float:
        r = self._unlike.flatten(1)
        r = r / r.norm(dim=1, keepdim=True).clamp_min(_LEAST)
        return float((r @ r.T).fill_diagonal_(0).abs().max())

    def _declared(self, figures: dict[str, float]) -> str | None:
        if not bool((self.first.alpha - self.alpha).abs().max() <= 1e-6):
            said = figures["declared alpha"]
            return f"Alpha is ignored: alpha {self.alpha:g} was asked for, the releases were drawn at {said:g}."
        if not bool((self.first.bits / self._bits - 1).abs().max() <= 1e-4):
            said = figures["declared bits"]
            return f"The capacity is declared wrongly: {said:g} bits a record where alpha leaves {self._bits:g}."
        return None

    def _sizes(self, figures: dict[str, float]) -> str | None:
        # By record, and so true even of records that share their noise.
        gain, variance = _gain_is_off(self.first.noise, self.first.signal), _of_records(self.first.noise)
        if not gain and variance is None:
            return None
        times = f"The gain is wrong: the signal arrives {figures['signal gain']:.3g} times as large as it should."
        return self._of_another_alpha() or (times if gain else variance)

    def _stray(self, figures: dict[str, float]) -> str | None:
        codes = figures["codes in channels without bits"]
        return f"Channels without bits are not empty: {codes:.0f} codes of them are sent." if codes else None

    def _of_another_alpha(self) -> str | None:
        """That sizes are off is certain by now: are they right for another alpha?"""
        rows = list(batches(np.arange(len(self.z)), _BATCH))
        sent = carrying(self.protected, self.alpha)
        for alpha in _OTHERS:
            signal, step = (
                torch.cat(parts)[:, sent]
                for parts in zip(*(expected(self.protected, self.z[part], alpha) for part in rows), strict=True)
            )
            both = torch.isin(sent, carrying(self.protected, alpha))
            r, _ = noise_of(self.first.codes[:, both], signal[:, both], step[:, both], self.draw)
            signal = signal[:, both]
            if not _gain_is_off(r, signal) and _of_records(r) is None:
                return f"Alpha is ignored: the releases are drawn as at alpha {alpha:g}, not {self.alpha:g}."
        return None

    def _unrepeated(self, figures: dict[str, float]) -> str | None:
        same = min(figures["identical codes, two calls"], figures["identical codes, one batch"])
        if same < 1:
            return f"Keyed noise does not repeat: of two releases of one record {same:.1%} of the codes are the same."
        return None

    def _repeated(self, figures: dict[str, float]) -> str | None:
        calls, batch = abs(figures["correlation, two calls"]), abs(figures["correlation, one batch"])
        if batch > cosine_bound(self.batch[0].noise.numel()):
            # Where a batch shares, it has fewer elements than `calls` counts, which then is measured by `batch`.
            alone = "The records of a batch share one noise sample."
            return "One noise sample serves every record of every call." if calls > batch / 2 else alone
        if calls > cosine_bound(self.first.noise.numel()):
            return "The noise of one call comes again with the next: its seed or state is fixed."
        return None

    def _clustered(self, figures: dict[str, float]) -> str | None:
        # First: noise shared within a record leaves it fewer elements than the next bound counts.
        even, _ = _beside(self.first.noise)
        if even.numel() and abs(across := figures["correlation of channels"]) > cosine_bound(even.numel()):
            return f"Noise is shared between channels: they are correlated by {across:.2g}."
        size, most = self.first.noise[0].numel(), figures["correlation of records"]
        if most > cosine_bound(size, self._pairs):
            return f"Noise is shared between some records: two residuals are correlated by {most:.2g}."
        even, _ = _neighbours(self.first.noise)
        if even.numel() and abs(along := figures["correlation of sites"]) > cosine_bound(even.numel()):
            return f"Noise is shared between neighbouring sites: they are correlated by {along:.2g}."
        return None

    def _state(self, figures: dict[str, float]) -> str | None:
        size = self.batch[0].noise.numel()
        if figures["correlation of reset seeds"] > cosine_bound(size):
            return "The noise follows a global seed: whoever resets it draws the same noise again."
        if figures["correlation of copies"] > cosine_bound(size, 6):
            return "Copies of the sender draw the same noise: its generator has a state that can be copied."
        return None

    def _channels(self) -> str | None:
        r = self._unlike.transpose(0, 1).flatten(1)
        return _of_variance(r.square().mean(1), r.shape[1], "a channel")

    def _identical(self) -> str | None:
        p, t = self.first.chance, nats()
        excess = float((self.first.codes == self.second.codes).sum() - p.sum())
        if abs(excess) <= t / 3 + math.sqrt(t**2 / 9 + 2 * t * float((p * (1 - p)).sum())):
            return None
        return f"Codes of one record come again {'more' if excess > 0 else 'less'} often than fresh noise lets them."


def _gain_is_off(r: Tensor, signal: Tensor) -> bool:
    """Whether r of any record goes along with its g b; an r larger than unit noise is first brought to its size."""
    r, signal = r.flatten(1), signal.flatten(1)
    r = r / r.square().mean(1, keepdim=True).clamp_min(1).sqrt()
    score = (r * signal).sum(1) / signal.norm(dim=1).clamp_min(_LEAST)
    return float(score.abs().max()) > math.sqrt(2 * nats(len(r)))


def _of_records(r: Tensor) -> str | None:
    return _of_variance(r.flatten(1).square().mean(1), r[0].numel(), "a record")


def _of_variance(values: Tensor, size: int, where: str) -> str | None:
    low, high = variance_bounds(size, len(values))
    if float(values.min()) < low:
        return f"Noise is off or too weak: in {where} it has {float(values.min()):.2g} of its variance."
    if float(values.max()) > high:
        return f"Noise is too strong, or not alone: in {where} it has {float(values.max()):.3g} times its variance."
    return None


def _share(same: Tensor) -> float:
    return float(same.double().mean())


def _neighbours(r: Tensor) -> tuple[Tensor, Tensor]:
    """Sites 0, 2, 4, ... and 1, 3, 5, ...: pairs that share no site, so that their cosine keeps the bound."""
    sites = r.flatten(2)
    even = sites[:, :, : sites.shape[2] // 2 * 2]
    return even[:, :, 0::2], even[:, :, 1::2]


def _beside(r: Tensor) -> tuple[Tensor, Tensor]:
    """Channels 0, 2, 4, ... and 1, 3, 5, ..., likewise."""
    even = r[:, : r.shape[1] // 2 * 2]
    return even[:, 0::2], even[:, 1::2]


def _largest(readings: list[Reading]) -> float:
    return max((abs(cosine(a.noise, b.noise)) for a, b in combinations(readings, 2)), default=0.0)
