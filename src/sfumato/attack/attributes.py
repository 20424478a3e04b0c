"""Attribute inference: how well does a probe, linear or one hidden layer, guess an attribute from the release?

Needs: releases of records whose attributes it knows (train); no model. The probe reads each channel's mean and spread
over the sites. Scored by balanced accuracy on test records, beside chance, one over the number of classes.
Sources: arXiv 1610.01644 (linear probes); arXiv 1805.04049 section 4 (property inference from features).
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.attack.base import Effort, Outcome, Prey, Tap, batches, held_out, standardised

_HIDDEN = 64


@dataclass(frozen=True)
class Probes:
    """Both probes on every attribute the data comes with."""

    name: str = "attributes"
    needs: str = "releases of records whose attributes it knows"

    def missing(self, prey: Prey) -> str | None:
        return None if prey.attributes else "the data comes with no attributes"

    def attack(self, prey: Prey, tap: Tap, effort: Effort) -> Outcome:
        """Figures: balanced accuracy, for each attribute, of the probe that did better on training rows held out."""
        torch.manual_seed(prey.seed)
        see = standardised(tap, prey, prey.train)
        inside, outside = (
            torch.cat([_summary(see(prey.cut(part))) for part in batches(rows, 64)]) for rows in (prey.train, prey.test)
        )
        figures, anchors = {}, {}
        for name, values in prey.attributes.items():
            classes, labels = np.unique(values, return_inverse=True)
            goal, truth = (torch.from_numpy(labels[rows]) for rows in (prey.train, prey.test))
            held = len(held_out(prey.train)[0])
            probes = [nn.Linear(inside.shape[1], len(classes)), _hidden(inside.shape[1], len(classes))]
            trained = [_train(p, inside[held:], goal[held:], len(classes), effort) for p in probes]
            best = max(trained, key=lambda probe: _balanced(probe, inside[:held], goal[:held]))
            figures[name] = _balanced(best, outside, truth)
            anchors[name] = 1 / len(classes)
        return Outcome(self.name, tap.name, tap.alpha, figures, anchors)


def _summary(seen: Tensor) -> Tensor:
    return torch.cat([seen.mean((2, 3)), seen.std((2, 3))], 1) if seen[0, 0].numel() > 1 else seen.flatten(1)


def _hidden(inputs: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, classes))


def _train(probe: nn.Module, x: Tensor, goal: Tensor, classes: int, effort: Effort) -> nn.Module:
    optimiser = torch.optim.AdamW(probe.parameters(), lr=3e-3, weight_decay=1e-2)
    weight = 1 / goal.bincount(minlength=classes).clamp_min(1).float()
    for _ in range(effort.steps):
        chosen = torch.randint(len(x), (64,))
        loss = F.cross_entropy(probe(x[chosen]), goal[chosen], weight=weight)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    return probe


@torch.no_grad()
def _balanced(probe: nn.Module, x: Tensor, truth: Tensor) -> float:
    """Mean over classes of the share of that class guessed right."""
    right = probe(x).argmax(1) == truth
    return float(np.mean([float(right[truth == c].float().mean()) for c in truth.unique()]))
