"""Head and obfuscator at one alpha as ONNX, for devices without torch; `trusted.edge` runs it.

    INPUT__0 f32 [N, 3, H, W], NOISE f32 [N, h, w, m]  ->  CODES i8 [N, m, h, w]

NOISE is standard normal and comes from the trusted generator, never from the graph: a graph's own random numbers are
none that anybody can trust. What else a release needs stands in the file's metadata.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.core import channel, programs
from sfumato.core.errors import RequestError
from sfumato.core.files import atomic
from sfumato.core.sites import fold
from sfumato.trusted.fused import Fused
from sfumato.trusted.protect import Protected


class Device(nn.Module):
    """Head and `Fused`, with noise as an input and only the channels that travel as output."""

    def __init__(self, head: nn.Module, fused: Fused) -> None:
        super().__init__()
        self.head, self.fused = head, fused

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        y = self.fused.signal(fold(self.head(x))) + noise * self.fused.per_code
        return y.round().clamp(-channel.INT8_MAX, channel.INT8_MAX).to(torch.int8).permute(0, 3, 1, 2)


def export(protected: Protected, alpha: float, place: Path) -> dict[str, str]:
    """Writes the file, for the task's own input size, and returns its metadata. Raises RequestError, AlphaError."""
    channel.as_alpha(alpha, 1)
    size = getattr(protected.task, "size", None)
    if size is None:
        raise RequestError("a task without an input size of its own", wanted="one size", do="--size 1024")
    record = np.zeros((*size, 3), np.uint8)
    x = torch.stack([protected.task.preprocess(record)] * 2)
    noisy = np.random.default_rng(0).integers(0, 256, record.shape, np.uint8)  # of no symmetry
    plain = torch.from_numpy(noisy).permute(2, 0, 1) + x[0].amax((1, 2), keepdim=True)
    if not torch.allclose(protected.task.preprocess(noisy), plain, atol=1e-3):
        raise RequestError("a task that does more to a picture than take its mean away", wanted="what a device does")
    z = protected.head(x)
    sites, fused = fold(z), _plain(protected.at(alpha))
    high, wide = protected.obfuscator.shape.codes(sites.shape[2:])[1:]
    sent = protected.obfuscator.shape.sent
    mask = np.zeros(sent, bool)
    mask[fused.carrying.cpu().numpy()] = True
    facts = {
        "sfumato": "1",
        "task": protected.task.name,
        "digest": protected.digest,
        "alpha": repr(float(alpha)),
        "sites": f"{sites.shape[2]} {sites.shape[3]}",
        "channels": np.packbits(mask, bitorder="little").tobytes().hex(),
        "minus": " ".join(f"{-float(value):g}" for value in x[0].amax((1, 2))),  # of a black record: the mean
    }
    noise = torch.zeros(2, high, wide, len(fused.carrying))
    fixed = {"INPUT__0": [1, 2, 3], "NOISE": [1, 2, 3]}
    with atomic(place) as temporary:
        device = Device(protected.head, fused)
        programs.onnx(device, {"INPUT__0": x, "NOISE": noise}, ["CODES"], fixed, temporary, facts)
    return facts


def _plain(fused: Fused) -> Fused:
    """A copy whose tensors a tracer may follow: those made in inference mode are closed to it."""
    same = object.__new__(Fused)
    for name, value in vars(fused).items():
        if isinstance(value, Tensor):
            value = value.clone()
        elif isinstance(value, tuple):
            value = tuple(part.clone() if isinstance(part, Tensor) else part for part in value)
        setattr(same, name, value)
    return same
