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
from sfumato.core.blocks import Part
from sfumato.core.film import Weights, modulated
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
        context, self.part = obfuscator.context, Part(self.carrying, shape.block)
        live = self.part.channels  # the others are not computed either
        self.enter = _normalised(context.enter, obfuscator.mean, obfuscator.std)
        linear, bias = _normalised(obfuscator.linear, obfuscator.mean, obfuscator.std)
        self.linear = linear[live, :, 0, 0].T.contiguous()
        self.leave = context.leave.weight[live, :, 0, 0].T.contiguous()
        assert context.leave.bias is not None
        self.bias = (bias + context.leave.bias)[live]
        self.near = modulated(context.near, context.near_film, a)
        self.between = _plain(context.between)
        self.far = modulated(context.far, context.far_film, a)

    def __call__(self, z: Tensor, normals: Normals) -> Tensor:
        """z [N, C, h, w] -> codes int8 [N, k s^2, H, W]; normals(records, shape) gives as many as there are to send."""
        _, high, wide = self.shape.codes(z.shape[2:])
        eps = normals(len(z), (high, wide, len(self.carrying))).to(z.device)
        return self.placed(self.signal(z).addcmul_(eps, self.per_code))

    def signal(self, z: Tensor) -> Tensor:
        """z [N, C, h, w] -> g b / step [N, H, W, channels that carry bits]."""
        m = self.shape.context
        h = F.conv2d(z, *self.enter).relu_()
        h = F.conv2d(h, *self.near, padding=2, groups=m).relu_()
        h = F.conv2d(h, *self.between).relu_()
        h = F.conv2d(h, *self.far, padding=2, groups=m).relu_()
        sites = torch.addmm(self.bias, _rows(z), self.linear).addmm_(_rows(h), self.leave).nan_to_num_()
        u = self.part.spectrum(sites.view(len(z), *z.shape[2:], -1))
        return u.mul_(self.inner).nan_to_num_().tanh_().mul_(self.peak)

    def placed(self, y: Tensor) -> Tensor:
        """y / step [N, H, W, channels that carry bits] -> codes int8 [N, k s^2, H, W]; y is overwritten."""
        most = channel.INT8_MAX
        codes = torch.zeros(*y.shape[:3], self.shape.sent, dtype=torch.int8, device=y.device)
        codes.index_copy_(3, self.carrying, y.round_().clamp_(-most, most).to(torch.int8))
        return codes.permute(0, 3, 1, 2)


def _plain(layer: nn.Conv2d) -> Weights:
    assert layer.bias is not None
    return layer.weight.contiguous(memory_format=torch.channels_last), layer.bias


def _rows(x: Tensor) -> Tensor:
    """[N, C, h, w] -> [N h w, C], a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _normalised(layer: nn.Conv2d, mean: Tensor, std: Tensor) -> Weights:
    """A 1x1 convolution of (z - mean) / std, as one of z."""
    assert layer.bias is not None
    weight = layer.weight / std[:, None, None]
    return weight.contiguous(memory_format=torch.channels_last), layer.bias - weight[:, :, 0, 0] @ mean
