"""The usual way, for comparison only: learn a mean and a scale of noise for every feature, reward the scales.

    y = z + mu + sigma eps,  eps ~ N(0, I)           mu, sigma [C, h, w] learned, model frozen
    L = distance(tail(y), tail(z)) - lambda mean(log sigma)

A layer of this kind is attacked by the decoder and by identity linkage, at that of several lambdas whose utility
(agreement with the clean model on records of the audit) comes nearest to our release's. Why it is no
substitute: docs/mechanism.md.

    python benchmarks/baselines/learned_noise.py --data PEOPLE --alpha 0.8 [--recogniser MobileFaceNet.onnx]
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sfumato.attack.base import Effort, Prey, Releases, batches
from sfumato.attack.identity import Linkage
from sfumato.attack.recogniser import Recogniser
from sfumato.attack.reconstruction import Reconstruction
from sfumato.auditing import prey as records
from sfumato.auditing.run import SIZE
from sfumato.facade import load
from sfumato.tasks.detection.task import FaceDetection

LOWEST, HIGHEST = 1e-3, 1e3  # bounds of sigma, in deviations of a channel
WEIGHTS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # lambda, of which the nearest in utility is taken
STEPS, BATCH, TESTED = 150, 8, 200


class LearnedNoise(nn.Module):
    """Mean and scale of noise for every feature of [C, h, w]; works on channels of deviation `std` [C]."""

    def __init__(self, shape: tuple[int, ...], std: Tensor) -> None:
        super().__init__()
        self.std = std[:, None, None]
        self.mean = nn.Parameter(torch.zeros(shape))
        self.log_sigma = nn.Parameter(torch.full(shape, -2.0))

    @property
    def sigma(self) -> Tensor:
        return self.log_sigma.exp().clamp(LOWEST, HIGHEST)

    def forward(self, z: Tensor) -> Tensor:
        """z -> y, in units of z."""
        return z + self.std * (self.mean + self.sigma * torch.randn_like(z))


@dataclass(frozen=True, eq=False)
class LearnedTap:
    """What an attacker sees of it."""

    layer: LearnedNoise
    alpha: float
    name: str = "learned noise scales"

    @torch.no_grad()
    def see(self, z: Tensor) -> Tensor:
        seen: Tensor = self.layer(z) / self.layer.std
        return seen

    def expected(self, z: Tensor) -> Tensor:
        return z / self.layer.std + self.layer.mean


def fitted(tail: nn.Module, task: Any, prey: Prey, std: Tensor, weight: float) -> LearnedNoise:
    torch.manual_seed(0)
    layer, draw = LearnedNoise(prey.z.shape[1:], std), np.random.default_rng(0)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in tqdm(range(STEPS), f"lambda {weight:g}", leave=False):
        z = prey.cut(prey.train[draw.integers(len(prey.train), size=BATCH)])
        with torch.no_grad():
            wanted = task.outputs(tail(z))
        loss = task.distance(task.outputs(tail(layer(z))), wanted).mean() - weight * layer.sigma.log().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return layer.requires_grad_(requires_grad=False)


@torch.inference_mode()
def agreement(answer: Any, tail: nn.Module, task: Any, prey: Prey) -> float:
    pairs = []
    for rows in batches(prey.test[:TESTED], 8):
        z = prey.cut(rows)
        pairs.append((task.outputs(answer(z)), task.outputs(tail(z))))
    ours, theirs = (tuple(torch.cat(p) for p in zip(*side, strict=True)) for side in zip(*pairs, strict=True))
    return task.agreement(ours, theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--alpha", type=float, default=0.8)
    parser.add_argument("--artefacts", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--recogniser", type=Path)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--work", type=Path, default=Path("out/learned-noise"))
    args = parser.parse_args()
    protected = load(args.artefacts, weights=args.weights, task=FaceDetection(size=(SIZE, SIZE)))
    task, tail, outside = protected.task, protected.reference, protected.outside
    if tail is None or outside is None:
        parser.error("client and server artefacts are needed")
    prey = records.build(protected, records.source(args.data, limit=args.limit), args.work, size=SIZE)
    std = torch.from_numpy(prey.z[prey.train[:200]].astype(np.float32).std((0, 2, 3))).clamp_min(1e-6)
    reached = agreement(lambda z: outside(protected.obfuscate(z, args.alpha)), tail, task, prey)
    layers = {weight: fitted(tail, task, prey, std, weight) for weight in WEIGHTS}
    utility = {
        weight: agreement(lambda z, layer=layer: tail(layer(z)), tail, task, prey) for weight, layer in layers.items()
    }
    for weight, value in utility.items():
        print(f"lambda {weight:g}: agreement {value:.4f}, median sigma {float(layers[weight].sigma.median()):.3f}")
    chosen = min(utility, key=lambda weight: abs(utility[weight] - reached))
    print(f"alpha {args.alpha:g}: agreement {reached:.4f}; compared with lambda {chosen:g}, {utility[chosen]:.4f}")
    known = Recogniser(args.recogniser) if args.recogniser else None
    effort = Effort(args.steps)
    for tap in (Releases(protected, args.alpha), LearnedTap(layers[chosen], args.alpha)):
        for attacker in (Reconstruction(known), Linkage(known)):
            if attacker.missing(prey) is None:
                outcome = attacker.attack(prey, tap, effort)
                print(f"{tap.name}, {attacker.name}: {outcome.figures}; no information: {outcome.anchors}")


if __name__ == "__main__":
    main()
