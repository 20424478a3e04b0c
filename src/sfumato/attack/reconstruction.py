"""The learned decoder: min over networks D of E |D(seen) - picture|^2, trained against one tap (arXiv 1506.02753).

Needs: the artefacts (white box), photographs of the same kind, and as many releases of them as it likes. Two capacities
are trained; the better one on held-out training rows is reported. Scored by PSNR and SSIM on pictures it never saw,
beside the zero-information anchor, the mean training picture. Where a face recogniser is given, reconstructions of
people never seen are matched by it too: what a picture is worth to somebody who wants a name.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from tqdm.auto import tqdm

from sfumato.attack.base import Effort, Outcome, Prey, Tap, batches, held_out, standardised
from sfumato.attack.recogniser import Recogniser, verification

SMALL, LARGE = (64, 48, 32, 24), (160, 96, 64, 32)
CHECKS = 12  # points of the training curve
_KEPT = 16  # pictures an outcome carries along

Seen = Callable[[Tensor], Tensor]


class Decoder(nn.Module):
    """Features [N, c, h, w] -> pictures [N, 3, side, side] in 0..1, around a constant `mean` picture."""

    def __init__(self, channels: int, widths: tuple[int, ...], mean: Tensor, doublings: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(mean.clone())
        self.enter = nn.Conv2d(channels, widths[0], 1)
        self.trunk = nn.ModuleList(nn.Conv2d(widths[0], widths[0], 3, padding=1) for _ in range(4))
        steps = list(pairwise([widths[min(i, len(widths) - 1)] for i in range(doublings + 1)]))
        self.up = nn.ModuleList(nn.Conv2d(a, 4 * b, 3, padding=1) for a, b in steps)
        self.leave = nn.Conv2d(steps[-1][1], 3, 3, padding=1)

    def forward(self, seen: Tensor) -> Tensor:
        x = F.relu(self.enter(seen))
        for layer in self.trunk:
            x = x + F.relu(layer(x))
        for layer in self.up:
            x = F.relu(F.pixel_shuffle(layer(x), 2))
        picture = F.interpolate(self.leave(x), self.mean.shape[1:], mode="bilinear", align_corners=False)
        return picture + self.mean


@dataclass(frozen=True)
class Reconstruction:
    """Pictures back from what the tap shows."""

    recogniser: Recogniser | None = None
    capacities: tuple[tuple[int, ...], ...] = (SMALL, LARGE)
    name: str = "learned decoder"
    needs: str = "white box, pairs of pictures and releases"

    def missing(self, prey: Prey) -> str | None:
        return None

    def attack(self, prey: Prey, tap: Tap, effort: Effort) -> Outcome:
        """Figures psnr and ssim; auc and tar of the recogniser on reconstructions where there is one."""
        torch.manual_seed(prey.seed)
        see, tested = standardised(tap, prey, prey.train), prey.test[: effort.tested]
        fits = [_fit(prey, see, widths, effort) for widths in self.capacities]
        decoder, curve = max(fits, key=lambda fit: fit[1][-1])
        pictures = _decode(decoder, see, prey, tested)
        figures = score(pictures, prey.pictures[tested])
        anchor = prey.pictures[prey.train].mean(0).round().astype(np.uint8)
        anchors = score(np.broadcast_to(anchor, pictures.shape), prey.pictures[tested])
        if self.recogniser is not None and prey.people is not None:
            found = verification(self.recogniser.embed(pictures), prey.people[tested])
            figures |= {f"identity {name}": value for name, value in found.items()}
            anchors |= {"identity auc": 0.5, "identity tar at far 1e-2": 0.01}
        return Outcome(self.name, tap.name, tap.alpha, figures, anchors, curve, pictures=pictures[:_KEPT])


def _fit(prey: Prey, see: Seen, widths: tuple[int, ...], effort: Effort) -> tuple[Decoder, list[float]]:
    """A decoder of these widths and its PSNR on held-out training rows along the way."""
    held, rows = held_out(prey.train)
    first = see(prey.cut(rows[:2]))
    mean = torch.from_numpy(prey.pictures[rows].mean(0)).permute(2, 0, 1).float() / 255
    doublings = max(1, math.ceil(math.log2(mean.shape[1] / first.shape[2])))
    decoder = Decoder(first.shape[1], widths, mean, doublings)
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=effort.steps + 1, pct_start=0.1)
    draw, curve = np.random.default_rng(prey.seed), list[float]()
    every = max(1, effort.steps // CHECKS)
    for step in tqdm(range(effort.steps), f"decoder of width {widths[0]}", disable=effort.quiet, leave=False):
        chosen = rows[draw.integers(len(rows), size=effort.batch)]
        error = decoder(see(prey.cut(chosen))) - prey.shown(chosen)
        loss = error.square().mean() + 0.1 * error.abs().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if (step + 1) % every == 0 or step + 1 == effort.steps:
            curve.append(score(_decode(decoder, see, prey, held), prey.pictures[held], ssim=False)["psnr"])
    return decoder, curve


@torch.no_grad()
def _decode(decoder: Decoder, see: Seen, prey: Prey, rows: np.ndarray) -> np.ndarray:
    """Pictures uint8 [n, P, P, 3]."""
    parts = [decoder(see(prey.cut(part))).clamp(0, 1).permute(0, 2, 3, 1) for part in batches(rows, 32)]
    return (torch.cat(parts) * 255).round().to(torch.uint8).numpy()


def score(pictures: np.ndarray, truths: np.ndarray, *, ssim: bool = True) -> dict[str, float]:
    """Mean PSNR (10 log10 255^2 / MSE) and SSIM of uint8 pictures [n, P, P, 3]."""
    errors = ((pictures.astype(np.float32) - truths) ** 2).mean((1, 2, 3))
    figures = {"psnr": float((10 * np.log10(255**2 / np.maximum(errors, 1e-9))).mean())}
    if ssim:
        figures["ssim"] = float(np.mean([_ssim(p, t) for p, t in zip(pictures, truths, strict=True)]))
    return figures


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    return float(structural_similarity(a, b, channel_axis=2))  # type: ignore[no-untyped-call]
