"""The learned decoder: min over networks D of E |D(seen) - picture|^2, trained against one tap (arXiv 1506.02753).

    D(seen) = mean picture + L (seen - mean seen) + N(seen)

L, from 3x3 sites to the pixels under one, starts as the ridge regression, the best linear decoder of that reach, in
closed form; the network N starts at zero, and the weights that do best on held-out training rows are kept. Needs: the
artefacts (white box), photographs of the same kind, and as many releases of them as it likes. Two capacities are
trained; the better one on held-out training rows is reported. Scored by PSNR and SSIM on pictures it never saw, beside
the zero-information anchor, the mean training picture. Where a face recogniser is given, reconstructions of people
never seen are matched by it too: what a picture is worth to somebody who wants a name.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from tqdm.auto import tqdm

from sfumato.attack.base import Effort, Outcome, Prey, Tap, batches, held_out, learnable, standardised
from sfumato.attack.recogniser import Recogniser, verification

_RIDGES = (1e-6, 1e-4, 1e-2)  # relative to the features' mean power; the best on held-out training rows is taken
_SAMPLES = 800_000  # sites the closed form looks at
_MEANS = 64  # batches of 16 that the mean of what is seen is taken over
_WIDE = 512  # channels from which L reads one site and not nine, to keep its solve small
_RATE = 1e-3
SMALL, LARGE = (64, 48, 32, 24), (160, 96, 64, 32)
CHECKS = 12  # points of the training curve
_KEPT = 16  # pictures an outcome carries along

Seen = Callable[[Tensor], Tensor]


class Decoder(nn.Module):
    """Features [N, c, h, w], on average `usual` [c, h, w] -> pictures [N, 3, side, side] in 0..1, on average `mean`."""

    usual: Tensor

    def __init__(self, usual: Tensor, widths: tuple[int, ...], mean: Tensor, doublings: int) -> None:
        super().__init__()
        self.register_buffer("usual", usual)
        self.mean, self.up_by, channels = nn.Parameter(mean.clone()), 2**doublings, len(usual)
        kernel = 3 if channels <= _WIDE else 1
        self.linear = nn.Conv2d(channels, 3 * self.up_by**2, kernel, padding=kernel // 2)
        self.enter = nn.Conv2d(channels, widths[0], 1)
        self.trunk = nn.ModuleList(nn.Conv2d(widths[0], widths[0], 3, padding=1) for _ in range(4))
        steps = list(pairwise([widths[min(i, len(widths) - 1)] for i in range(doublings + 1)]))
        self.up = nn.ModuleList(nn.Conv2d(a, 4 * b, 3, padding=1) for a, b in steps)
        self.leave = nn.Conv2d(steps[-1][1], 3, 3, padding=1)
        for parameter in (*self.linear.parameters(), *self.leave.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, seen: Tensor) -> Tensor:
        known, x = F.pixel_shuffle(self.linear(seen - self.usual), self.up_by), F.relu(self.enter(seen))
        for layer in self.trunk:
            x = x + F.relu(layer(x))
        for layer in self.up:
            x = F.relu(F.pixel_shuffle(layer(x), 2))
        picture = F.interpolate(known + self.leave(x), self.mean.shape[1:], mode="bilinear", align_corners=False)
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
        see, tested = standardised(learnable(tap), prey, prey.train), prey.test[: effort.tested]
        fits = [_fit(prey, see, widths, effort) for widths in self.capacities]
        decoder, curve = max(fits, key=lambda fit: max(fit[1]))
        pictures = _decode(decoder, standardised(tap, prey, prey.train), prey, tested)
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
    usual = torch.stack([see(prey.cut(part)).mean(0) for part in batches(rows[: 16 * _MEANS], 16)]).mean(0)
    mean = torch.from_numpy(prey.pictures[rows].mean(0)).permute(2, 0, 1).float() / 255
    doublings = max(1, math.ceil(math.log2(mean.shape[1] / usual.shape[1])))
    decoder = Decoder(usual, widths, mean, doublings)
    curve = [_solve(decoder, see, prey, rows, held)]
    # What the closed form gave moves slowly, or a network that knows nothing yet would have unlearned it.
    solved = [*decoder.linear.parameters(), decoder.mean]
    network = [p for p in decoder.parameters() if not any(p is q for q in solved)]
    rates = [_RATE / 10, _RATE]
    optimiser = torch.optim.AdamW([{"params": solved}, {"params": network}])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rates, total_steps=effort.steps + 1, pct_start=0.1)
    best, state = curve[0], deepcopy(decoder.state_dict())
    draw = np.random.default_rng(prey.seed)
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
            curve.append(_psnr(decoder, see, prey, held))
            if curve[-1] > best:
                best, state = curve[-1], deepcopy(decoder.state_dict())
    decoder.load_state_dict(state)
    return decoder, curve


@torch.no_grad()
def _solve(decoder: Decoder, see: Seen, prey: Prey, rows: np.ndarray, held: np.ndarray) -> float:
    """Set L to the ridge regression from what is seen of `rows` to their pictures; its PSNR on `held`."""
    layer, up = decoder.linear, decoder.up_by
    kernel, width = layer.kernel_size[0], layer.weight[0].numel() + 1
    gram = torch.zeros(width, width, dtype=torch.float64)
    moment = torch.zeros(width, len(layer.weight), dtype=torch.float64)
    samples = 0
    for part in batches(rows, 16):
        seen = see(prey.cut(part))
        size = (seen.shape[2] * up, seen.shape[3] * up)
        left = F.interpolate(prey.shown(part) - decoder.mean, size, mode="area")
        x = F.unfold((seen - decoder.usual).contiguous(), kernel, padding=kernel // 2).transpose(1, 2).flatten(0, 1)
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        gram += x.T @ x
        moment += x.T @ F.pixel_unshuffle(left, up).flatten(2).transpose(1, 2).flatten(0, 1)
        samples += len(x)
        if samples >= _SAMPLES:
            break
    reached, best = -math.inf, layer.weight.new_zeros(width, len(layer.weight))
    for ridge in _RIDGES:
        solved = torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(width), moment).float()
        _set(layer, solved)
        found = _psnr(decoder, see, prey, held)
        reached, best = (found, solved) if found > reached else (reached, best)
    _set(layer, best)
    return reached


def _set(layer: nn.Conv2d, solved: Tensor) -> None:
    """Weights [c kernel^2 + 1, out], the last row the bias."""
    assert layer.bias is not None
    layer.weight.copy_(solved[:-1].T.reshape(layer.weight.shape))
    layer.bias.copy_(solved[-1])


def _psnr(decoder: Decoder, see: Seen, prey: Prey, rows: np.ndarray) -> float:
    return score(_decode(decoder, see, prey, rows), prey.pictures[rows], ssim=False)["psnr"]


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
