"""A closed-form start: the transform coder that is optimal for a linear encoder and a quadratic loss.

With Sigma the covariance of n = (z - mean)/std at a site and M its importance to the task, the channels are the
eigenvectors of M^1/2 Sigma M^1/2 (Karhunen-Loeve in the task's metric) and their bits are reverse water-filling,
c_i = max(0, 1/2 log2 lambda_i - theta); a cosine transform then spreads each channel's variance over the coefficients
of a block, lambda_if = lambda_i times the coefficient's share. M is estimated from gradients: for
d = |f(z + delta) - f(z)|^2 and small delta ~ N(0, s^2 I) the gradient is H delta, so M = H = cov(gradient)^1/2 up to
scale.

Sources: Cover & Thomas, 2nd ed., section 10.3.3 (reverse water-filling); Huang & Schultheiss 1963 (transform coding).
"""

import math

import torch
from torch import Tensor

from sfumato.core.blocks import spectrum
from sfumato.core.obfuscator import Obfuscator
from sfumato.core.restorer import Restorer

SPREAD = 1.0  # standard deviation of u at alpha 0, half the default bound: more would clip the tails, where faces live


def sqrt_psd(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def initialise(obfuscator: Obfuscator, restorer: Restorer, z: Tensor, gradients: Tensor) -> None:
    """Set both modules from a sample: z [n, C, h, w] and the task's gradient by it, same shape."""
    shape = obfuscator.shape
    rows = z.transpose(0, 1).flatten(1).double()
    mean, std = rows.mean(1), rows.std(1).clamp_min(1e-6)
    n = (rows - mean[:, None]) / std[:, None]
    g = gradients.transpose(0, 1).flatten(1).double() * std[:, None]
    sigma = torch.cov(n)
    metric = sqrt_psd(g @ g.T / g.shape[1])
    metric = metric / metric.diagonal().mean().clamp_min(1e-12)
    root = sqrt_psd(metric + 1e-3 * torch.eye(len(sigma), dtype=torch.float64, device=z.device))
    values, vectors = torch.linalg.eigh(root @ sigma @ root)
    order = values.argsort(descending=True)[: shape.k]
    values = values[order].clamp_min(1e-9)
    encode = SPREAD * (vectors[:, order] / values.sqrt()).T @ root
    decode = sigma @ encode.T @ torch.linalg.pinv(encode @ sigma @ encode.T)
    shares = _shares(encode, (z - mean[:, None, None].float()) / std[:, None, None].float(), shape.block)
    levels = 0.5 * torch.log2(values[:, None] * shares).flatten()
    levels = levels - levels.mean()
    with torch.no_grad():
        for module in (obfuscator, restorer):
            module.mean.copy_(mean)
            module.std.copy_(std)
            module.allocation.w.fill_(float(levels.min()) - 1)[: len(levels)].copy_(levels)
            module.allocation.v.zero_()
        obfuscator.linear.weight.zero_()[: len(encode), :, 0, 0].copy_(encode)
        obfuscator.linear.bias.zero_()  # type: ignore[union-attr]
        obfuscator.spread.zero_()[: len(levels)].copy_(-0.5 * torch.log(shares.flatten()))
        obfuscator.growth.zero_()
        _quiet(obfuscator.context.leave)
        restorer.log_variance.fill_(2 * math.log(SPREAD))
        restorer.variance_growth.zero_()
        restorer.spread.copy_(-obfuscator.spread)
        restorer.growth.zero_()
        restorer.lift.weight.zero_()[:, : decode.shape[1], 0, 0].copy_(decode)
        restorer.lift.bias.zero_()  # type: ignore[union-attr]
        _quiet(restorer.near.mix)
        _quiet(restorer.far.mix)


def _shares(encode: Tensor, n: Tensor, block: int) -> Tensor:
    """Mean square of every coefficient of V n, for V n of variance 1: [k, s^2], no less than a thousandth."""
    signals = torch.einsum("kc,nchw->nkhw", encode.to(n.dtype) / SPREAD, n)
    power = spectrum(signals, block).square().mean((0, 2, 3)).view(len(encode), -1)
    return power.clamp_min(1e-3).double()


def _quiet(layer: torch.nn.Module) -> None:
    """A branch that starts at zero."""
    for parameter in layer.parameters():
        parameter.zero_()
