"""Frames of one scene: a block that has not changed leaves as the codes it left as before, so it leaves once.

    d = mean over what is sent of a block of (g b_t - g b_ref)^2            in variances of the noise
    d <= STILL: the codes of the last refresh again;   d > STILL: new codes under fresh noise, and b_ref = b_t

Between two refreshes the noise of a block has correlation 1 along time, across a refresh 0: N frames in which r of the
N B blocks were refreshed are r releases of a block, not N, and averaging gains what averaging r of them would. Noise
that is only partly the same (correlation rho) would let a still scene out 1 / rho times, and let all that moves out
under noise of variance 1 - rho: here neither is paid. What frames tell besides is which blocks were refreshed, at most

    log2 C(N B, r) + log2(N B + 1) bits                                                                (positions)

(how many, then which). `Release.bits` of a frame is what it adds: refreshed blocks times a block's capacity, and the
growth of (positions). Enumerative bound: Cover & Thomas, Elements of Information Theory, 2nd ed., section 11.1.

A scene that flickers by more than STILL is refreshed, and counted, at every frame. One session is for one camera; it is
not for several threads.
"""

import math

import torch

from sfumato.core import channel
from sfumato.core.errors import RequestError
from sfumato.core.release import Release
from sfumato.core.sites import fold
from sfumato.core.task import Image
from sfumato.trusted.noise import Keyed
from sfumato.trusted.protect import Protected

STILL = 0.25  # a receiver sees a change of this size through noise four times as strong; the server works with as much


class Session:
    """release = session(frame): what `protected(frame, alpha)` would be, with blocks that stood still repeated.

    Raises AlphaError, and RequestError where the noise is keyed.

    `refreshed` is the number of blocks the last frame sent anew, of `blocks`; `bits` what all frames can have told.
    """

    def __init__(self, protected: Protected, alpha: float = 0.8) -> None:
        if isinstance(protected.noise, Keyed):
            raise RequestError("a session on keyed noise", wanted="fresh noise: a session repeats by itself")
        self.protected, self.alpha = protected, float(channel.as_alpha(alpha, 1)[0])
        self._fused, self._noise = protected.at(self.alpha), protected.noise
        self._reference: torch.Tensor | None = None
        self._codes: torch.Tensor | None = None
        self.refreshed = self.blocks = self._seen = self._sent = 0
        self.bits = 0.0

    @torch.inference_mode()
    def __call__(self, frame: Image) -> Release:
        """The frame's release; a frame of another size begins anew. Raises ImageError."""
        z = self.protected.cut([frame])
        sites, fused = fold(z), self._fused
        signal = fused.signal(sites)
        changed = self._changed(signal)
        eps = self._noise.normals(1, tuple(signal.shape[1:])).to(signal.device)
        codes = fused.placed(torch.addcmul(signal, eps, fused.per_code))
        if self._reference is not None and self._codes is not None and not bool(changed.all()):
            codes = torch.where(changed[:, None], codes, self._codes)
            signal = torch.where(changed[..., None], signal, self._reference)
        self._reference, self._codes = signal, codes
        shape, size = self.protected.obfuscator.shape, (sites.shape[2], sites.shape[3])
        added = torch.tensor([self._count(changed)], device=codes.device)
        alpha = torch.tensor([self.alpha], device=codes.device)
        return Release(codes.clone(), alpha, self.protected.digest, added, z.ndim, shape.block, size)

    def _changed(self, signal: torch.Tensor) -> torch.Tensor:
        """Blocks to refresh, [1, H, W]."""
        if self._reference is None or self._reference.shape != signal.shape:
            return torch.ones(signal.shape[:3], dtype=torch.bool, device=signal.device)
        apart = (signal - self._reference) / self._fused.per_code
        # A comparison with what is no number is false: such a block is refreshed, not repeated.
        return ~(apart.square().mean(3) <= STILL)

    def _count(self, changed: torch.Tensor) -> float:
        """Bits this frame adds."""
        self.refreshed, self.blocks = int(changed.sum()), changed.numel()
        self._seen += self.blocks
        self._sent += self.refreshed
        capacity = self._fused.bits_per_site * self.protected.obfuscator.shape.block**2
        before, self.bits = self.bits, self._sent * capacity + _positions(self._seen, self._sent)
        return self.bits - before


def _positions(seen: int, sent: int) -> float:
    """log2 C(seen, sent) + log2(seen + 1)."""
    ways = math.lgamma(seen + 1) - math.lgamma(sent + 1) - math.lgamma(seen - sent + 1)
    return ways / math.log(2) + math.log2(seen + 1)
