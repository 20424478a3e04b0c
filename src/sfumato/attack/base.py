"""What an attacker is given and what it must answer: prey, a tap on the wire, an effort; an outcome with figures.

Every attacker is adaptive: it trains from scratch, after the obfuscator is frozen, on what the tap yields at the very
alpha under attack, and knows everything but keys and noise. It is scored on records, and where there are people on
people, that it never saw. `register` adds one's own attacker to every audit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sfumato.core import channel
from sfumato.core.sites import fold
from sfumato.trusted.noise import Fresh, Keyed
from sfumato.trusted.protect import Protected

# An attacker had converged if its last quarter of training added no more than a tenth of what it has over no
# information, or no more than this.
STILL = {"psnr": 0.05, "auc": 0.005}


class Tap(Protocol):
    """What an attacker sees of records: clean head outputs go in, only what crosses the wire comes out."""

    @property
    def name(self) -> str:
        """Ours, or the baseline's."""
        ...

    @property
    def alpha(self) -> float | None:
        """The alpha under attack; None for a baseline without one."""
        ...

    def see(self, z: Tensor) -> Tensor:
        """Head outputs [N, C, h, w] -> features [N, c, h, w], with fresh noise at every call."""
        ...

    def expected(self, z: Tensor) -> Tensor:
        """The mean of `see` over the noise, differentiable: what a white-box attacker can compute of a guess."""
        ...


@dataclass(frozen=True)
class Clean:
    """No protection: the head's output itself."""

    name: str = "clean head output"
    alpha: float | None = None
    strength: float = 0.0  # of what was done to the picture before

    def see(self, z: Tensor) -> Tensor:
        return z

    def expected(self, z: Tensor) -> Tensor:
        return z


@dataclass(frozen=True)
class Releases:
    """Our releases at `alpha`, as linear estimates of each site; of the mean of `repeats`, each with fresh noise.

    Of several under fresh noise the attacker is given the mean of y before the wire's rounding, the sufficient
    statistic: more than it could have. Under keyed noise they are real releases, one by one.
    """

    protected: Protected
    alpha: float
    repeats: int = 1

    @property
    def name(self) -> str:
        return "sfumato" if self.repeats == 1 else f"sfumato, mean of {self.repeats} releases"

    def see(self, z: Tensor) -> Tensor:
        return self._estimate(self.observed(z), fold(z)).cpu()

    def expected(self, z: Tensor) -> Tensor:
        return self._estimate(self.mean(z), fold(z))

    @torch.inference_mode()
    def observed(self, z: Tensor) -> Tensor:
        """y itself, [N, k s^2, H, W]: its noise is white, of variance 1 / repeats."""
        obfuscator = self.protected.obfuscator
        sites = fold(z).to(obfuscator.mean.device)
        a = channel.as_alpha(self.alpha, len(sites), sites.device)
        noise = self.protected.noise
        if self.repeats == 1 or isinstance(noise, Keyed):
            codes = [self.protected.obfuscate(sites, a).tensor for _ in range(self.repeats)]
            y: Tensor = torch.stack(codes).float().mean(0) * obfuscator.allocation.steps(a)
            return y
        channels, high, wide = obfuscator.shape.codes(sites.shape[2:])
        sent = obfuscator.allocation.carrying(a)
        total = torch.zeros(len(z), high, wide, len(sent))
        for _ in range(self.repeats):
            total += noise.normals(len(z), tuple(total.shape[1:]))
        mean = torch.zeros(len(z), channels, high, wide, device=sites.device)
        mean[:, sent] = (total / self.repeats).permute(0, 3, 1, 2).to(sites.device)
        y = obfuscator(sites, a, mean)
        return y

    def mean(self, z: Tensor) -> Tensor:
        """The mean of `observed` over the noise, differentiable."""
        obfuscator, sites = self.protected.obfuscator, fold(z)
        a = channel.as_alpha(self.alpha, len(z), z.device)
        y: Tensor = obfuscator(sites, a, sites.new_zeros(len(sites), *obfuscator.shape.codes(sites.shape[2:])))
        return y

    def _estimate(self, y: Tensor, sites: Tensor) -> Tensor:
        a = channel.as_alpha(self.alpha, len(y), y.device)
        size = (sites.shape[2], sites.shape[3])
        # Keyed releases of one record are one: their mean has all of its noise.
        worth = 1 if isinstance(self.protected.noise, Keyed) else self.repeats
        return self.protected.obfuscator.estimate(y, a, size, releases=worth)


@dataclass(frozen=True, eq=False)
class Prey:
    """Records under attack: z [n, C, h, w] float16, pictures [n, P, P, 3] uint8 BGR, who is shown, and the split.

    `people` [n] numbers the persons, or is None where nothing says who is who. Nobody is in both `train` and `test`.
    """

    z: np.ndarray
    pictures: np.ndarray
    people: np.ndarray | None
    train: np.ndarray
    test: np.ndarray
    seed: int = 0
    attributes: dict[str, np.ndarray] = field(default_factory=dict)
    ndim: int = 4  # of the tensor that was cut
    mirrored: int = 0  # of the last rows, all of them to train on: mirror images of rows before them

    def cut(self, rows: np.ndarray) -> Tensor:
        """Head outputs of `rows`, float32, channels-last."""
        return torch.from_numpy(self.z[rows].astype(np.float32)).to(memory_format=torch.channels_last)

    def shown(self, rows: np.ndarray) -> Tensor:
        """Pictures of `rows` as [n, 3, P, P] in 0..1."""
        return torch.from_numpy(self.pictures[rows]).permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class Effort:
    """How hard an attacker tries: steps and records a step of its training, and the records it is scored on."""

    steps: int
    batch: int = 16
    tested: int = 400
    quiet: bool = False


QUICK = Effort(steps=150, batch=12, tested=200)
FULL = Effort(steps=400, tested=900)


@dataclass(frozen=True)
class Outcome:
    """What one attacker reached through one tap; `figures` are named, `curve` shows whether it had converged."""

    attacker: str
    tap: str
    alpha: float | None
    figures: dict[str, float]
    anchors: dict[str, float] = field(default_factory=dict)
    curve: list[float] = field(default_factory=list)
    caught: str | None = None
    pictures: np.ndarray | None = None

    @property
    def converged(self) -> bool | None:
        """Whether training had stopped to pay; None without a curve. `curve` is of the first of STILL in `anchors`."""
        known = [name for name in STILL if name in self.anchors]
        if len(self.curve) < 4 or not known:
            return None
        quarter = len(self.curve) // 4
        late, before = float(np.mean(self.curve[-quarter:])), float(np.mean(self.curve[-2 * quarter : -quarter]))
        return late - before <= max(STILL[known[0]], 0.1 * abs(late - self.anchors[known[0]]))


class Attacker(Protocol):
    """One attack. `needs` says in words what it must have: white box, pairs, queries."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> str: ...

    def missing(self, prey: Prey) -> str | None:
        """Why it cannot run on this prey, or None."""
        ...

    def attack(self, prey: Prey, tap: Tap, effort: Effort) -> Outcome:
        """Train, then score on `prey.test`."""
        ...


_REGISTRY: dict[str, Attacker] = {}


def register(attacker: Attacker) -> None:
    """Add an attacker to every audit from here on; one of the same name, ours too, is replaced."""
    _REGISTRY[attacker.name] = attacker


def with_registered(ours: Sequence[Attacker]) -> list[Attacker]:
    """Ours and the user's, one of a name."""
    return list(({attacker.name: attacker for attacker in ours} | _REGISTRY).values())


def held_out(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training rows -> (held out to judge an attacker by while it trains: a fifth, at most 64; the rest)."""
    count = min(64, len(rows) // 5)
    return rows[:count], rows[count:]


def standardised(tap: Tap, prey: Prey, rows: np.ndarray) -> Callable[[Tensor], Tensor]:
    """The tap with each of its channels brought to mean 0 and deviation 1, by what it shows of some training rows."""
    seen = tap.see(prey.cut(rows[:64])).transpose(0, 1).flatten(1)
    mean, std = seen.mean(1)[:, None, None], seen.std(1).clamp_min(1e-6)[:, None, None]
    return lambda z: ((tap.see(z) - mean) / std).clone()


def learnable(tap: Tap) -> Tap:
    """What an attacker can make as much of as he likes: without the tenant's key, releases under fresh noise."""
    if isinstance(tap, Releases) and isinstance(tap.protected.noise, Keyed):
        return replace(tap, protected=tap.protected.with_noise(Fresh()), repeats=1)
    return tap


def batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """`rows` in order, `size` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def divided(people: Sequence[int] | np.ndarray | None, records: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train and to test on, seven to three; by person where people are known, so that none is in both."""
    draw = np.random.default_rng([seed, 4928])
    owner = np.arange(records) if people is None else np.asarray(people)
    order = draw.permutation(np.unique(owner))
    apart = np.isin(owner, order[: round(0.3 * len(order))])
    return np.flatnonzero(~apart), np.flatnonzero(apart)
