"""A verdict anyone can read: an enum of sentences, decided by the best attacker alone.

An attacker that fails on clean head outputs proves nothing by failing on releases, so clean outputs are attacked too
(the control). The limits are those the project holds its own artefacts to at alpha .8; `--fail-above` sets others.
"""

import math
from collections.abc import Sequence
from enum import Enum

from sfumato.attack.base import Outcome
from sfumato.core.errors import RequestError

LIMITS = {"auc": 0.70, "tar": 0.05, "psnr": 3.0}  # psnr: dB above the mean picture
CHANCE = {"auc": 0.53, "tar": 0.02, "psnr": 0.3}  # up to here a figure is not told from no information
CONTROL = {"auc": 0.90, "psnr": 24.0}  # what attackers must reach on clean head outputs; psnr: dB
_FIGURES = {"auc": ("auc", "identity auc"), "tar": ("tar at far 1e-2", "identity tar at far 1e-2"), "psnr": ("psnr",)}
_BEYOND_DB, _BEYOND = 0.3, 0.05  # of figures without a limit: more than this above no information is a finding
_EXPECTATIONS = "noise reuse"  # its anchors say what honest noise gives, and `caught` whether it does


class Verdict(Enum):
    """What an audit concludes for one alpha."""

    BROKEN = "Broken: the noise itself is at fault, so nothing said of this obfuscator holds."
    LEAKS = "Leaks: an attacker tried here got more than the limits allow."
    INCONCLUSIVE = (
        "Inconclusive: an attacker was still improving when its training ended, or fails on clean head outputs too, "
        "so its figures prove little."
    )
    RESIDUAL = "Residual: attackers did better than chance, within the limits."
    NOTHING_FOUND = "Nothing found: no attacker tried here did better than chance. Stronger ones may."

    def __str__(self) -> str:
        return self.value


def worst(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The best attacker's auc, tar (at far 1e-2) and psnr (dB above its anchor, the mean picture)."""
    found: dict[str, float] = {}
    for outcome in outcomes:
        for short, names in _FIGURES.items():
            for name in names:
                if name in outcome.figures and (short != "psnr" or name in outcome.anchors):
                    value = outcome.figures[name] - (outcome.anchors[name] if short == "psnr" else 0.0)
                    found[short] = max(value, found.get(short, -math.inf))
    return found


def weak(clean: Sequence[Outcome]) -> list[str]:
    """What the attackers should reach on clean head outputs, and did not."""
    reached = worst(clean) | {"psnr": max((o.figures["psnr"] for o in clean if "psnr" in o.figures), default=math.inf)}
    missed = [short for short, wanted in CONTROL.items() if reached.get(short, math.inf) < wanted]
    return [f"{short} {reached[short]:.3g} on clean head outputs, {CONTROL[short]:g} wanted" for short in missed]


def verdict(
    outcomes: Sequence[Outcome], clean: Sequence[Outcome] = (), limits: dict[str, float] | None = None
) -> Verdict:
    """Of one alpha's outcomes against our releases, with those against clean head outputs as control."""
    if not outcomes:
        raise RequestError("an alpha that was not audited")
    if any(outcome.caught for outcome in outcomes):
        return Verdict.BROKEN
    most, allowed = worst(outcomes), LIMITS | (limits or {})
    if any(value > allowed[short] for short, value in most.items()):
        return Verdict.LEAKS
    if weak(clean) or any(outcome.converged is False for outcome in outcomes):
        return Verdict.INCONCLUSIVE
    above = any(value > CHANCE[short] for short, value in most.items())
    return Verdict.RESIDUAL if above or any(map(_beyond, outcomes)) else Verdict.NOTHING_FOUND


def _beyond(outcome: Outcome) -> bool:
    """Whether a figure that has no limit stands above what no information gives."""
    known = {name for names in _FIGURES.values() for name in names}
    return outcome.attacker != _EXPECTATIONS and any(
        value > outcome.anchors[name] + (_BEYOND_DB if name.startswith("psnr") else _BEYOND)
        for name, value in outcome.figures.items()
        if name in outcome.anchors and name not in known
    )


def limits_of(given: Sequence[str]) -> dict[str, float]:
    """`tar=0.05`, `auc=0.7`, `psnr=3` -> limits. Raises RequestError."""
    limits = {}
    for text in given:
        short, _, value = text.partition("=")
        try:
            limits[short] = float(value)
        except ValueError:
            limits[short] = math.nan
        if short not in LIMITS or not math.isfinite(limits[short]):
            raise RequestError(f"limit {text!r}", wanted="auc=, tar= or psnr= and a number", do="--fail-above tar=0.05")
    return limits
