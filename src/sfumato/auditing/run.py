"""One audit: every attacker through every tap, certificates beside them, a verdict for each alpha.

Attackers train on releases at the very alpha under audit, so nothing is shared between two alphas. What is done is kept
in `work` and not done again after a kill. Utility is label-free: how well the decisions through a tap agree with the
clean model's on the test records (`Task.agreement`).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sfumato import __version__, attack
from sfumato.attack.attributes import Probes
from sfumato.attack.averaging import Averaging
from sfumato.attack.base import (
    FULL,
    QUICK,
    Attacker,
    Clean,
    Effort,
    Outcome,
    Prey,
    Releases,
    Tap,
    batches,
    with_registered,
)  # fmt: skip
from sfumato.attack.baselines import PlainNoise, blurred, pixelated
from sfumato.attack.battery import Battery
from sfumato.attack.identity import Linkage
from sfumato.attack.inversion import Inversion
from sfumato.attack.recogniser import Recogniser
from sfumato.attack.reconstruction import LARGE, SMALL, Reconstruction
from sfumato.attack.reuse import Reuse
from sfumato.auditing import prey as records
from sfumato.auditing.certificate import Certificate, certify
from sfumato.auditing.verdict import LIMITS, Verdict, verdict, weak, worst
from sfumato.core.digest import digest_of
from sfumato.core.display import table
from sfumato.core.errors import RequestError
from sfumato.core.files import write_bytes
from sfumato.core.sites import unfold
from sfumato.core.task import Image
from sfumato.trusted.protect import Protected

SIZE = 512  # side of the input: a photograph of one person shows the face at about 220 pixels
TESTED = 200  # records that utility is measured on
_BISECTIONS = 7


@dataclass(frozen=True)
class Budget:
    """How much of everything."""

    name: str
    effort: Effort
    records: int | None
    repeats: tuple[int, ...]
    baselines: bool
    certified: int


QUICKLY = Budget("quick", QUICK, 1000, (16,), False, 8)
FULLY = Budget("full", FULL, None, (1, 4, 16, 64), True, 32)
BUDGETS = {budget.name: budget for budget in (QUICKLY, FULLY)}


@dataclass
class Audit:
    """All outcomes, with the conditions they were got under."""

    conditions: dict[str, Any]
    alphas: tuple[float, ...]
    outcomes: list[Outcome] = field(default_factory=list)
    utility: dict[str, float] = field(default_factory=dict)
    certificates: list[Certificate] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)

    def against(self, alpha: float) -> list[Outcome]:
        """Outcomes against our single releases at alpha."""
        return [o for o in self.outcomes if o.tap == "sfumato" and o.alpha == alpha]

    @property
    def clean(self) -> list[Outcome]:
        """Outcomes against clean head outputs: the control."""
        return [o for o in self.outcomes if o.tap == Clean().name]

    def compared(self, alpha: float) -> dict[str, dict[str, float]]:
        """Best attacker's figures through ours and through every baseline of this alpha, by the same attackers."""
        taps = dict.fromkeys(o.tap for o in self.outcomes if o.alpha == alpha and o.tap != Clean().name)
        common = {o.attacker for o in self.outcomes if o.alpha == alpha and o.tap in taps and o.tap != "sfumato"}
        rows = {tap: [o for o in self.outcomes if (o.tap, o.alpha) == (tap, alpha)] for tap in taps}
        found = {tap: worst([o for o in outcomes if o.attacker in common]) for tap, outcomes in rows.items()}
        return found if len(found) > 1 else {}

    def verdict(self, alpha: float) -> Verdict:
        """Raises RequestError for an alpha that was not audited."""
        return verdict(self.against(alpha), self.clean, self.limits)

    def above(self, limits: dict[str, float]) -> list[str]:
        """Sentences for every limit that an attacker passed, or that nobody measured, at any alpha."""
        found = []
        for alpha in self.alphas:
            most = worst(self.against(alpha))
            passed = [short for short, limit in limits.items() if most.get(short, -1e9) > limit]
            found += [f"alpha {alpha:g}: {s} {most[s]:.3f}, the limit is {limits[s]:g}" for s in passed]
            found += [f"alpha {alpha:g}: no attacker measured {s}" for s in limits if s not in most]
            if limits and not passed and self.verdict(alpha) is Verdict.INCONCLUSIVE:
                found.append(f"alpha {alpha:g}: {Verdict.INCONCLUSIVE}")
            found += [f"alpha {alpha:g}: {o.caught}" for o in self.against(alpha) if o.caught]
        return found

    def to_html(self, path: str | Path, *, keep_pictures: bool = False) -> None:
        """Write the report, one self-contained page; with reconstructions of people only if told to."""
        from sfumato.auditing.report import html  # it needs matplotlib, an audit does not

        write_bytes(Path(path), html(self, keep_pictures=keep_pictures).encode())

    def _repr_html_(self) -> str:
        """Verdicts, then every attacker's figures beside what no information gives; no pictures of records."""
        verdicts = [
            (f"{a:g}", self.verdict(a), *(_figure(worst(self.against(a)), short) for short in LIMITS))
            for a in self.alphas
        ]
        outcomes = [
            (
                o.attacker,
                o.tap,
                "" if o.alpha is None else f"{o.alpha:g}",
                name,
                f"{value:.3f}",
                _figure(o.anchors, name),
            )
            for o in self.outcomes
            for name, value in o.figures.items()
        ]
        names = ("identity AUC", "TAR at FAR .01", "dB above the mean picture")
        first = table(("alpha", "verdict", *names), verdicts, title="The best attackers")
        head = ("attacker", "sees", "alpha", "figure", "reached", "no information")
        notes = (
            table((), [[sentence] for sentence in weak(self.clean)], title="The control is weak")
            if weak(self.clean)
            else ""
        )
        return first + table(head, outcomes, title="All attackers") + notes

    def as_dict(self) -> dict[str, Any]:
        """For JSON: everything but pictures."""
        rows = [
            {k: v for k, v in asdict(o).items() if k != "pictures"} | {"converged": o.converged} for o in self.outcomes
        ]
        return {
            "conditions": self.conditions,
            "verdicts": {
                f"{a:g}": {"verdict": self.verdict(a).name, "says": str(self.verdict(a))} for a in self.alphas
            },
            "utility": self.utility,
            "compared": {f"{a:g}": self.compared(a) for a in self.alphas},
            "outcomes": rows,
            "certificates": [asdict(c) for c in self.certificates],
            "control": weak(self.clean),
            "left_out": self.left_out,
        }


def _figure(figures: dict[str, float], name: str) -> str:
    return f"{figures[name]:.3f}" if name in figures else "not measured"


def audit(
    protected: Protected,
    folder: str | Path,
    *,
    alphas: Sequence[float] = (0.8, 0.95),
    budget: str | Budget = "quick",
    recogniser: Path | None = None,
    work: str | Path = "audit-work",
    size: int = SIZE,
    seed: int = 0,
    limits: dict[str, float] | None = None,
    quiet: bool = False,
) -> Audit:
    """Attack releases of the images in `folder` (one folder a person, where identity is to be attacked).

    `budget`: "quick", "full" or a `Budget` of your own. Raises RequestError for an unknown budget or a client without
    its server, DatasetError for too few images.
    """
    if isinstance(budget, str) and budget not in BUDGETS:
        raise RequestError(f"budget {budget!r}", wanted=" or ".join(BUDGETS), do="--budget quick")
    if protected.outside is None or protected.reference is None:
        raise RequestError("only the trusted side is here", wanted="client and server artefacts, to measure utility")
    device = protected.obfuscator.mean.device
    if device.type != "cpu":
        raise RequestError(
            f"a model on {device}", wanted="one on the CPU, where attackers train", do='load(device="cpu")'
        )
    much = budget if isinstance(budget, Budget) else BUDGETS[budget]
    run = _Run(_sized(protected, size), Path(folder), much, Path(work), size, seed, recogniser, quiet)
    return run.all(tuple(alphas), limits or {})


class _Run:
    """What every step of one audit needs."""

    def __init__(
        self, protected: Protected, folder: Path, budget: Budget, work: Path, size: int, seed: int,
        recogniser: Path | None, quiet: bool,
    ) -> None:  # fmt: skip
        self.protected, self.budget, self.work, self.size, self.seed = protected, budget, work, size, seed
        self.quiet, self.started = quiet, perf_counter()
        self.effort = Effort(budget.effort.steps, budget.effort.batch, budget.effort.tested, quiet)
        self.found = records.source(folder, limit=budget.records, seed=seed)
        self.prey = records.build(protected, self.found, work, size=size, seed=seed, quiet=quiet)
        known = Recogniser(recogniser) if recogniser else None
        ours = (Reuse(), Battery(), Reconstruction(known), Linkage(known), Averaging(budget.repeats), Probes())
        self.attackers = with_registered([*ours, Inversion(protected, size)])
        server = protected.outside
        self.server = digest_of(server.state_dict()) if isinstance(server, nn.Module) else repr(server)
        self.known = None if recogniser is None else hashlib.sha256(recogniser.read_bytes()).hexdigest()

    def all(self, alphas: tuple[float, ...], limits: dict[str, float]) -> Audit:
        result = Audit(self._conditions(), alphas, limits=limits)
        result.left_out = {a.name: why for a in self.attackers if (why := a.missing(self.prey)) is not None}
        able = [a for a in self.attackers if a.name not in result.left_out]
        # Baselines meet the smaller decoder alone, which can only flatter them.
        rivals = [replace(a, capacities=(SMALL,)) if isinstance(a, Reconstruction) else a for a in able if _learned(a)]
        clean = Clean()
        taps: list[tuple[Tap, Prey, list[Attacker]]] = [(clean, self.prey, [a for a in able if _learned(a)])]
        result.utility[clean.name] = 1.0
        for alpha in alphas:
            tap = Releases(self.protected, alpha)
            taps.append((tap, self.prey, able))
            reached = self.kept([tap.name, alpha], partial(self.utility, tap))
            result.utility[f"{tap.name} {alpha:g}"] = reached
            taps += [(t, p, rivals) for t, p in self.baselines(alpha, reached, result)]
        todo = [(t, p, a) for t, p, attackers in taps for a in attackers]
        bar = tqdm(todo, "attacks", disable=self.quiet)
        for through, prey, attacker in bar:
            bar.set_postfix_str(f"{attacker.name}, {through.name} {'' if through.alpha is None else through.alpha}")
            outcome = self.one(attacker, through, prey)
            result.outcomes.append(outcome)
            if through.name == "sfumato" and not outcome.figures and not outcome.caught:
                result.left_out[attacker.name] = "these records gave it nothing to measure"
        rows = self.prey.test[: self.budget.certified]
        for alpha in alphas:
            try:
                found = certify(self.protected, self.pictures(rows), self.prey.z[self.prey.test], alpha)
                result.certificates.append(found)
            except RequestError as error:
                result.left_out[f"certificates at {alpha:g}"] = error.got
        result.conditions["seconds"] = round(perf_counter() - self.started, 1)
        return result

    def one(self, attacker: Attacker, tap: Tap, prey: Prey) -> Outcome:
        """The outcome kept in `work`, or the attack now; what depends on more than the key says is never kept."""
        if isinstance(attacker, Reuse) or type(attacker).__module__.rpartition(".")[0] != "sfumato.attack":
            return attacker.attack(prey, tap, self.effort)
        strength = getattr(tap, "sigma", None) or getattr(tap, "strength", None)
        what = [
            attacker.name, *(repr(getattr(attacker, part, None)) for part in ("repeats", "capacities")),
            tap.name, tap.alpha, strength, self.known,
            self.found.digest, self.protected.digest, type(self.protected.noise).__qualname__, self.size, self.seed,
            repr(replace(self.effort, quiet=True)), _sources(),
        ]  # fmt: skip
        place = self.work / "outcomes" / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:20]
        if place.with_suffix(".json").exists():
            return _read(place)
        outcome = attacker.attack(prey, tap, self.effort)
        _write(place, outcome)
        return outcome

    def kept(self, what: list[Any], measure: Callable[[], float]) -> float:
        """The figure kept in `work`, or `measure()` now.

        Noise makes every measurement another, and what was attacked at equal utility holds for the first one alone.
        """
        place = self.work / "figures.json"
        known = json.loads(place.read_text()) if place.exists() else {}
        noise = type(self.protected.noise).__qualname__
        which = [*what, noise, _sources(), self.server, self.protected.digest, self.found.digest, self.size, self.seed]
        key = hashlib.sha256(json.dumps(which).encode()).hexdigest()
        if key not in known:
            known[key] = measure()
            write_bytes(place, json.dumps(known).encode())
        return float(known[key])

    def pictures(self, rows: np.ndarray) -> list[Image]:
        return [records.resized(self.found.read(int(i)), self.size) for i in rows]

    def utility(self, tap: Releases) -> float:
        """Agreement of the server's decisions with the clean model's."""
        outside = self.protected.outside
        assert outside is not None
        return self._agreement(lambda z: outside(self.protected.obfuscate(unfold(z, self.prey.ndim), tap.alpha)))

    @torch.inference_mode()
    def _agreement(self, answer: Callable[[Tensor], Any], z: np.ndarray | None = None) -> float:
        task, reference = self.protected.task, self.protected.reference
        assert reference is not None
        pairs = []
        for rows in batches(self.prey.test[:TESTED], 8):
            own = self.prey.cut(rows)
            seen = own if z is None else torch.from_numpy(z[rows].astype(np.float32))
            pairs.append((task.outputs(answer(seen)), task.outputs(reference(unfold(own, self.prey.ndim)))))
        ours, theirs = (tuple(torch.cat(p) for p in zip(*side, strict=True)) for side in zip(*pairs, strict=True))
        return task.agreement(ours, theirs)

    def baselines(self, alpha: float, reached: float, result: Audit) -> list[tuple[Tap, Prey]]:
        """Plain noise, blur and pixelation at the utility our release has at alpha."""
        reference = self.protected.reference
        if not self.budget.baselines or reference is None:
            return []
        std = torch.from_numpy(self.prey.z[self.prey.train[:200]].astype(np.float32).std((0, 2, 3))).clamp_min(1e-6)

        def noisy(sigma: float) -> float:
            return self._agreement(lambda z: reference(unfold(PlainNoise(sigma, std).restored(z), self.prey.ndim)))

        sigma = self._strength("plain noise", noisy, reached, alpha, 4.0, result)
        noise = PlainNoise(sigma, std, alpha)
        result.utility[f"{noise.name} {alpha:g}"] = self.kept([noise.name, alpha, sigma], lambda: noisy(sigma))
        made: list[tuple[Tap, Prey]] = [(noise, self.prey)]
        for name, transform, high in (("blurred input", blurred, 40.0), ("pixelated input", pixelated, 60.0)):
            made.append(self._transformed(name, transform, reached, high, alpha, result))
        return made

    def _strength(
        self, name: str, utility: Callable[[float], float], wanted: float, alpha: float, high: float, result: Audit
    ) -> float:
        """The strength of a baseline at which utility has fallen to `wanted`."""
        strength = self.kept([name, alpha, "strength"], lambda: _bisected(utility, wanted, high))
        capped = " (the strongest tried: utility is still higher)" if strength > 0.98 * high else ""
        result.conditions[f"{name} {alpha:g}"] = f"strength {strength:.3f}{capped}"
        return strength

    def _transformed(
        self, name: str, transform: Callable[[Image, float], Image], reached: float, high: float, alpha: float,
        result: Audit,
    ) -> tuple[Tap, Prey]:  # fmt: skip
        rows = self.prey.test[:TESTED]
        shown = self.pictures(rows)
        reference = self.protected.reference
        assert reference is not None

        def agreement(strength: float) -> float:
            z = np.zeros((int(rows.max()) + 1, *self.prey.z.shape[1:]), np.float16)
            for part in batches(np.arange(len(rows)), 8):
                z[rows[part]] = records.outputs(self.protected, [transform(shown[i], strength) for i in part])[0]
            return self._agreement(lambda x: reference(unfold(x, self.prey.ndim)), z)

        strength = self._strength(name, agreement, reached, alpha, high, result)
        result.utility[f"{name} {alpha:g}"] = self.kept([name, alpha, strength], lambda: agreement(strength))
        called = f"{name} {alpha:g}".replace(" ", "-")
        prey = records.build(
            self.protected, self.found, self.work, size=self.size, seed=self.seed, called=f"{called}-{strength:.3f}",
            transform=lambda image: transform(image, strength), quiet=self.quiet,
        )  # fmt: skip
        return Clean(name, alpha, strength), prey

    def _conditions(self) -> dict[str, Any]:
        prey, owners = self.prey, self.prey.people
        return {
            "sfumato": __version__,
            "artefact": self.protected.digest,
            "data": self.found.digest,
            "budget": self.budget.name,
            "records": len(self.found.paths),
            "people": None if owners is None else len(np.unique(owners)),
            "trained on": f"{len(prey.train) - prey.mirrored}, and their mirror images",
            "tested on": min(len(prey.test), self.effort.tested),
            "steps an attacker": self.effort.steps,
            "records a step": self.effort.batch,
            "noise": type(self.protected.noise).__name__.lower(),
            "decoder widths": f"{SMALL} and {LARGE}",
            "input": self.size,
            "seed": self.seed,
        }


def _learned(attacker: Attacker) -> bool:
    """Those whose figures a baseline can be compared by."""
    return isinstance(attacker, Reconstruction | Linkage)


def _sized(protected: Protected, size: int) -> Protected:
    """The same with a task of the audit's input size, where the task has one."""
    same = copy(protected)
    task: Any = protected.task
    if is_dataclass(task) and not isinstance(task, type) and hasattr(task, "size"):
        resized: Any = replace(task, size=(size, size))
        same.task = resized
    return same


@cache
def _sources() -> str:
    """Digest of the code of attackers and mechanism: an outcome of other code is not reused."""
    place = Path(str(attack.__file__)).parents[1]
    files = [path for part in ("attack", "core", "trusted", "outside") for path in sorted((place / part).glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _bisected(utility: Callable[[float], float], wanted: float, high: float) -> float:
    """The strength at which utility has fallen to `wanted`; utility falls with strength."""
    low = 0.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if utility(middle) > wanted else (low, middle)
    return (low + high) / 2


def _write(place: Path, outcome: Outcome) -> None:
    if outcome.pictures is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        np.save(place.with_suffix(".npy"), outcome.pictures, allow_pickle=False)
    plain = {k: v for k, v in asdict(outcome).items() if k != "pictures"}
    write_bytes(place.with_suffix(".json"), json.dumps(plain).encode())


def _read(place: Path) -> Outcome:
    saved = json.loads(place.with_suffix(".json").read_text())
    shown = place.with_suffix(".npy")
    return Outcome(**saved, pictures=np.load(shown, allow_pickle=False) if shown.exists() else None)
