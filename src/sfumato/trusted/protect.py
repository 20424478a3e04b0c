"""The single additional line: a record goes in, a release comes out, and only the release may leave.

release = protected(frame, alpha=0.8)
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.core import channel
from sfumato.core.errors import ImageError
from sfumato.core.obfuscator import Obfuscator
from sfumato.core.release import Release
from sfumato.core.sites import fold, stack
from sfumato.core.task import Image, Task
from sfumato.trusted.fused import Fused
from sfumato.trusted.noise import Fresh, Keyed

_KEPT = 64  # alphas whose weights are kept: 160 kB each for a shipped artefact


class Noise(Protocol):
    """Where eps comes from."""

    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normals [records, *shape], float32."""
        ...


class Protected:
    """Head, obfuscator and noise of one fit.

    `outside` is the other side where both run on one machine, and `reference` the provider's own tail, to measure what
    the obfuscation costs; either may be None.
    """

    def __init__(
        self,
        head: nn.Module,
        obfuscator: Obfuscator,
        task: Task,
        digest: str,
        *,
        outside: Callable[[Release], Any] | None = None,
        reference: nn.Module | None = None,
        noise: Noise | Keyed | None = None,
    ) -> None:
        self.head, self.task, self.digest, self.outside, self.reference = head, task, digest, outside, reference
        self.obfuscator = obfuscator.eval().requires_grad_(requires_grad=False)
        self.noise: Noise | Keyed = noise or Fresh()
        self._fused: dict[float, Fused] = {}

    def __call__(self, record: Image | Sequence[Image], alpha: channel.Alpha = 0.8) -> Release:
        """One record or several of one input size -> their release. Raises AlphaError before anything is computed."""
        records = [record] if isinstance(record, np.ndarray) else list(record)
        channel.as_alpha(alpha, len(records))
        return self.obfuscate(self.cut(records), alpha, records=records)

    def with_noise(self, noise: Noise | Keyed) -> "Protected":
        """The same with other noise: `Keyed`, or one for measurements that must repeat."""
        same = copy(self)
        same.noise = noise
        return same

    @torch.inference_mode()
    def cut(self, records: Sequence[Image]) -> Tensor:
        """The head's clean output: it must not leave."""
        inputs = [self.task.preprocess(record) for record in records]
        if len({x.shape for x in inputs}) != 1:
            raise ImageError("records of several input sizes in one batch", wanted="one size", do="send them singly")
        z: Tensor = self.head(stack(inputs).to(self.obfuscator.mean.device))
        return z

    @torch.inference_mode()
    def obfuscate(self, z: Tensor, alpha: channel.Alpha = 0.8, *, records: Sequence[Image] | None = None) -> Release:
        """Clean head output -> release, with noise of its own for every record. Raises AlphaError.

        Keyed noise is that of `records`; where they are not given, of z itself, to the last bit.
        """
        sites = fold(z)
        a = channel.as_alpha(alpha, len(sites), sites.device)
        alphas = a.tolist()
        if not isinstance(self.noise, Keyed) and len(set(alphas)) == 1:
            codes = self.at(alphas[0])(sites, self.noise.normals)
        else:  # every alpha sends channels of its own, and what is keyed must not depend on the batch it is in
            sources = self._sources(z, a, records)
            alone = zip(alphas, sites.split(1), sources, strict=True)
            codes = torch.cat([self.at(value)(site, source.normals) for value, site, source in alone])
        shape, size = self.obfuscator.shape, (sites.shape[2], sites.shape[3])
        bits = torch.tensor([self.at(value).bits_per_site * shape.coded(size) for value in alphas], device=codes.device)
        return Release(codes, a, self.digest, bits, z.ndim, shape.block, size)

    def _sources(self, z: Tensor, alpha: Tensor, records: Sequence[Image] | None) -> list[Noise]:
        if not isinstance(self.noise, Keyed):
            return [self.noise] * len(z)
        named = list(z.cpu().numpy()) if records is None else records
        way, alphas = self.way(fold(z).shape[2:]), alpha.tolist()
        return [self.noise.of(one, self.digest, value, way) for one, value in zip(named, alphas, strict=True)]

    def way(self, sites: Sequence[int]) -> str:
        """Names how a record becomes a signal of so many sites, for noise that must differ where the signal does."""
        return f"{self.task!r} {tuple(sites)}"

    def at(self, alpha: float) -> Fused:
        """The obfuscator at one alpha, kept for the next time."""
        kept = self._fused.get(alpha)
        if kept is None:
            if len(self._fused) >= _KEPT:
                self._fused.clear()  # by another thread perhaps
            kept = self._fused[alpha] = Fused(self.obfuscator, alpha)
        return kept

    def postprocess(self, raw: Any, size: tuple[int, int] | None = None) -> Any:
        """What the outside returned -> the task's result: one for a single record, a list for a batch.

        `size` is the (height, width) of the records; None gives results in the model's input.
        """
        outputs = self.task.outputs(raw)
        if size is None:
            size = getattr(self.task, "size", None) or (1, 1)
        results = [self.task.postprocess(one, size) for one in zip(*outputs, strict=True)]
        return results[0] if len(results) == 1 else results
