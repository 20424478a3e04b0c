"""What crosses the wire: int8 codes, alpha and the artefact's digest. Nothing else leaves the trust zone.

Layout of the bytes, little-endian: magic b"SFUM", version u8, ndim u8 of the cut tensor, channels u16, block u16,
h u32, w u32 (sites), records u32, digest 32 bytes, alpha f32 [N], one bit a channel, lowest first, in whole bytes: set
where any code is not 0, and codes i8 [N, channels that are set, ceil(h / block), ceil(w / block)]. Channels that get no
bits at alpha are 0 and so do not travel. The header is 54 + 4 N + ceil(channels / 8) bytes.
"""

import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sfumato.core.display import table
from sfumato.core.errors import ReleaseError

MAGIC = b"SFUM"
VERSION = 3
MOST = 2**28  # codes of one release, unpacked: a forged header must not be able to ask for all memory
_SHOWN = 32  # records in a notebook
_HEAD = struct.Struct("<4sBBHHIII32s")


@dataclass(frozen=True, eq=False)
class Release:
    """int8 codes [N, k s^2, H, W] drawn at alpha [N] by the obfuscator whose artefact has `digest` (64 hex digits).

    They code `sites` (height, width) in blocks of `block` x `block`; (0, 0) stands for whole blocks. `tensor` is
    exactly what leaves; `bits` is the capacity of each record, [N]: no input can have put more into it.
    """

    tensor: Tensor
    alpha: Tensor
    digest: str
    bits: Tensor
    ndim: int = 4
    block: int = 1
    sites: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if self.tensor.ndim != 4:
            raise ReleaseError(f"codes of shape {list(self.tensor.shape)}", wanted="[N, channels, H, W]")
        if self.sites == (0, 0):
            high, wide = self.tensor.shape[2:]
            object.__setattr__(self, "sites", (high * self.block, wide * self.block))

    def _repr_html_(self) -> str:
        """A row a record: what leaves, and the most it can carry."""
        title = f"{self.nbytes:,} bytes leave: int8 codes {list(self.tensor.shape)} of obfuscator {self.digest[:12]}"
        sites = self.sites[0] * self.sites[1]
        rows = [
            (number, f"{alpha:g}", f"{bits:,.0f}", f"{bits / sites:.2f}")
            for number, (alpha, bits) in enumerate(zip(self.alpha.tolist(), self.bits.tolist(), strict=True))
        ]
        return table(("record", "alpha", "bits, at most", "a site"), rows[:_SHOWN], title=title)

    @property
    def nbytes(self) -> int:
        """Size on the wire, header included."""
        n, channels, high, wide = self.tensor.shape
        return _HEAD.size + 4 * n + -(-channels // 8) + n * int(self._filled().sum()) * high * wide

    def _filled(self) -> np.ndarray:
        filled: np.ndarray = self.tensor.ne(0).any(0).flatten(1).any(1).cpu().numpy()
        return filled

    def to_bytes(self) -> bytes:
        """The release as it is sent; `bits` is derived and does not travel."""
        n, k = self.tensor.shape[:2]
        head = _HEAD.pack(MAGIC, VERSION, self.ndim, k, self.block, *self.sites, n, bytes.fromhex(self.digest))
        alpha = self.alpha.to("cpu", torch.float32).numpy().astype("<f4").tobytes()
        filled = self._filled()
        codes = np.ascontiguousarray(self.tensor.cpu().numpy()[:, filled])
        return head + alpha + np.packbits(filled, bitorder="little").tobytes() + codes.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Release":
        """Inverse of `to_bytes` (bits are nan: only the artefact knows them). Raises ReleaseError."""
        if len(data) < _HEAD.size:
            raise ReleaseError(f"{len(data)} bytes", wanted=f"a release, at least {_HEAD.size} bytes")
        magic, version, ndim, k, block, h, w, n, digest = _HEAD.unpack_from(data)
        if magic != MAGIC or version != VERSION:
            raise ReleaseError("bytes that are not a release of this format", wanted=f"magic SFUM, version {VERSION}")
        if min(n, k, block, h, w) < 1:
            raise ReleaseError(f"{n} records of {k} channels, {h} x {w} sites", wanted="no empty axis")
        rows, columns, at = -(-h // block), -(-w // block), _HEAD.size + 4 * n
        if n * k * rows * columns > MOST:
            raise ReleaseError(f"{n * k * rows * columns} codes", wanted=f"at most {MOST}", do="send fewer at once")
        mask = np.frombuffer(data[at : at + -(-k // 8)], np.uint8)
        filled, at = np.unpackbits(mask, bitorder="little").astype(bool), at + -(-k // 8)
        some = int(filled[:k].sum())
        want = at + n * some * rows * columns
        if len(data) != want or filled[k:].any():
            raise ReleaseError(f"{len(data)} bytes for {[n, some, rows, columns]}", wanted=f"{want} bytes")
        if ndim not in (2, 3, 4) or (ndim < 4 and w != 1) or (ndim < 3 and h != 1):
            raise ReleaseError(f"sites {h} x {w} of a cut tensor of {ndim} dimensions", wanted="sites that unfold")
        alpha = torch.from_numpy(np.frombuffer(data, "<f4", n, _HEAD.size).astype(np.float32))
        if not bool(((alpha >= 0) & (alpha < 1) & ~torch.signbit(alpha)).all()):
            raise ReleaseError("a release whose alpha is outside [0, 1)")
        codes = np.zeros((n, k, rows, columns), np.int8)
        codes[:, filled[:k]] = np.frombuffer(data, np.int8, offset=at).reshape(n, some, rows, columns)
        if codes.min() < -127:
            raise ReleaseError("a code of -128", wanted="codes from -127 to 127")
        if some != int(codes.any((0, 2, 3)).sum()):
            raise ReleaseError(
                "a channel that is said to travel and holds nothing", wanted="none", do="set its bit to 0"
            )
        unknown = torch.full((n,), torch.nan)
        return cls(torch.from_numpy(codes), alpha, digest.hex(), unknown, ndim, block, (h, w))
