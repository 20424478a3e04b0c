"""The audit as one self-contained page, to read, to print, to hand on.

Reconstructions show recognisable people. Without `keep_pictures` the page holds figures and one miniature of each
attack, blurred beyond recognition; the page says which.
"""

import base64
import io
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from sfumato.attack.base import Outcome
from sfumato.auditing.run import Audit
from sfumato.auditing.verdict import LIMITS, weak, worst

_SHOWN = 6  # pictures of an attack
_MINIATURE, _BLUR = 48, 6.0
_AXES = (("auc", "identity: best AUC (chance .5)"), ("psnr", "decoder: best dB above the mean picture"))


def html(result: Audit, *, keep_pictures: bool = False) -> str:
    """The page's text."""
    world = Environment(
        loader=PackageLoader("sfumato"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return world.get_template("audit.html.j2").render(
        audit=result,
        rows=[_row(result, alpha) for alpha in result.alphas],
        limits=LIMITS | result.limits,
        frontier=_frontier(result),
        averaging=_averaging(result),
        curves=_curves(result),
        galleries=[(o, _gallery(o, keep_pictures)) for o in result.outcomes if o.pictures is not None],
        kept=keep_pictures,
        control=weak(result.clean),
    )


def _row(result: Audit, alpha: float) -> dict[str, Any]:
    certificate = next((c for c in result.certificates if c.alpha == alpha), None)
    return {
        "alpha": alpha,
        "verdict": result.verdict(alpha),
        "worst": worst(result.against(alpha)),
        "utility": result.utility.get(f"sfumato {alpha:g}"),
        "compared": _compared(result, alpha),
        "caught": [o.caught for o in result.against(alpha) if o.caught],
        "certificate": certificate,
    }


def _compared(result: Audit, alpha: float) -> list[dict[str, Any]]:
    """A row each of ours and the baselines: utility, best attackers' figures, and where a baseline leaks less."""
    found = result.compared(alpha)
    ours = found.get("sfumato", {})
    rows = []
    for tap, figures in found.items():
        less = [short for short, value in figures.items() if tap != "sfumato" and value < ours.get(short, value)]
        rows.append({"tap": tap, "utility": result.utility.get(f"{tap} {alpha:g}"), "figures": figures, "less": less})
    return rows


def _series(result: Audit) -> dict[str, list[tuple[float, dict[str, float]]]]:
    """Tap -> (utility, best attackers' figures) for each of its alphas."""
    found: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for tap, alpha in dict.fromkeys((o.tap, o.alpha) for o in result.outcomes):
        utility = result.utility.get(tap if alpha is None else f"{tap} {alpha:g}")
        if utility is not None:
            most = worst([o for o in result.outcomes if (o.tap, o.alpha) == (tap, alpha)])
            found.setdefault(tap, []).append((utility, most))
    return found


def _frontier(result: Audit) -> str:
    """Utility against the best attacker, ours and the baselines."""
    figure = Figure(figsize=(10, 4))
    axes = figure.subplots(1, len(_AXES))
    for axis, (short, label) in zip(axes, _AXES, strict=True):
        for number, (tap, points) in enumerate(_series(result).items()):
            both = sorted((u, most[short]) for u, most in points if short in most)
            if both:
                axis.plot(*zip(*both, strict=True), "os^Dvx"[number % 6] + "-", label=tap)
        axis.set(xlabel="agreement with the clean model", ylabel=label)
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    return _svg(figure)


def _averaging(result: Audit) -> str | None:
    """PSNR of the decoder over the number of releases averaged."""
    outcomes = [o for o in result.outcomes if o.attacker == "averaging" and o.figures]
    if not outcomes:
        return None
    figure = Figure(figsize=(5, 3.2))
    axis = figure.subplots()
    for outcome in outcomes:
        numbers = [int(key.rsplit(" ", 1)[1]) for key in outcome.figures]
        axis.plot(numbers, list(outcome.figures.values()), "o-", label=f"alpha {outcome.alpha:g}")
    axis.axhline(next(iter(outcomes[0].anchors.values())), ls=":", color="grey", label="mean picture")
    axis.set(xscale="log", xlabel="releases averaged", ylabel="decoder's PSNR, dB")
    axis.legend(fontsize=8)
    return _svg(figure)


def _curves(result: Audit) -> str | None:
    """Scores of the learned attackers while they trained."""
    learned = [o for o in result.outcomes if len(o.curve) > 1]
    names = list(dict.fromkeys(o.attacker for o in learned))
    if not names:
        return None
    figure = Figure(figsize=(3.6 * len(names), 3.2))
    axes = figure.subplots(1, len(names), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for outcome in (o for o in learned if o.attacker == name):
            label = outcome.tap if outcome.alpha is None else f"{outcome.tap} {outcome.alpha:g}"
            axis.plot(np.linspace(0, 1, len(outcome.curve)), outcome.curve, label=label)
        axis.set(title=name, xlabel="share of training")
        axis.legend(fontsize=6)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.tight_layout()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _gallery(outcome: Outcome, keep: bool) -> list[str]:
    """Data URIs of an attack's pictures, or of one blurred miniature."""
    pictures = outcome.pictures
    if pictures is None:
        return []
    if not keep:
        small = cv2.resize(pictures[0], (_MINIATURE, _MINIATURE), interpolation=cv2.INTER_AREA)
        pictures = cv2.GaussianBlur(small, (0, 0), _BLUR)[None]
    encoded = (cv2.imencode(".jpg", picture)[1].tobytes() for picture in pictures[:_SHOWN])
    return ["data:image/jpeg;base64," + base64.b64encode(data).decode() for data in encoded]
