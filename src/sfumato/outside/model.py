"""What runs outside: release -> restorer -> tail. It has no key, no noise and no record."""

from typing import Any

import torch
from torch import nn

from sfumato.core.errors import ReleaseError
from sfumato.core.release import Release
from sfumato.core.restorer import Restorer
from sfumato.core.sites import unfold


class Outside(nn.Module):
    """Answers releases of one obfuscator, the one whose artefact has `digest`; refuses any other."""

    def __init__(self, restorer: Restorer, tail: nn.Module, digest: str) -> None:
        super().__init__()
        self.restorer, self.tail, self.digest = restorer, tail, digest
        self.eval().requires_grad_(requires_grad=False)

    @torch.inference_mode()
    def forward(self, release: Release) -> Any:
        """What the tail returns for the restored z' [N, C, h, w]. Raises ReleaseError."""
        if release.digest != self.digest:
            raise ReleaseError(
                f"a release of obfuscator {release.digest[:12]}",
                wanted=f"one of obfuscator {self.digest[:12]}, the client of this server artefact",
                do="use the client.safetensors and server.safetensors of one fit",
            )
        want = (self.restorer.shape.k, len(release.alpha), torch.int8)
        if (release.tensor.shape[1], len(release.tensor), release.tensor.dtype) != want:
            raise ReleaseError(f"codes of shape {list(release.tensor.shape)}", wanted=f"[N, {want[0]}, h, w] int8")
        device = self.restorer.mean.device
        codes = release.tensor.to(device, memory_format=torch.channels_last)
        restored = self.restorer.restore(codes, release.alpha.to(device))
        return self.tail(unfold(restored, release.ndim))
