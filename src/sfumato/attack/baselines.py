"""What one would do instead: plain noise on the head's output, or a blurred or coarsened input; no capacity is claimed.

    noise:     seen = z / std + sigma eps,  eps ~ N(0, I)
    blur:      the head sees the picture under a Gaussian blur of deviation s pixels
    pixelate:  the head sees the picture in blocks of s pixels

Each is set to the strength at which the model, as provided, decides as well as it does through our release ("equal
utility"). The model is not fitted to them; ours is, so this comparison favours ours, and says so wherever it is shown.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from sfumato.core.task import Image


@dataclass(frozen=True, eq=False)
class PlainNoise:
    """Gaussian noise of one strength on standardised head outputs; std [C]."""

    sigma: float
    std: Tensor
    alpha: float | None = None
    name: str = "plain noise"

    def see(self, z: Tensor) -> Tensor:
        seen = self.expected(z)
        return seen + self.sigma * torch.randn_like(seen)

    def expected(self, z: Tensor) -> Tensor:
        return z / self.std[:, None, None]

    def restored(self, z: Tensor) -> Tensor:
        """What the provider's tail gets to see."""
        return self.see(z) * self.std[:, None, None]


def blurred(picture: Image, strength: float) -> Image:
    """Gaussian blur of deviation `strength` pixels; 0 is the picture itself."""
    return picture if strength <= 0 else np.asarray(cv2.GaussianBlur(picture, (0, 0), strength))


def pixelated(picture: Image, strength: float) -> Image:
    """Blocks of `strength` pixels; 1 or less is the picture itself."""
    if strength <= 1:
        return picture
    height, width = picture.shape[:2]
    small = (max(1, round(width / strength)), max(1, round(height / strength)))
    coarse = cv2.resize(picture, small, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST))
