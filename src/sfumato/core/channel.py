"""The capacity algebra of the release: k parallel channels per site, unit noise, bounded signal.

A site sends y = g b + eps with |b| <= B and eps ~ N(0, I). With A = g B, for every distribution of b,

    I(b; y) <= 1/2 log2(1 + A^2)          of power A^2 at most (Shannon)
    I(b; y) <= log2(1 + A / q)            of peak A, q = sqrt(pi e / 2) (McKellips)                    (capacity)

per channel, and their sum over channels. A channel that may carry c bits gets the largest A that one of the two allows,

    A(c) = max(sqrt(2^(2 c) - 1), q (2^c - 1)),    g = A(c) / B                                        (reach)

the first below .69 bits, the second above. The bits are poured as water,

    c_i = max(0, w_i + alpha v_i - theta),    sum_i c_i = (1 - alpha) C_ref                            (allocation)

so alpha is the share of the bits withheld, and where bits are few they go to the channels that matter most.
K releases of one record under fresh noise have a sufficient mean with noise of variance 1 / K, so A grows to sqrt(K) A:

    c_i(K) = min(1/2 log2(1 + K A^2), log2(1 + sqrt(K) A / q))                                         (repeats)

Sources: Cover & Thomas, Elements of Information Theory, 2nd ed., sections 9.1 and 9.4 (parallel Gaussian channels) and
10.3.3 (reverse water-filling); A. L. McKellips, "Simple tight bounds on capacity for the peak-limited discrete-time
channel", ISIT 2004; arXiv 1602.02068, algorithm 1 (theta by sorting). Derivation: docs/mechanism.md.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.core.errors import AlphaError

# Standard deviations of noise the int8 wire has room for beside the signal; beyond it a code saturates,
# which is processing after the noise and so can only lose information.
NOISE_ROOM = 4.0
INT8_MAX = 127
PEAK = math.sqrt(math.pi * math.e / 2)  # q of the module's equations
_LN2, _LN4 = math.log(2), 2 * math.log(2)  # 2^c = e^(c ln 2), 2^(2 c) = e^(c ln 4)
_KNEE = math.log2((PEAK**2 + 1) / (PEAK**2 - 1))  # bits from which the peak bound is the tighter one
_FLAT = 1e-12  # below this ratio the gain is linear in it, so that its gradient stays finite at zero bits

Alpha = float | Sequence[float] | Tensor


def as_alpha(alpha: Alpha, records: int, device: torch.device | str = "cpu") -> Tensor:
    """One alpha or one per record -> [N] float32. Raises AlphaError outside [0, 1)."""
    try:
        a = torch.as_tensor(alpha, dtype=torch.float32, device=device).reshape(-1)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise AlphaError("alpha is not a number", wanted="a number in [0, 1)", do="--alpha 0.8") from None
    if a.numel() not in (1, records):
        raise AlphaError(f"{a.numel()} alphas for {records} records", wanted="one, or one per record")
    if not bool(((a >= 0) & (a < 1)).all()):
        bad = [v for v in a.tolist() if not 0 <= v < 1]
        raise AlphaError(
            f"alpha = {bad[0]:g}", wanted="0 <= alpha < 1, the share of the bits withheld", do="--alpha 0.8"
        )
    return (a + 0.0).expand(records)  # -0 is 0


def allocate(w: Tensor, v: Tensor, alpha: Tensor, c_ref: float) -> Tensor:
    """c = max(0, w + alpha v - theta), theta such that they sum to (1 - alpha) C_ref: [N, k] for alpha [N]."""
    a = alpha[:, None]
    levels = w + a * v
    levels = levels - levels.amax(1, keepdim=True)  # the few bits left near alpha 1 keep their digits
    ordered = levels.sort(dim=1, descending=True).values
    count = torch.arange(1, levels.shape[1] + 1, device=levels.device)
    waters = (ordered.cumsum(1) - (1 - a) * c_ref) / count  # theta, were the `count` highest levels the active ones
    active = (ordered > waters).sum(1, keepdim=True).clamp_min(1)  # 0 only of levels that are no numbers
    return torch.relu(levels - waters.gather(1, active - 1))


def reach(bits: Tensor) -> Tensor:
    """A = max(sqrt(2^(2 c) - 1), q (2^c - 1)): the peak of g b, in deviations of the noise, that c bits afford."""
    ratio = torch.expm1(bits * _LN4)
    return torch.maximum(ratio / ratio.clamp_min(_FLAT).sqrt(), PEAK * torch.expm1(bits * _LN2))


def gain(bits: Tensor, bound: float) -> Tensor:
    """g = A(c) / B, and never more: zero bits get no gain at all."""
    return reach(bits) / bound


def step(bits: Tensor, bound: float) -> Tensor:
    """Width of one int8 code, (g B + 4) / 127, same shape as `bits`."""
    return (gain(bits, bound) * bound + NOISE_ROOM) / INT8_MAX


def repeated(bits: Tensor, releases: float) -> Tensor:
    """Bits after K releases of one record under fresh noise; see (repeats). K need not be whole: it is 1 / variance.

    Written as c and what K adds to it, which is exact at K = 1 and finite for any c: from the knee on
    log2(1 + (sqrt(K) - 1)(1 - 2^-c)), below it the smaller of 1/2 log2(1 + (K - 1)(1 - 2^(-2 c))) and the peak bound.
    """
    peaked = bits + torch.log1p((math.sqrt(releases) - 1) * -torch.expm1(-bits * _LN2)) / _LN2
    power = bits + torch.log1p((releases - 1) * -torch.expm1(-bits * _LN4)) / _LN4
    few = torch.log1p(math.sqrt(releases) * reach(bits.clamp(max=_KNEE)) / PEAK) / _LN2
    return torch.where(bits > _KNEE, peaked, power.minimum(few))
