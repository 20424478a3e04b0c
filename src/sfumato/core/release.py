"""What crosses the wire: int8 codes, alpha and the artefact's digest. Nothing else leaves the trust zone.

Layout of the bytes, little-endian: magic b"SFUM", version u8, ndim u8 of the cut tensor, k u16, h u32, w u32,
records u32, digest 32 bytes, alpha f32 [N], codes i8 [N, k, h, w]. The header is 52 + 4 N bytes.
"""

import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sfumato.core.errors import ReleaseError

MAGIC = b"SFUM"
VERSION = 1
_HEAD = struct.Struct("<4sBBHIII32s")


@dataclass(frozen=True, eq=False)
class Release:
    """int8 codes [N, k, h, w] drawn at alpha [N] by the obfuscator whose artefact has `digest` (64 hex digits).

    `tensor` is exactly what leaves; `bits` is the capacity of each record, [N]: no input can have put more into it.
    """

    tensor: Tensor
    alpha: Tensor
    digest: str
    bits: Tensor
    ndim: int = 4

    @property
    def nbytes(self) -> int:
        """Size on the wire, header included."""
        return _HEAD.size + 4 * len(self.tensor) + self.tensor.numel()

    def to_bytes(self) -> bytes:
        """The release as it is sent; `bits` is derived and does not travel."""
        n, k, h, w = self.tensor.shape
        head = _HEAD.pack(MAGIC, VERSION, self.ndim, k, h, w, n, bytes.fromhex(self.digest))
        alpha = self.alpha.to("cpu", torch.float32).numpy().astype("<f4").tobytes()
        return head + alpha + self.tensor.to("cpu").contiguous().numpy().tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Release":
        """Inverse of `to_bytes` (bits are nan: only the artefact knows them). Raises ReleaseError."""
        if len(data) < _HEAD.size:
            raise ReleaseError(f"{len(data)} bytes", wanted=f"a release, at least {_HEAD.size} bytes")
        magic, version, ndim, k, h, w, n, digest = _HEAD.unpack_from(data)
        if magic != MAGIC or version != VERSION:
            raise ReleaseError("bytes that are not a release of this format", wanted=f"magic SFUM, version {VERSION}")
        want = _HEAD.size + 4 * n + n * k * h * w
        if min(n, k, h, w) < 1 or len(data) != want:
            raise ReleaseError(f"{len(data)} bytes for {[n, k, h, w]}", wanted=f"{want} bytes and no empty axis")
        if ndim not in (2, 3, 4) or (ndim < 4 and w != 1) or (ndim < 3 and h != 1):
            raise ReleaseError(f"sites {h} x {w} of a cut tensor of {ndim} dimensions", wanted="sites that unfold")
        alpha = torch.from_numpy(np.frombuffer(data, "<f4", n, _HEAD.size).astype(np.float32))
        if not bool(((alpha >= 0) & (alpha < 1)).all()):
            raise ReleaseError("a release whose alpha is outside [0, 1)")
        codes = np.frombuffer(data, np.int8, n * k * h * w, _HEAD.size + 4 * n).reshape(n, k, h, w).copy()
        return cls(torch.from_numpy(codes), alpha, digest.hex(), torch.full((n,), torch.nan), ndim)
