"""What runs outside: release -> restorer -> tail. It has no key, no noise and no record."""

from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core.errors import ReleaseError
from sfumato.core.release import Release
from sfumato.core.restorer import Restorer
from sfumato.core.sites import unfold
from sfumato.outside.fused import Fused

_KEPT = 64  # alphas whose weights are kept
MOST_SITES, MOST_ALPHAS = 2**18, 64  # of one release: 256 frames of 1024 x 1024


class Outside(nn.Module):
    """Answers releases of one obfuscator, the one whose artefact has `digest`; refuses any other."""

    def __init__(self, restorer: Restorer, tail: nn.Module, digest: str) -> None:
        super().__init__()
        self.restorer, self.tail, self.digest = restorer, tail, digest
        self.eval().requires_grad_(requires_grad=False)
        self._fused: dict[tuple[float, torch.device], Fused] = {}

    @torch.inference_mode()
    def forward(self, release: Release) -> Any:
        """What the tail returns for the restored release. Raises ReleaseError."""
        return self.tail(self.restored(release))

    @torch.inference_mode()
    def restored(self, release: Release) -> Tensor:
        """z', of the shape of the cut tensor. Raises ReleaseError."""
        if release.digest != self.digest:
            raise ReleaseError(
                f"a release of obfuscator {release.digest[:12]}",
                wanted=f"one of obfuscator {self.digest[:12]}, the client of this server artefact",
                do="use the client.safetensors and server.safetensors of one fit",
            )
        shape = self.restorer.shape
        want = (*shape.codes(release.sites), shape.block, len(release.alpha), torch.int8)
        codes = release.tensor
        if (*codes.shape[1:], release.block, len(codes), codes.dtype) != want:
            raise ReleaseError(
                f"codes {codes.dtype} of shape {list(codes.shape)} for {list(release.sites)} sites",
                wanted=f"int8 of shape {[want[-2], *want[:3]]}",
            )
        sites = len(codes) * release.sites[0] * release.sites[1]
        if sites > MOST_SITES or len(set(release.alpha.tolist())) > MOST_ALPHAS:
            raise ReleaseError(
                f"{sites} sites at {len(set(release.alpha.tolist()))} alphas",
                wanted=f"at most {MOST_SITES} and {MOST_ALPHAS}: few bytes must not make much work",
                do="send fewer records at once",
            )
        device = self.restorer.mean.device
        codes = codes.to(device, memory_format=torch.channels_last)
        alphas = release.alpha.tolist()
        if len(set(alphas)) == 1:
            restored = self._at(alphas[0], device)(codes, release.sites)
        else:
            alone = zip(alphas, codes.split(1), strict=True)
            restored = torch.cat([self._at(alpha, device)(record, release.sites) for alpha, record in alone])
        return unfold(restored, release.ndim)

    def _at(self, alpha: float, device: torch.device) -> Fused:
        key = (alpha, device)
        if key not in self._fused:
            if len(self._fused) >= _KEPT:
                self._fused.clear()
            self._fused[key] = Fused(self.restorer, alpha)
        return self._fused[key]
