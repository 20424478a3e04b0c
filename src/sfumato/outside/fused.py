"""The restorer at one alpha: what alpha fixes is computed once, and coefficients without bits are never computed.

    z' = mean + std (x + M2 relu(D2 x)),   x = l + M1 relu(D1 l),   l = W T^-1 s codes

s is the step times the Wiener scaling; what alpha modulates is folded into the depthwise D, mean and std into the last
layer. `Restorer.restore` says what it must give, and is the oracle of its tests.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.core import channel
from sfumato.core.blocks import Part
from sfumato.core.film import modulated
from sfumato.core.restorer import Restorer


class Fused:
    """For any number of records of one alpha; holds weights of its own, on the restorer's device."""

    @torch.inference_mode()
    def __init__(self, restorer: Restorer, alpha: float) -> None:
        shape = restorer.shape
        a = torch.tensor([alpha], dtype=torch.float32, device=restorer.mean.device)
        bits = restorer.allocation(a)
        self.carrying = restorer.allocation.carrying(a)
        self.scale = (channel.step(bits, shape.bound) * restorer.wiener(bits, a))[0, self.carrying]
        self.part = Part(self.carrying, shape.block)
        lift, near, far = restorer.lift, restorer.near, restorer.far
        assert lift.bias is not None and near.mix.bias is not None and far.mix.bias is not None
        self.lift = lift.weight[:, self.part.channels, 0, 0].T.contiguous(), lift.bias
        self.near, self.far = modulated(near.depthwise, near.film, a), modulated(far.depthwise, far.film, a)
        self.mix = near.mix.weight[:, :, 0, 0].T.contiguous(), near.mix.bias
        std = self.std = restorer.std
        self.leave = (std * far.mix.weight[:, :, 0, 0].T).contiguous(), restorer.mean + std * far.mix.bias

    def __call__(self, codes: Tensor, size: tuple[int, int]) -> Tensor:
        """Codes int8 [N, k s^2, H, W] -> z' [N, C, h, w] of `size` (h, w)."""
        some = codes.permute(0, 2, 3, 1).index_select(3, self.carrying).to(self.scale.dtype).mul_(self.scale)
        sites = self.part.sites_of(some, size)
        count, channels = (len(codes), *size), len(self.std)

        def refined(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            h = F.conv2d(x.view(*count, channels).permute(0, 3, 1, 2), weight, bias, padding=2, groups=channels)
            return h.relu_().permute(0, 2, 3, 1).flatten(0, 2)

        x = torch.addmm(self.lift[1], sites.flatten(0, 2), self.lift[0])
        h = refined(x, *self.near)  # before x is added to in place
        x = x.add_(self.mix[1]).addmm_(h, self.mix[0])
        h = refined(x, *self.far)
        z = torch.addcmul(self.leave[1], self.std, x).addmm_(h, self.leave[0])
        return z.view(*count, channels).permute(0, 3, 1, 2)
