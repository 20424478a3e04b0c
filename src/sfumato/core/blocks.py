"""Blocks of s x s sites as an orthonormal cosine transform of them: U = T u T', T T' = I.

    T[p, i] = sqrt(2 / s) cos(pi (2 i + 1) p / (2 s)),   p > 0;      T[0, i] = sqrt(1 / s)                 (DCT-II)

Neighbouring sites resemble each other, so most of a block's variance is in few coefficients, and bits given to those
tell more than bits given to every site alike. T is orthonormal: noise that is white stays white, nothing is lost.
Source: Ahmed, Natarajan & Rao, "Discrete cosine transform", IEEE Trans. Computers 1974.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def spectrum(sites: Tensor, side: int) -> Tensor:
    """[N, k, h, w] -> [N, k s^2, ceil(h / s), ceil(w / s)], coefficients of a channel together; edges are repeated.

    Memory is channels last on both sides, here and in `sites_of`: so the layers before and after leave and want it.
    """
    if side == 1:
        return sites
    high, wide = sites.shape[2:]
    if high % side or wide % side:
        sites = F.pad(sites, (0, -wide % side, 0, -high % side), mode="replicate")
    apart = sites.permute(0, 2, 3, 1).unflatten(2, (-1, side)).unflatten(1, (-1, side))  # [N, H, s, W, s, k]
    blocks = apart.permute(0, 1, 3, 5, 2, 4).flatten(4)
    coefficients = blocks @ basis(side, blocks.device).T.to(blocks.dtype)
    placed: Tensor = coefficients.flatten(3).permute(0, 3, 1, 2)
    return placed


def sites_of(spectrum: Tensor, side: int, size: tuple[int, int] | None = None) -> Tensor:
    """Inverse of `spectrum`, cut to `size` (height, width): [N, k s^2, H, W] -> [N, k, h, w]."""
    if side == 1:
        return spectrum
    blocks = spectrum.permute(0, 2, 3, 1).unflatten(3, (-1, side * side))
    whole = (blocks @ basis(side, blocks.device).to(blocks.dtype)).unflatten(4, (side, side))  # [N, H, W, k, s, s]
    sites: Tensor = whole.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
    return sites if size is None else sites[:, :, : size[0], : size[1]]


class Part:
    """The transform and its inverse for some coefficients alone, numbered as `spectrum` numbers its channels.

    `channels` are those that any of the coefficients belongs to; sites [N, h, w, channels] have no others.
    """

    def __init__(self, numbers: Tensor, side: int) -> None:
        self.side = side
        self.channels, channel = (numbers // side**2).unique(return_inverse=True)
        used, row = (numbers % side**2).unique(return_inverse=True)
        self._rows = basis(side, numbers.device)[used].contiguous()
        self._columns = self._rows.T.contiguous()
        self._places = row * len(self.channels) + channel

    def spectrum(self, sites: Tensor) -> Tensor:
        """[N, h, w, channels] -> [N, H, W, numbers]; edges are repeated."""
        side, (high, wide) = self.side, sites.shape[1:3]
        if high % side or wide % side:
            edges = (0, -wide % side, 0, -high % side)
            sites = F.pad(sites.permute(0, 3, 1, 2), edges, mode="replicate").permute(0, 2, 3, 1)
        apart = sites.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)  # [N, H, W, s, s, channels]
        every = self._rows @ apart.reshape(-1, side**2, sites.shape[3])
        some: Tensor = every.flatten(1).index_select(1, self._places).unflatten(0, apart.shape[:3])
        return some

    def sites_of(self, some: Tensor, size: tuple[int, int]) -> Tensor:
        """[N, H, W, numbers] -> [N, h, w, channels] of `size` (h, w), the other coefficients being 0."""
        every = some.new_zeros(some.shape[:3].numel(), len(self._rows) * len(self.channels))
        every.index_copy_(1, self._places, some.flatten(0, 2))
        whole = self._columns @ every.unflatten(1, (len(self._rows), -1))
        apart = whole.view(*some.shape[:3], self.side, self.side, -1)
        sites: Tensor = apart.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, : size[0], : size[1]]
        return sites


@lru_cache
def basis(side: int, device: torch.device) -> Tensor:
    """T of both axes as one matrix [s^2, s^2], rows (p, q), columns (i, j)."""
    with torch.inference_mode(mode=False):
        place = torch.arange(side, dtype=torch.float64, device=device)
        t = torch.cos(torch.pi * (2 * place + 1) * place[:, None] / (2 * side)) * (2 / side) ** 0.5
        t[0] = side**-0.5
        return torch.kron(t, t).float()
