"""y = g(alpha) b + eps, b = B tanh(u / B): the signal is learned, the noise is fixed, so the capacity is capped.

The encoder u = e^(p + alpha r) T (V n + R(n, alpha)), n = (z - mean) / std, is linear (V, a 1x1 convolution) plus a
small context branch R that lets a site say what its neighbourhood shows; T is a cosine transform of blocks of sites
(`core.blocks`), so that bits go to what a block shows as a whole; r lets a signal fill its bound where bits are few.
The cap of `core.channel` needs |b| <= B only, so it holds for any encoder, and alpha is public. This module never draws
noise: production noise comes from `trusted.noise`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from sfumato.core import channel
from sfumato.core.blocks import sites_of, spectrum
from sfumato.core.film import Film


@dataclass(frozen=True)
class Shape:
    """Sizes of one obfuscator: C channels in, k sent, B bound, C_ref bits per site at alpha 0, context width.

    `block` is the side of the blocks of sites that are coded as one.
    """

    channels: int
    k: int = 64
    bound: float = 2.0
    c_ref: float = 64.0
    context: int = 96
    block: int = 1

    @property
    def sent(self) -> int:
        """Channels of a release: k for each place in a block."""
        return self.k * self.block**2

    def codes(self, size: Sequence[int]) -> tuple[int, int, int]:
        """(channels, height, width) of the release of (height, width) sites."""
        return self.sent, -(-size[0] // self.block), -(-size[1] // self.block)

    def coded(self, size: Sequence[int]) -> int:
        """Sites that (height, width) of them count as: whole blocks."""
        _, high, wide = self.codes(size)
        return high * wide * self.block**2

    def as_dict(self) -> dict[str, int | float]:
        return asdict(self)


class Allocation(nn.Module):
    """Bits per channel as a function of alpha, c = max(0, w + alpha v - theta); both sides hold a copy."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.w = nn.Parameter(torch.zeros(shape.sent))
        self.v = nn.Parameter(torch.zeros(shape.sent))

    def forward(self, alpha: Tensor) -> Tensor:
        """[N] -> bits per block and channel [N, k s^2]; they sum to s^2 (1 - alpha) C_ref."""
        return channel.allocate(self.w, self.v, alpha, self.shape.c_ref * self.shape.block**2)

    def carrying(self, alpha: Tensor) -> Tensor:
        """Numbers of the channels that have bits at some alpha of [N]: the others are not sent, not even as noise."""
        bits: Tensor = self(alpha)
        return (bits > 0).any(0).nonzero()[:, 0]

    def steps(self, alpha: Tensor) -> Tensor:
        """[N] -> width of an int8 code [N, k s^2, 1, 1], the same on both sides of the wire."""
        bits: Tensor = self(alpha)
        return channel.step(bits, self.shape.bound)[:, :, None, None]


def linear_estimate(
    y: Tensor, bits: Tensor, logs: Tensor, shape: Shape, size: tuple[int, int] | None, releases: int = 1
) -> Tensor:
    """`Obfuscator.estimate` for given bits [N, k s^2] and logarithms of the signal's scale, p + alpha r, same shape."""
    gain, power = channel.gain(bits, shape.bound), shape.bound**2 / 3
    scale = gain * power / (gain**2 * power + 1 / releases) * torch.exp(-logs)
    return sites_of(y * scale[:, :, None, None], shape.block, size)


class Context(nn.Module):
    """R(n, alpha): 1x1, then twice a depthwise 5x5 and a 1x1; a site's answer draws on the 9x9 sites around it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        m = shape.context
        self.enter = nn.Conv2d(shape.channels, m, 1)
        self.near, self.near_film = nn.Conv2d(m, m, 5, padding=2, groups=m), Film(m)
        self.between = nn.Conv2d(m, m, 1)
        self.far, self.far_film = nn.Conv2d(m, m, 5, padding=2, groups=m), Film(m)
        self.leave = nn.Conv2d(m, shape.k, 1)

    def forward(self, n: Tensor, alpha: Tensor) -> Tensor:
        h = torch.relu(self.enter(n))
        h = torch.relu(self.near_film(self.near(h), alpha))
        h = torch.relu(self.between(h))
        h = torch.relu(self.far_film(self.far(h), alpha))
        answer: Tensor = self.leave(h)
        return answer


class Obfuscator(nn.Module):
    """z [N, C, h, w] -> codes int8 [N, k s^2, h / s, w / s]; any h and w, CPU or CUDA, one alpha or one per record."""

    mean: Tensor
    std: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("mean", torch.zeros(shape.channels))
        self.register_buffer("std", torch.ones(shape.channels))
        self.linear = nn.Conv2d(shape.channels, shape.k, 1)
        self.context = Context(shape)
        self.spread = nn.Parameter(torch.zeros(shape.sent))
        self.growth = nn.Parameter(torch.zeros(shape.sent))
        self.allocation = Allocation(shape)

    def signal(self, z: Tensor, alpha: Tensor) -> Tensor:
        """b = B tanh(u / B), |b| <= B: [N, C, h, w] and [N] -> [N, k s^2, h / s, w / s].

        A u that is not a number becomes 0: a nan would cross the wire as a code no noise has touched.
        """
        n = (z - self.mean[:, None, None]) / self.std[:, None, None]
        scale = torch.exp(self.spread + alpha[:, None] * self.growth)[:, :, None, None]
        u = torch.nan_to_num(
            scale * spectrum(torch.nan_to_num(self.linear(n) + self.context(n, alpha)), self.shape.block)
        )
        return self.shape.bound * torch.tanh(u / self.shape.bound)

    def forward(self, z: Tensor, alpha: Tensor, noise: Tensor) -> Tensor:
        """y = g b + eps before quantisation; alpha [N], noise of the shape of y."""
        gain = channel.gain(self.allocation(alpha), self.shape.bound)[:, :, None, None]
        return torch.addcmul(noise, gain, self.signal(z, alpha))

    def codes(self, z: Tensor, alpha: Tensor, noise: Tensor) -> Tensor:
        """int8(y / step), what leaves; 0 in channels without bits, of which only noise could be told."""
        bits = self.allocation(alpha)[:, :, None, None]
        y: Tensor = self(z, alpha, noise)
        rounded = (y / channel.step(bits, self.shape.bound)).round_().clamp_(-channel.INT8_MAX, channel.INT8_MAX)
        return torch.where(bits > 0, rounded, 0).to(torch.int8)

    def estimate(self, y: Tensor, alpha: Tensor, size: tuple[int, int], *, releases: int = 1) -> Tensor:
        """Linear estimate of V n + R at every site [N, k, h, w], from y or a mean of several: an attacker's first step.

        Wiener scaling for a signal that fills its bound evenly (variance B^2 / 3); channels without bits give 0.
        """
        logs = self.spread + alpha[:, None] * self.growth
        return linear_estimate(y, self.allocation(alpha), logs, self.shape, size, releases)

    def bits_per_site(self, alpha: channel.Alpha, *, releases: float = 1) -> Tensor:
        """Capacity of one site in bits, [N]; of `releases` fresh releases of the same record together."""
        a = torch.as_tensor(alpha, dtype=torch.float32, device=self.mean.device).reshape(-1)
        bits = self.allocation(channel.as_alpha(a, len(a), a.device))
        return channel.repeated(bits, releases).sum(1) / self.shape.block**2

    def bits_per_record(self, alpha: channel.Alpha, sites: int, *, releases: float = 1) -> Tensor:
        """Capacity of a record of `sites` sites in bits, [N]; they count in whole blocks."""
        return sites * self.bits_per_site(alpha, releases=releases)
