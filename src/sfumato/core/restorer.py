"""z' = mean + std (W T^-1 x + F(...)), x the Wiener estimate of b: what the outside makes of a release.

    x_i = e^(o_i + alpha q_i) y_i g_i s_i^2 / (g_i^2 s_i^2 + 1)        Wiener scaling
    s_i^2 = e^(p_i + alpha r_i)                                        the signal's variance; o, p, q, r learned

T^-1 takes blocks of coefficients back to sites (`core.blocks`). F is two depthwise 5x5 refinements, modulated by alpha,
each with a 1x1 convolution. It computes on the release alone, so by the data-processing inequality it adds no
information.
"""

import torch
from torch import Tensor, nn

from sfumato.core import channel
from sfumato.core.blocks import sites_of
from sfumato.core.film import Film
from sfumato.core.obfuscator import Allocation, Shape


class Refinement(nn.Module):
    """x + M relu(film(D x)), D depthwise 5x5 and M 1x1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.film = Film(channels)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, alpha: Tensor) -> Tensor:
        refined: Tensor = x + self.mix(torch.relu(self.film(self.depthwise(x), alpha)))
        return refined


class Restorer(nn.Module):
    """Codes int8 [N, k s^2, H, W] with alpha [N] -> z' [N, C, h, w]."""

    mean: Tensor
    std: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        c = shape.channels
        self.register_buffer("mean", torch.zeros(c))
        self.register_buffer("std", torch.ones(c))
        self.allocation = Allocation(shape)
        self.log_variance = nn.Parameter(torch.zeros(shape.sent))
        self.variance_growth = nn.Parameter(torch.zeros(shape.sent))
        self.spread = nn.Parameter(torch.zeros(shape.sent))
        self.growth = nn.Parameter(torch.zeros(shape.sent))
        self.lift = nn.Conv2d(shape.k, c, 1)
        self.near = Refinement(c)
        self.far = Refinement(c)

    def wiener(self, y: Tensor, alpha: Tensor) -> Tensor:
        """Linear least-squares estimate of b from y = g b + eps, in the units of alpha 0."""
        a = alpha[:, None]
        gain = channel.gain(self.allocation(alpha), self.shape.bound)
        power = torch.exp(self.log_variance + a * self.variance_growth)
        scale = torch.exp(self.spread + a * self.growth) * gain * power / (gain**2 * power + 1)
        return y * scale[:, :, None, None]

    def forward(self, y: Tensor, alpha: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """y float [N, k s^2, H, W] (codes times step) -> z' [N, C, h, w], of `size` (h, w); None: whole blocks."""
        x = sites_of(self.wiener(y, alpha), self.shape.block, size)
        n = self.far(self.near(self.lift(x), alpha), alpha)
        return torch.addcmul(self.mean[:, None, None], self.std[:, None, None], n)

    def restore(self, codes: Tensor, alpha: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """From what crossed the wire: dequantise with the step both sides know, then `forward`."""
        restored: Tensor = self(codes.to(self.mean.dtype) * self.allocation.steps(alpha), alpha, size)
        return restored
