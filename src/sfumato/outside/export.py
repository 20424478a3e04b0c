"""What runs outside, as modules that a tracer can follow: the tail, and `Answer`, the whole of it."""

import torch
from torch import Tensor, nn

from sfumato.core.programs import flat
from sfumato.core.restorer import Restorer
from sfumato.core.sites import unfold


class Named(nn.Module):
    """The tail with its outputs as a flat tuple, whatever it returns them in."""

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.tail = tail

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        return flat(self.tail(z))


class Answer(nn.Module):
    """The tensors of `core.wire`, in whole blocks -> outputs; nan for a row that is no release of this obfuscator.

    A graph cannot refuse, and nan is the answer nobody takes for one.
    """

    digest: Tensor

    def __init__(self, restorer: Restorer, tail: nn.Module, digest: str, ndim: int) -> None:
        super().__init__()
        self.restorer, self.tail, self.ndim = restorer, Named(tail), ndim
        self.register_buffer("digest", torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8).int())

    def forward(
        self, codes: Tensor, channels: Tensor, alpha: Tensor, sites: Tensor, digest: Tensor
    ) -> tuple[Tensor, ...]:
        powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.int32, device=codes.device)
        sent, block = self.restorer.shape.sent, self.restorer.shape.block
        bits = (torch.div(channels.int()[:, :, None], powers, rounding_mode="floor") % 2).flatten(1)
        mask = bits[:, :sent]
        count = torch.ones_like(codes[0, :, 0, 0], dtype=torch.int32).sum()  # a tracer would fix shapes as numbers
        # A row that lies about its channels must cost the others of its batch nothing, so none is out of range.
        place = torch.minimum(mask.cumsum(1) * mask, count)
        every = place[:, :, None, None].expand(-1, -1, codes.shape[2], codes.shape[3])
        zeros = torch.zeros_like(alpha)[:, :, None, None].expand(-1, -1, codes.shape[2], codes.shape[3])
        whole = torch.cat([zeros, codes.float()], 1).gather(1, every)
        restored = self.restorer.restore(whole, alpha[:, 0])
        once = torch.ones_like(zeros[0, 0], dtype=torch.int32)
        covered = block * torch.stack([once[:, 0].sum(), once[0].sum()])
        right = (digest.int() == self.digest).all(1) & (sites == covered).all(1)
        right &= (bits.sum(1) == count) & (mask.sum(1) == count) & (alpha >= 0).all(1) & (alpha < 1).all(1)
        answers = self.tail(unfold(restored, self.ndim))
        return tuple(torch.where(right.view(-1, *[1] * (answer.ndim - 1)), answer, torch.nan) for answer in answers)
