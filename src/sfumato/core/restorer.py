"""z' = mean + std (W x + F(x)), x the Wiener estimate of b: what the outside makes of a release.

    x_i = y_i g_i s_i^2 / (g_i^2 s_i^2 + 1)        Wiener scaling, s_i^2 the signal's variance (learned)

F is a depthwise 5x5 refinement, modulated by alpha (FiLM, arXiv 1709.07871), and a 1x1 convolution. It computes on the
release alone, so by the data-processing inequality it adds no information.
"""

import torch
from torch import Tensor, nn

from sfumato.core import channel
from sfumato.core.obfuscator import Allocation, Shape

_FILM_WIDTH = 32


class Restorer(nn.Module):
    """Codes int8 [N, k, h, w] with alpha [N] -> z' [N, C, h, w]."""

    mean: Tensor
    std: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        c = shape.channels
        self.register_buffer("mean", torch.zeros(c))
        self.register_buffer("std", torch.ones(c))
        self.allocation = Allocation(shape)
        self.log_variance = nn.Parameter(torch.zeros(shape.k))
        self.lift = nn.Conv2d(shape.k, c, 1)
        self.depthwise = nn.Conv2d(c, c, 5, padding=2, groups=c)
        self.film = nn.Sequential(nn.Linear(2, _FILM_WIDTH), nn.ReLU(), nn.Linear(_FILM_WIDTH, 2 * c))
        self.mix = nn.Conv2d(c, c, 1)

    def wiener(self, y: Tensor, alpha: Tensor) -> Tensor:
        """Linear least-squares estimate of b from y = g b + eps."""
        gain = channel.gain(self.allocation(alpha), self.shape.bound)
        power = self.log_variance.exp()
        return y * (gain * power / (gain**2 * power + 1))[:, :, None, None]

    def forward(self, y: Tensor, alpha: Tensor) -> Tensor:
        """y float [N, k, h, w] (codes times step) -> z' [N, C, h, w]."""
        base: Tensor = self.lift(self.wiener(y, alpha))
        scale, shift = self.film(torch.stack([alpha, torch.log1p(-alpha)], 1)).chunk(2, dim=1)
        hidden = torch.relu(self.depthwise(base) * (1 + scale[:, :, None, None]) + shift[:, :, None, None])
        restored: Tensor = self.mean[:, None, None] + self.std[:, None, None] * (base + self.mix(hidden))
        return restored

    def restore(self, codes: Tensor, alpha: Tensor) -> Tensor:
        """From what crossed the wire: dequantise with the step both sides know, then `forward`."""
        restored: Tensor = self(codes.to(self.mean.dtype) * self.allocation.steps(alpha), alpha)
        return restored
