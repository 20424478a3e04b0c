"""What no attacker can exceed, and two local estimates: capacity, Gaussian rate, Fisher information.

    bits(n, K) = m sum_i c_i(K)                                       n sites in m blocks, K releases          (7)
    R = sum_f m 1/2 log2 det(1 + K G_f S_f G_f), at most bits(n, K)                           S_f the          (8)
        covariance of b in coefficient f of a block
    I(x) = J^T J,  J the Jacobian of x -> g b(head(x)),  tr I = E |J^T v|^2       v Rademacher            (9), (10)
    MSE >= d / tr I = 1 / eta^2                                                   d numbers a record, dFIL eta (11)

(7) is a theorem for every attacker. (8) holds for every attacker too, but of records with the covariance S, which is
estimated from those given. (11) is one for unbiased attackers, near the records it was computed on: a decoder that
knows what records look like is biased, and may do better than (11) says.

Shapes: c, g [k], S [k, k], J [k h w, d]. Needs: the client's side. Errors: RequestError where sites, releases, probes
or records are too few, where a task's preprocessing is not affine in pixels, and where a head has no gradient.
Sources: Cover and Thomas, 2nd ed., sections 8.6, 9.4 and 17.9; dFIL: arXiv 2305.04146; limits of such bounds: arXiv
2404.02866; Hutchinson, Commun. Stat. Simul. Comput. 19 (1990). Derivations, numbered alike: docs/mechanism.md.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from sfumato.core import channel
from sfumato.core.errors import RequestError
from sfumato.core.obfuscator import Obfuscator
from sfumato.core.sites import fold
from sfumato.core.task import Image, Task
from sfumato.trusted.protect import Protected

FACE = 49  # sites: 7 x 7, a face of 220 pixels (LFW's at 512 x 512) under sites 32 pixels apart
REPEATS = 64
PROBES = 8
LEVELS = 255.0
_RESAMPLES = 1000
_BATCH = 16
_AFFINE = (
    0.05  # grey levels a preprocessing may stray from a line; float32 strays by thousandths, a curve by whole ones
)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure computed on `records`, with its 95 % bootstrap interval over them."""

    mean: float
    low: float
    high: float
    records: int


@dataclass(frozen=True)
class Fisher:
    """dFIL `eta`, and `rmse`, the least root mean squared error of an unbiased reconstruction, in grey levels of 255.

    `flat_rmse` is reached without any release, by answering with the best flat picture: where it is the smaller one,
    the bound binds nobody who knows that much.
    """

    eta: Estimate
    rmse: Estimate
    flat_rmse: float
    probes: int


@dataclass(frozen=True)
class Certificate:
    """For one alpha: bits of a record, of a region, of `repeats` releases; the Gaussian rate; the Fisher bound."""

    alpha: float
    sites: int
    bits: float
    region_sites: int
    region_bits: float
    repeats: int
    repeated_bits: float
    rate: Estimate
    eta: Estimate
    rmse: Estimate
    flat_rmse: float
    probes: int


def certify(
    protected: Protected,
    records: Sequence[Image],
    z: np.ndarray,
    alpha: float,
    *,
    region: int = FACE,
    repeats: int = REPEATS,
    probes: int = PROBES,
    seed: int = 0,
) -> Certificate:
    """Everything at once: the rate from head outputs z, the Fisher bound from records of the input size."""
    obfuscator = protected.obfuscator
    sites = obfuscator.shape.coded(fold(torch.from_numpy(z[:1])).shape[2:])
    region = touched(obfuscator.shape.block, region, sites)
    found = fisher(protected, records, alpha, probes=probes, seed=seed)
    return Certificate(
        alpha,
        sites,
        capacity(obfuscator, alpha, sites),
        region,
        capacity(obfuscator, alpha, region),
        repeats,
        capacity(obfuscator, alpha, sites, releases=repeats),
        rate(obfuscator, z, alpha, seed=seed),
        found.eta,
        found.rmse,
        found.flat_rmse,
        probes,
    )


def touched(block: int, region: int, sites: int) -> int:
    """Sites of all blocks that a square of `region` sites can lie in: what codes it can speak through."""
    if block == 1:
        return min(region, sites)
    side = math.isqrt(region - 1) + 1
    across = math.ceil((side - 1) / block) + 1
    return min(sites, (across * block) ** 2)


def capacity(obfuscator: Obfuscator, alpha: float, sites: int, *, releases: int = 1) -> float:
    """Most bits that the codes of `sites` sites carry, in `releases` releases of one record together."""
    _at_least(1, sites=sites, releases=releases)
    return float(obfuscator.bits_per_record(alpha, sites, releases=releases).detach())  # (7)


def rate(obfuscator: Obfuscator, z: np.ndarray, alpha: float, *, releases: int = 1, seed: int = 0) -> Estimate:
    """Most bits that a record of such covariance sends, at most `capacity`; z [n, C, h, w], or as the head gives it."""
    _at_least(1, releases=releases)
    _at_least(2, records=len(z))
    # The first row is the sample itself, the others resample whole records: sites of one record are no separate draws.
    weights = np.vstack([np.full(len(z), 1 / len(z)), _resamples(len(z), seed)])
    shape = obfuscator.shape
    bits = obfuscator.allocation(channel.as_alpha(alpha, 1, obfuscator.mean.device)).detach().cpu().double()
    most = channel.repeated(bits, releases).view(shape.k, -1).sum(0).numpy()
    gain = channel.gain(bits, shape.bound).view(shape.k, -1).numpy()
    b = _signals(obfuscator, z, alpha)
    values = np.zeros(len(weights))
    for f in np.flatnonzero(most):
        s = covariance(*_moments(b[:, :, f], weights))
        values += b.shape[3] * np.minimum(gaussian_rate(s, gain[:, f], releases), most[f])
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return Estimate(float(values[0]), float(low), float(high), len(z))


def covariance(first: Floats, second: Floats) -> Floats:
    """S = E[b b^T] - E[b] E[b]^T [..., k, k], divided by the number of blocks and so at most B^2 on the diagonal."""
    return np.asarray(second - first[..., :, None] * first[..., None, :])


def gaussian_rate(s: Floats, gain: Floats, releases: int = 1) -> Floats:
    """1/2 log2 det(1 + K G S G), bits a block, for every S of [..., k, k] and gain of [..., k]."""
    inside = np.eye(gain.shape[-1]) + releases * gain[..., :, None] * s * gain[..., None, :]
    return np.asarray(np.linalg.slogdet(inside)[1] / math.log(4))  # (8)


@torch.inference_mode()
def _signals(obfuscator: Obfuscator, z: np.ndarray, alpha: float) -> np.ndarray:
    """b of every record, [n, k, s^2, m] float32: m blocks of s^2 coefficients."""
    parts = []
    for start in range(0, len(z), _BATCH):
        part = fold(torch.from_numpy(z[start : start + _BATCH].astype(np.float32)).to(obfuscator.mean.device))
        b = obfuscator.signal(part, channel.as_alpha(alpha, len(part), part.device)).flatten(2)
        parts.append(b.unflatten(1, (obfuscator.shape.k, -1)).cpu())
    return torch.cat(parts).numpy()


def _moments(b: np.ndarray, weights: Floats) -> tuple[Floats, Floats]:
    """E[b] [r, k] and E[b b^T] [r, k, k] over the blocks of b [n, k, m], its records weighted by [r, n]."""
    b = b.astype(np.float64)
    return weights @ b.mean(2), np.tensordot(weights, b @ b.transpose(0, 2, 1) / b.shape[2], 1)


def fisher(
    protected: Protected, records: Sequence[Image], alpha: float, *, probes: int = PROBES, seed: int = 0
) -> Fisher:
    """The bound of (11) at the model's input size, over `records`.

    d / mean tr I, and not the mean of d / tr I: by Jensen's inequality it is the smaller of the two, so it bounds the
    mean error of these records as well, and the scatter of few probes does not push it up.
    """
    _at_least(1, probes=probes)
    _at_least(2, records=len(records))
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(mode=False), torch.enable_grad():
        encode = _encoder(protected, alpha)
        found = np.array([_leakage(encode, protected, record, probes, generator) for record in records])
    leak, mean, square = found.T
    low, high = np.quantile(_resamples(len(leak), seed) @ leak, (0.025, 0.975))
    eta = Estimate(math.sqrt(leak.mean()), math.sqrt(low), math.sqrt(high), len(leak))
    rmse = Estimate(1 / eta.mean, 1 / eta.high, 1 / eta.low, len(leak))  # (11)
    return Fisher(eta, rmse, math.sqrt(max(0.0, float(square.mean() - mean.mean() ** 2))), probes)


def _encoder(protected: Protected, alpha: float) -> Callable[[Tensor], Tensor]:
    """x -> g b(head(x)), the mean of y; differentiable even where the modules were made in inference mode."""
    head, obfuscator = _differentiable(protected.head), _differentiable(protected.obfuscator)
    shape = protected.obfuscator.shape

    def encode(x: Tensor) -> Tensor:
        sites = fold(head(x))
        silence = sites.new_zeros(len(sites), *shape.codes(sites.shape[2:]))
        return obfuscator(sites, channel.as_alpha(alpha, len(sites), sites.device), silence)

    return encode


def _differentiable(module: nn.Module) -> Callable[..., Tensor]:
    # A tensor made in inference mode takes no part in autograd; its clone made outside does.
    state = {name: tensor.detach().clone() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}

    def call(*inputs: Tensor) -> Tensor:
        answer: Tensor = functional_call(module, state, inputs)
        return answer

    return call


def _leakage(
    encode: Callable[[Tensor], Tensor], protected: Protected, record: Image, probes: int, generator: torch.Generator
) -> tuple[float, float, float]:
    """eta^2 = tr I / d of one record, in units of a grey level; mean and mean square of its pixels."""
    black, scale = _pixels(protected.task, record)
    plain = protected.task.preprocess(record)
    x = plain.detach().clone()[None].to(protected.obfuscator.mean.device).requires_grad_()
    y = encode(x)
    if not y.requires_grad:
        raise RequestError("a head without a gradient", wanted="a head that autograd can follow")
    total = 0.0
    for _ in range(probes):
        v = torch.randint(2, y.shape, generator=generator).to(y) * 2 - 1
        (pulled,) = torch.autograd.grad(y, x, v, retain_graph=True)  # (9): J^T v
        total += float((pulled[0].cpu() * scale).double().square().sum())  # (10)
    pixels = ((plain - black) / scale).double()
    return total / probes / x.numel(), float(pixels.mean()), float(pixels.square().mean())


def _pixels(task: Task, record: Image) -> tuple[Tensor, Tensor]:
    """The model's input for black, and its rise for each grey level. Raises RequestError where that is no constant."""
    black, grey, white = (task.preprocess(np.full_like(record, level)) for level in (0, 51, 255))
    scale = (white - black) / LEVELS
    if not bool((scale != 0).all()) or not bool((((grey - black) / scale - 51).abs() <= _AFFINE).all()):
        raise RequestError(
            f"task {task.name}, whose preprocessing is not affine in pixels",
            wanted="input = offset + scale * pixel, so that an error has the unit of a grey level",
        )
    return black, scale


def _resamples(records: int, seed: int) -> Floats:
    """The weight of every record in every bootstrap sample, [_RESAMPLES, records]."""
    draw = np.random.default_rng([seed, 1979])
    return np.asarray(draw.multinomial(records, np.full(records, 1 / records), _RESAMPLES) / records)


def _at_least(least: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < least:
            raise RequestError(f"{number} {name}", wanted=f"at least {least}")
