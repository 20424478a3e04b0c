"""Easy prey: a head that only averages patches, an obfuscator that sends its three colours, people who are colours."""

import numpy as np
import torch
from torch import nn

from sfumato.attack.base import Effort, Prey, divided
from sfumato.core.obfuscator import Obfuscator, Shape
from sfumato.tasks.classification import Classification
from sfumato.trusted.protect import Protected

DIGEST = "ab" * 32
SIDE = 32
CAPACITIES = ((24, 16, 12, 8),)
EFFORT = Effort(steps=160, batch=8, tested=100, quiet=True)


def protected(c_ref: float = 30.0) -> Protected:
    torch.manual_seed(0)
    obfuscator = Obfuscator(Shape(channels=3, k=3, c_ref=c_ref, context=2))
    with torch.no_grad():
        obfuscator.linear.weight.copy_(torch.eye(3)[:, :, None, None])
        for parameter in [*obfuscator.context.parameters(), obfuscator.linear.bias]:
            assert parameter is not None
            parameter.zero_()
    return Protected(nn.AvgPool2d(8), obfuscator, Classification(mean=128.0, std=64.0), DIGEST)


def pictures(people: np.ndarray, seed: int = 0) -> np.ndarray:
    """[n, SIDE, SIDE, 3]: upper half in the person's colour, lower half in any."""
    draw = np.random.default_rng(seed)
    colours = draw.integers(0, 256, (int(people.max()) + 1, 3))
    made = np.empty((len(people), SIDE, SIDE, 3), np.uint8)
    made[:, : SIDE // 2] = colours[people][:, None, None]
    made[:, SIDE // 2 :] = draw.integers(0, 256, (len(people), 1, 1, 3))
    return made


def prey(guarded: Protected, count: int = 240, each: int = 4) -> Prey:
    people = np.arange(count) // each
    shown = pictures(people)
    z = guarded.cut(list(shown)).half().numpy()
    train, test = divided(people, count, 0)
    light = (shown.mean((1, 2, 3)) > 128).astype(int)
    return Prey(z, shown, people, train, test, 0, {"light": light})
