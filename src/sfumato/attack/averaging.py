"""Averaging: the mean of K releases of one record has noise of variance 1/K; the decoder is retrained on such means.

    c_i(K) = min(1/2 log2(1 + K A_i^2), log2(1 + sqrt(K) A_i / q))        at most (core/channel.py)

Needs: white box, pairs, and K releases of one record. Against noise keyed to the record it gains nothing, because the K
releases are one: there K real ones are drawn, and where their mean is the single one to the last bit, so is the figure.
"""

from dataclasses import dataclass, field, replace

import torch

from sfumato.attack.base import Effort, Outcome, Prey, Releases, Tap
from sfumato.attack.reconstruction import SMALL, Reconstruction
from sfumato.trusted.noise import Keyed

_COMPARED = 32  # records whose releases are compared


@dataclass(frozen=True)
class Averaging:
    """The small learned decoder, once for each number of releases averaged: what counts is its gain over one."""

    repeats: tuple[int, ...] = (1, 4, 16, 64)
    decoder: Reconstruction = field(default_factory=lambda: Reconstruction(capacities=(SMALL,)))
    name: str = "averaging"
    needs: str = "white box, pairs, many releases of one record"

    def missing(self, prey: Prey) -> str | None:
        return None

    def attack(self, prey: Prey, tap: Tap, effort: Effort) -> Outcome:
        """Figures psnr at K; `curve` is that of the largest K. Empty for a tap that is no release of ours."""
        if not isinstance(tap, Releases):
            return Outcome(self.name, tap.name, tap.alpha, {})
        figures, last = {}, None
        keyed = isinstance(tap.protected.noise, Keyed)
        for number in self.repeats:
            if keyed and last is not None and _are_one(prey, tap, number):
                figures[f"psnr of {number}"] = last.figures["psnr"]
                continue
            last = self.decoder.attack(prey, replace(tap, repeats=number), effort)
            figures[f"psnr of {number}"] = last.figures["psnr"]
        if last is None:
            return Outcome(self.name, tap.name, tap.alpha, {})
        anchors = dict.fromkeys(figures, last.anchors["psnr"])
        return Outcome(self.name, tap.name, tap.alpha, figures, anchors, last.curve, pictures=last.pictures)


def _are_one(prey: Prey, tap: Releases, number: int) -> bool:
    """Whether the mean of `number` releases shows what a single one does, to the last bit."""
    z = prey.cut(prey.test[:_COMPARED])
    return torch.equal(replace(tap, repeats=number).see(z), replace(tap, repeats=1).see(z))
