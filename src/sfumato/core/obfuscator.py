"""y = g(alpha) b + eps, b = B tanh(u / B): the signal is learned, the noise is fixed, so the capacity is capped.

The encoder u = V n + R(n), n = (z - mean) / std, is linear (V, a 1x1 convolution) plus a small context branch R (1x1,
ReLU, depthwise 5x5, ReLU, 1x1) that lets a site say what its neighbourhood shows. The cap of `core.channel` needs
|b| <= B only, so it holds for any encoder. This module never draws noise: production noise comes from `trusted.noise`.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from sfumato.core import channel


@dataclass(frozen=True)
class Shape:
    """Sizes of one obfuscator: C channels in, k sent, B bound, C_ref bits per site at alpha 0, context width."""

    channels: int
    k: int = 64
    bound: float = 2.0
    c_ref: float = 64.0
    context: int = 64

    def as_dict(self) -> dict[str, int | float]:
        return asdict(self)


class Allocation(nn.Module):
    """Bits per channel as a function of alpha, c = (1 - alpha) C_ref softmax(w + alpha v); both sides hold a copy."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.w = nn.Parameter(torch.zeros(shape.k))
        self.v = nn.Parameter(torch.zeros(shape.k))

    def forward(self, alpha: Tensor) -> Tensor:
        """[N] -> bits per site and channel [N, k]."""
        return channel.allocate(self.w, self.v, alpha, self.shape.c_ref)

    def steps(self, alpha: Tensor) -> Tensor:
        """[N] -> width of an int8 code [N, k, 1, 1], the same on both sides of the wire."""
        bits: Tensor = self(alpha)
        return channel.step(bits, self.shape.bound)[:, :, None, None]


class Obfuscator(nn.Module):
    """z [N, C, h, w] -> codes int8 [N, k, h, w]; any h and w, CPU or CUDA, one alpha or one per record."""

    mean: Tensor
    std: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        c, k, m = shape.channels, shape.k, shape.context
        self.register_buffer("mean", torch.zeros(c))
        self.register_buffer("std", torch.ones(c))
        self.linear = nn.Conv2d(c, k, 1)
        self.context = nn.Sequential(
            nn.Conv2d(c, m, 1),
            nn.ReLU(),
            nn.Conv2d(m, m, 5, padding=2, groups=m),
            nn.ReLU(),
            nn.Conv2d(m, k, 1),
        )
        self.allocation = Allocation(shape)

    def signal(self, z: Tensor) -> Tensor:
        """b = B tanh(u / B), |b| <= B: [N, C, h, w] -> [N, k, h, w].

        A u that is not a number becomes 0: a nan would cross the wire as a code no noise has touched.
        """
        n = (z - self.mean[:, None, None]) / self.std[:, None, None]
        u = torch.nan_to_num(self.linear(n) + self.context(n))
        return self.shape.bound * torch.tanh(u / self.shape.bound)

    def forward(self, z: Tensor, alpha: Tensor, noise: Tensor) -> Tensor:
        """y = g b + eps before quantisation; alpha [N], noise of the shape of y."""
        gain = channel.gain(self.allocation(alpha), self.shape.bound)[:, :, None, None]
        return gain * self.signal(z) + noise

    def codes(self, z: Tensor, alpha: Tensor, noise: Tensor) -> Tensor:
        """int8(y / step), what leaves."""
        y: Tensor = self(z, alpha, noise) / self.allocation.steps(alpha)
        return y.round().clamp(-channel.INT8_MAX, channel.INT8_MAX).to(torch.int8)

    def bits_per_site(self, alpha: channel.Alpha, *, releases: int = 1) -> Tensor:
        """Capacity of one site in bits, [N]; of `releases` fresh releases of the same record together."""
        a = torch.as_tensor(alpha, dtype=torch.float32, device=self.mean.device).reshape(-1)
        bits = self.allocation(channel.as_alpha(a, len(a), a.device))
        return channel.repeated(bits, releases).sum(1)

    def bits_per_record(self, alpha: channel.Alpha, sites: int, *, releases: int = 1) -> Tensor:
        """Capacity of a record of `sites` sites in bits, [N]."""
        return sites * self.bits_per_site(alpha, releases=releases)
