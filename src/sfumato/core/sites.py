"""A cut tensor as sites: [N, C, h, w] whatever the model speaks.

A site is what one spatial position, one token or one whole vector releases. [N, C, h, w] stays as it is, tokens
[N, T, C] become [N, C, T, 1] and vectors [N, C] become [N, C, 1, 1]; `unfold` undoes it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.core.errors import RequestError


def stack(inputs: Sequence[Tensor]) -> Tensor:
    """Model inputs of one shape -> a batch; pictures [C, H, W] in channels-last memory: twice as fast on a CPU.

    A plain torch.stack would lay them out channels first, whatever they were.
    """
    if inputs[0].ndim != 3:
        return torch.stack(list(inputs))
    batch = torch.empty((len(inputs), *inputs[0].shape), dtype=inputs[0].dtype, memory_format=torch.channels_last)
    for row, one in zip(batch, inputs, strict=True):
        row.copy_(one)
    return batch


def fold(z: Tensor) -> Tensor:
    """[N, C, h, w], [N, T, C] or [N, C] -> [N, C, h, w]."""
    if z.ndim == 4:
        return z
    if z.ndim == 3:
        return z.transpose(1, 2).unsqueeze(-1)
    if z.ndim == 2:
        return z[:, :, None, None]
    raise RequestError(
        f"a cut tensor of shape {list(z.shape)}",
        wanted="[N, C, h, w], [N, tokens, C] or [N, C]",
        do="cut the model elsewhere (sfumato.split(model) lists the places)",
    )


def unfold(sites: Tensor, ndim: int) -> Tensor:
    """Inverse of `fold` for a tensor of `ndim` dimensions."""
    if ndim == 4:
        return sites
    if ndim == 3:
        return sites.squeeze(-1).transpose(1, 2)
    return sites[:, :, 0, 0]
