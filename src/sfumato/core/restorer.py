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

    def wiener(self, bits: Tensor, alpha: Tensor) -> Tensor:
        """[N, k s^2] by which y = g b + eps is multiplied: the linear least-squares estimate of b, as at alpha 0."""
        a = alpha[:, None]
        gain = channel.gain(bits, self.shape.bound)
        power = torch.exp(self.log_variance + a * self.variance_growth)
        return torch.exp(self.spread + a * self.growth) * gain * power / (gain**2 * power + 1)

    def forward(self, y: Tensor, alpha: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """y float [N, k s^2, H, W] (codes times step) -> z' [N, C, h, w], of `size` (h, w); None: whole blocks."""
        return self._lifted(y, self.wiener(self.allocation(alpha), alpha), alpha, size)

    def restore(self, codes: Tensor, alpha: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """From what crossed the wire: `forward` of codes times the step that both sides know."""
        bits = self.allocation(alpha)
        return self._lifted(codes, channel.step(bits, self.shape.bound) * self.wiener(bits, alpha), alpha, size)

    def _lifted(self, y: Tensor, scale: Tensor, alpha: Tensor, size: tuple[int, int] | None) -> Tensor:
        x = sites_of(y * scale[:, :, None, None], self.shape.block, size)
        n = self.far(self.near(self.lift(x), alpha), alpha)
        return torch.addcmul(self.mean[:, None, None], self.std[:, None, None], n)
