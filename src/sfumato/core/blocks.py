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
    """[N, k, h, w] -> [N, k s^2, ceil(h / s), ceil(w / s)], coefficients of a channel together; edges are repeated."""
    if side == 1:
        return sites
    high, wide = sites.shape[2:]
    if high % side or wide % side:
        sites = F.pad(sites, (0, -wide % side, 0, -high % side), mode="replicate")
    blocks = F.pixel_unshuffle(sites, side).unflatten(1, (-1, side * side)).flatten(3)
    coefficients: Tensor = (_basis(side, blocks.device).to(blocks.dtype) @ blocks).flatten(1, 2)
    placed: Tensor = coefficients.unflatten(2, (-(-high // side), -1))
    return placed


def sites_of(spectrum: Tensor, side: int, size: tuple[int, int] | None = None) -> Tensor:
    """Inverse of `spectrum`, cut to `size` (height, width): [N, k s^2, H, W] -> [N, k, h, w]."""
    if side == 1:
        return spectrum
    blocks = spectrum.unflatten(1, (-1, side * side)).flatten(3)
    whole = (_basis(side, blocks.device).T.to(blocks.dtype) @ blocks).flatten(1, 2)
    sites = F.pixel_shuffle(whole.unflatten(2, (spectrum.shape[2], -1)), side)
    return sites if size is None else sites[:, :, : size[0], : size[1]]


@lru_cache
def _basis(side: int, device: torch.device) -> Tensor:
    """T of both axes as one matrix [s^2, s^2], rows (p, q), columns (i, j)."""
    with torch.inference_mode(mode=False):
        place = torch.arange(side, dtype=torch.float64, device=device)
        t = torch.cos(torch.pi * (2 * place + 1) * place[:, None] / (2 * side)) * (2 / side) ** 0.5
        t[0] = side**-0.5
        return torch.kron(t, t).float()
