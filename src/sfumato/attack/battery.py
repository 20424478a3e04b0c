"""p ~ s t(y_i) + o: the pictures one would look at first, without learning a network.

Each channel y_i of what the wire shows, and their mean weighted by bits, goes through each transform t (itself,
Gaussian blur, gamma, Sobel, Haar approximation, min-max stretch); s and o are one least-squares line per pair of
channel and transform, from the grey pictures of training records. Channel and transform are chosen on training records
too, by error and again by SSIM (of the SHORTLIST of least error), and scored on test records beside the mean picture.

Shapes: y [n, c, h, w] -> pictures [n, h, w] in 0..1, reduced to one pixel a site by area. Needs: pairs of a record and
what the wire shows of it; of a white box only the bits. Source: the transforms of any image viewer; the Haar
approximation is Mallat, A Wavelet Tour of Signal Processing, 3rd ed., section 7.7.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from torch import Tensor

from sfumato.attack.base import Effort, Outcome, Prey, Releases, Tap, batches
from sfumato.core import channel

Picture = NDArray[np.float32]  # [h, w], or [n, h, w] where it says pictures

TRAINED = 256  # records that two numbers a pair are fitted to
SHORTLIST = 12
SHOWN = 8
_BATCH = 16
_WINDOW = 7  # of SSIM, its authors' size where the sites are as many
_SMALLEST = 3


def stretch(picture: Picture) -> Picture:
    """To 0..1 by its own least and largest value."""
    low, high = float(picture.min()), float(picture.max())
    return np.asarray((picture - low) / max(high - low, 1e-12), np.float32)


def haar(picture: Picture) -> Picture:
    """The approximation of one level, at the picture's size: means of 2 x 2 sites, the last repeated where odd."""
    h, w = picture.shape
    even = np.pad(picture, ((0, h % 2), (0, w % 2)), mode="edge")
    coarse = even.reshape(-(-h // 2), 2, -(-w // 2), 2).mean((1, 3))
    return np.asarray(np.kron(coarse, np.ones((2, 2)))[:h, :w], np.float32)


def sobel(picture: Picture) -> Picture:
    """Size of the gradient."""
    across, down = cv2.Sobel(picture, cv2.CV_32F, 1, 0), cv2.Sobel(picture, cv2.CV_32F, 0, 1)
    return np.asarray(np.hypot(across, down), np.float32)


TRANSFORMS: dict[str, Callable[[Picture], Picture]] = {
    "identity": lambda p: p,
    "blur": lambda p: np.asarray(cv2.GaussianBlur(p, (0, 0), 1.0), np.float32),
    "gamma": lambda p: np.asarray(stretch(p) ** 0.5, np.float32),
    "sobel": sobel,
    "haar": haar,
    "stretch": stretch,
}


@dataclass(frozen=True)
class Look:
    """One pair of channel and transform with its line, and its mean squared error on the training records."""

    channel: int
    transform: str
    slope: float
    offset: float
    error: float

    def pictures(self, y: NDArray[np.float32]) -> Picture:
        """[n, c, h, w] -> [n, h, w] in 0..1."""
        seen = np.stack([TRANSFORMS[self.transform](one) for one in y[:, self.channel]])
        return np.asarray(np.clip(self.slope * seen + self.offset, 0, 1), np.float32)


@dataclass(frozen=True)
class Battery:
    """Looks at the channels through the transforms anyone would try."""

    name: str = "hand-made battery"
    needs: str = "pairs of record and release"

    def missing(self, prey: Prey) -> str | None:
        h, w = prey.z.shape[2:]
        return None if min(h, w) >= _SMALLEST else f"{h} x {w} sites are no picture: {_SMALLEST} x {_SMALLEST} at least"

    def attack(self, prey: Prey, tap: Tap, effort: Effort) -> Outcome:
        """Lines and choices from training rows, scores of up to `effort.tested` test rows."""
        order = np.random.default_rng([prey.seed, 3]).permutation(prey.train)[:TRAINED]
        train, test = np.sort(order), prey.test[: effort.tested]
        known, truth = reduced(prey, train), reduced(prey, test)
        closest, alike = chosen(seen(prey, tap, train), known)
        y = seen(prey, tap, test)
        pictures, mean = closest.pictures(y), np.broadcast_to(known.mean(0), truth.shape)
        return Outcome(
            self.name,
            tap.name,
            tap.alpha,
            {"psnr": psnr(pictures, truth), "ssim": ssim(alike.pictures(y), truth)},
            {"psnr": psnr(mean, truth), "ssim": ssim(mean, truth)},
            pictures=(pictures[:SHOWN] * 255).round().astype(np.uint8),
        )


def reduced(prey: Prey, rows: np.ndarray) -> Picture:
    """Grey pictures [n, h, w] in 0..1, one pixel a site."""
    h, w = prey.z.shape[2:]
    grey = (cv2.cvtColor(prey.pictures[row], cv2.COLOR_BGR2GRAY) for row in rows)
    small = np.stack([cv2.resize(one, (w, h), interpolation=cv2.INTER_AREA) for one in grey])
    return np.asarray(small / np.float32(255), np.float32)


def seen(prey: Prey, tap: Tap, rows: np.ndarray) -> NDArray[np.float32]:
    """What the tap shows of `rows`, [n, c + 1, h, w]: the last channel is the mean of the others, weighted by bits."""
    parts = [tap.see(prey.cut(part)).float().cpu() for part in batches(rows, _BATCH)]
    y, weights = torch.cat(parts), _weights(tap, parts[0].shape[1])
    mean = (y * weights[:, None, None]).sum(1, keepdim=True) / weights.sum()
    return np.ascontiguousarray(torch.cat([y, mean], 1).numpy())


def _weights(tap: Tap, channels: int) -> Tensor:
    """The obfuscator's bits a channel; equal weights where there are none."""
    if not isinstance(tap, Releases):
        return torch.ones(channels)
    obfuscator = tap.protected.obfuscator
    a = channel.as_alpha(tap.alpha or 0.0, 1, obfuscator.mean.device)
    bits: Tensor = obfuscator.allocation(a)[0].detach().cpu()
    return bits.view(obfuscator.shape.k, -1).sum(1)


def chosen(y: NDArray[np.float32], known: Picture) -> tuple[Look, Look]:
    """The channel and transform of least squared error, and those of largest SSIM among the SHORTLIST best."""
    looks = [_line(i, name, y[:, i], known) for i in range(y.shape[1]) for name in TRANSFORMS]
    best = sorted(looks, key=lambda look: look.error)[:SHORTLIST]
    return best[0], max(best, key=lambda look: ssim(look.pictures(y), known))


def _line(index: int, name: str, y: Picture, known: Picture) -> Look:
    x, known = np.stack([TRANSFORMS[name](one) for one in y]).astype(np.float64), known.astype(np.float64)
    cov = float(np.mean((x - x.mean()) * (known - known.mean())))
    slope = cov / max(float(x.var()), 1e-12)
    offset = float(known.mean() - slope * x.mean())
    return Look(index, name, slope, offset, float(np.mean((slope * x + offset - known) ** 2)))


def psnr(pictures: Picture, truth: Picture) -> float:
    """Mean over pictures of -10 log10 of the mean squared error."""
    errors = np.mean((pictures.astype(np.float64) - truth) ** 2, (1, 2))
    return float(np.mean(-10 * np.log10(np.maximum(errors, 1e-12))))


def ssim(pictures: Picture, truth: Picture) -> float:
    """Mean over pictures; the window is an odd number of sites that fits."""
    window = min(_WINDOW, (min(truth.shape[1:]) - 1) // 2 * 2 + 1)
    values = [
        structural_similarity(a, b, win_size=window, data_range=1.0)  # type: ignore[no-untyped-call]
        for a, b in zip(pictures, truth, strict=True)
    ]
    return float(np.mean(values))
