"""x (1 + s(alpha)) + t(alpha): features that know how much is withheld (FiLM, arXiv 1709.07871, equation 1)."""

import torch
from torch import Tensor, nn

_WIDTH = 32
Weights = tuple[Tensor, Tensor]


class Film(nn.Module):
    """x [N, c, h, w] and alpha [N] -> [N, c, h, w]; the identity when new."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, _WIDTH)
        self.out = nn.Linear(_WIDTH, 2 * channels)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def modulation(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """[N] -> s and t [N, c]."""
        seen = torch.stack([alpha, torch.log1p(-alpha)], 1)
        scale, shift = self.out(torch.relu(self.hidden(seen))).chunk(2, dim=1)
        return scale, shift

    def forward(self, x: Tensor, alpha: Tensor) -> Tensor:
        scale, shift = self.modulation(alpha)
        modulated: Tensor = torch.addcmul(shift[:, :, None, None], x, 1 + scale[:, :, None, None])
        return modulated


def modulated(layer: nn.Conv2d, film: Film, alpha: Tensor) -> Weights:
    """Weight and bias of the one convolution that is `film` after `layer`, at one alpha [1]."""
    assert layer.bias is not None
    scale, shift = film.modulation(alpha)
    weight = layer.weight * (1 + scale[0, :, None, None, None])
    return weight.contiguous(memory_format=torch.channels_last), layer.bias * (1 + scale[0]) + shift[0]
