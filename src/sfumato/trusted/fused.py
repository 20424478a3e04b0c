"""The obfuscator at one alpha: what alpha fixes is computed once, and channels without bits are never computed.

    codes = round(a tanh(m T h) + w eps),  a = g B / step,  m = e^(p + alpha r) / B,  w = 1 / step

h are the sites after convolutions into which the normalisation and what alpha modulates are folded; T picks the
coefficients that carry bits. `Obfuscator.codes` says what it must give, and is the oracle of its tests.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core import channel
from sfumato.core.blocks import spectrum
from sfumato.core.film import Film
from sfumato.core.obfuscator import Obfuscator

Normals = Callable[[int, tuple[int, ...]], Tensor]


class Fused:
    """For any number of records of one alpha; holds weights of its own, on the obfuscator's device."""

    @torch.inference_mode()
    def __init__(self, obfuscator: Obfuscator, alpha: float) -> None:
        self.shape = shape = obfuscator.shape
        a = torch.tensor([alpha], dtype=torch.float32, device=obfuscator.mean.device)
        bits = obfuscator.allocation(a)
        self.carrying = obfuscator.allocation.carrying(a)
        self.bits_per_site = float(bits.sum()) / shape.block**2
        width = channel.step(bits, shape.bound)[0, self.carrying]
        scale = torch.exp(obfuscator.spread + alpha * obfuscator.growth)[self.carrying]
        self.inner = scale / shape.bound
        self.peak = channel.gain(bits, shape.bound)[0, self.carrying] * shape.bound / width
        self.per_code = 1 / width
        context = obfuscator.context
        self.enter = _normalised([obfuscator.linear, context.enter], obfuscator.mean, obfuscator.std)
        self.near = _modulated(context.near, context.near_film, a)
        self.between = _plain(context.between)
        self.far = _modulated(context.far, context.far_film, a)
        self.leave = _plain(context.leave)

    def __call__(self, z: Tensor, normals: Normals) -> Tensor:
        """z [N, C, h, w] -> codes int8 [N, k s^2, H, W]; normals(records, shape) gives as many as there are to send."""
        _, high, wide = self.shape.codes(z.shape[2:])
        eps = normals(len(z), (high, wide, len(self.carrying))).to(z.device)
        return self.placed(self.signal(z).addcmul_(eps, self.per_code))

    def signal(self, z: Tensor) -> Tensor:
        """z [N, C, h, w] -> g b / step [N, H, W, channels that carry bits]."""
        m = self.shape.context
        both = F.conv2d(z, *self.enter)
        h = both[:, self.shape.k :].contiguous(memory_format=torch.channels_last).relu_()
        h = F.conv2d(h, *self.near, padding=2, groups=m).relu_()
        h = F.conv2d(h, *self.between).relu_()
        h = F.conv2d(h, *self.far, padding=2, groups=m).relu_()
        sites = F.conv2d(h, *self.leave).add_(both[:, : self.shape.k]).nan_to_num_()
        u = spectrum(sites, self.shape.block).permute(0, 2, 3, 1).index_select(3, self.carrying)
        return u.mul_(self.inner).nan_to_num_().tanh_().mul_(self.peak)

    def placed(self, y: Tensor) -> Tensor:
        """y / step [N, H, W, channels that carry bits] -> codes int8 [N, k s^2, H, W]; y is overwritten."""
        most = channel.INT8_MAX
        codes = torch.zeros(*y.shape[:3], self.shape.sent, dtype=torch.int8, device=y.device)
        codes.index_copy_(3, self.carrying, y.round_().clamp_(-most, most).to(torch.int8))
        return codes.permute(0, 3, 1, 2)


Weights = tuple[Tensor, Tensor]


def _plain(layer: nn.Conv2d) -> Weights:
    assert layer.bias is not None
    return layer.weight.contiguous(memory_format=torch.channels_last), layer.bias


def _normalised(layers: list[nn.Conv2d], mean: Tensor, std: Tensor) -> Weights:
    """1x1 convolutions of (z - mean) / std side by side, as one of z."""
    weight = torch.cat([layer.weight for layer in layers]) / std[:, None, None]
    bias = torch.cat([layer.bias for layer in layers if layer.bias is not None]) - weight[:, :, 0, 0] @ mean
    return weight.contiguous(memory_format=torch.channels_last), bias


def _modulated(layer: nn.Conv2d, film: Film, alpha: Tensor) -> Weights:
    """A convolution and what `film` makes of it at alpha, as one convolution."""
    weight, bias = _plain(layer)
    scale, shift = film.modulation(alpha)
    return weight * (1 + scale[0, :, None, None, None]), bias * (1 + scale[0]) + shift[0]
