"""Inversion by optimisation: x* = argmin_x |seen - E[seen | x]|^2 / (2 s^2) + lambda TV(x), through the head.

Needs: white box only; no pictures but a mean one, no pairs. Total variation is the prior of natural pictures
(arXiv 1412.0035 section 3); with unit noise the first term is the exact log-likelihood of a release. The weight of the
prior is chosen on one training record.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from sfumato.attack.base import Effort, Outcome, Prey, Releases, Tap
from sfumato.attack.reconstruction import score
from sfumato.trusted.protect import Protected

PRIORS = (1e-4, 1e-3, 1e-2)  # of TV, beside the mean squared residual


@dataclass(frozen=True)
class Inversion:
    """A picture whose release would look like the one seen."""

    protected: Protected
    side: int
    records: int = 8
    name: str = "inversion"
    needs: str = "white box, no pairs"

    def missing(self, prey: Prey) -> str | None:
        return None

    def attack(self, prey: Prey, tap: Tap, effort: Effort) -> Outcome:
        """Figures psnr and ssim over `records` test records."""
        torch.manual_seed(prey.seed)
        mean = torch.from_numpy(prey.pictures[prey.train].mean(0)).permute(2, 0, 1).float() / 255
        steps = max(50, effort.steps // 3)
        train = prey.train[:1]
        tried = {prior: self._invert(prey, tap, train, mean, prior, steps, effort.quiet)[0] for prior in PRIORS}
        prior = max(tried, key=lambda p: score(tried[p], prey.pictures[train], ssim=False)["psnr"])
        rows = prey.test[: self.records]
        pictures, curve = self._invert(prey, tap, rows, mean, prior, steps, effort.quiet)
        anchor = np.broadcast_to((mean.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8), pictures.shape)
        figures, anchors = score(pictures, prey.pictures[rows]), score(anchor, prey.pictures[rows])
        return Outcome(self.name, tap.name, tap.alpha, figures, anchors, curve, pictures=pictures)

    def _invert(
        self, prey: Prey, tap: Tap, rows: np.ndarray, mean: Tensor, prior: float, steps: int, quiet: bool
    ) -> tuple[np.ndarray, list[float]]:
        """Pictures uint8, and their PSNR along the way, to see whether it had converged; nothing is chosen by it."""
        see, expected = (tap.observed, tap.mean) if isinstance(tap, Releases) else (tap.see, tap.expected)
        seen = see(prey.cut(rows)).clone()
        spread = seen.std()
        enter = _input_of(self.protected, self.side)
        guess = mean.expand(len(rows), *mean.shape).clone().requires_grad_()
        optimiser, curve = torch.optim.Adam([guess], lr=0.03), list[float]()
        for step in tqdm(range(steps), "inversion", disable=quiet, leave=False):
            residual = ((expected(self.protected.head(enter(guess))) - seen) / spread).square().mean()
            loss = residual + prior * _variation(guess)
            (guess.grad,) = torch.autograd.grad(loss, guess)
            optimiser.step()
            guess.data.clamp_(0, 1)
            if (step + 1) % max(1, steps // 12) == 0:
                curve.append(score(_shown(guess), prey.pictures[rows], ssim=False)["psnr"])
        return _shown(guess), curve


def _shown(guess: Tensor) -> np.ndarray:
    return np.asarray((guess.detach().permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy())


def _variation(x: Tensor) -> Tensor:
    """Total variation per record, summed over pixels and averaged over records."""
    rows, cols = (x[..., 1:, :] - x[..., :-1, :]).abs(), (x[..., 1:] - x[..., :-1]).abs()
    return (rows.sum() + cols.sum()) / len(x) / 100


def _input_of(protected: Protected, side: int) -> Callable[[Tensor], Tensor]:
    """Pictures in 0..1 -> the model's input, as the task's preprocessing maps colours (which is affine)."""
    black, white = (protected.task.preprocess(np.full((side, side, 3), value, np.uint8)) for value in (0, 255))

    def enter(picture: Tensor) -> Tensor:
        grown = F.interpolate(picture, (side, side), mode="bilinear", align_corners=False)
        return black + grown * (white - black)

    return enter
