"""eps ~ N(0, I), cryptographic: whoever does not hold a record's key cannot tell its noise from chance.

`Fresh`: every record of every call gets a key of its own from the operating system. `Keyed`: the key is a pseudo-random
function of a tenant's key, the epoch and the record, so that a record released twice gives the same bytes and averaging
buys nothing. How a key becomes normals: `trusted.stream`.
Fresh keys are used once, never stored and never sent; a forked process asks the system again, so it repeats nothing.
"""

import math
import os
import struct
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.core.errors import RequestError
from sfumato.trusted import record
from sfumato.trusted.stream import KEY_BYTES, fill

SHARED = 0.5  # correlation of keyed noise between near-duplicates


class Fresh:
    """New noise for every record of every call. There is no seed: nothing can make it repeat."""

    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normals [records, *shape], float32 on the CPU; empty where an axis is."""
        count = math.prod(shape)
        out = np.empty((records, count), np.float32)
        for row in out:
            fill(row, os.urandom(KEY_BYTES))
        return torch.from_numpy(out).reshape(records, *shape)


class Keyed:
    """Noise by record: eps = (eps_exact + eps_coarse) / sqrt(2), each from a key of its own,

        key = BLAKE2b_tenant(kind, code of the record, epoch, obfuscator, alpha, way, shape)

    with the codes of `trusted.record`; `way` says how the record becomes a signal: the task, and how many sites. Noise
    must not be the same where the signal is another, or the difference of two releases would show it. The same record
    in the same way under the same key and epoch gives the same noise, so K releases of it are one. Near-duplicates
    share the coarse half: noise of K of them has correlation 1/2, so that averaging them gains at most a factor K / (1
    + (K - 1) / 2) < 2 in power, for any K. Shared noise must not be all of it: of two pictures alike but for what
    moved, all of it would cancel, and the difference would leave in clear; as it is their difference has noise of
    variance 1, half of what two fresh releases have.

    What it costs: equal releases tell that the records are equal, to whoever compares them, for the length of an epoch.
    """

    def __init__(self, key: bytes, epoch: int = 0) -> None:
        if len(key) != record.KEY_BYTES:
            got = f"a key of {len(key)} bytes"
            raise RequestError(got, wanted=f"{record.KEY_BYTES} bytes", do="sfumato key FILE")
        if epoch < 0:
            raise RequestError(f"epoch {epoch}", wanted="0 or more")
        self._key, self.epoch = key, epoch

    def __repr__(self) -> str:
        return f"Keyed(epoch={self.epoch})"

    @property
    def name(self) -> bytes:
        """16 bytes that tell tenants apart and nothing else."""
        return record.keyed(self._key, "sfumato tenant")[:16]

    def of(self, one: NDArray[np.generic], artefact: str, alpha: float, way: str = "") -> "OfRecord":
        """The noise of this record for an obfuscator (its digest) at alpha; `way`: what else makes the signal."""
        what = (self.epoch.to_bytes(8, "little"), artefact.encode(), struct.pack("<f", alpha), way.encode())
        seeds = [
            record.keyed(self._key, "sfumato noise", kind, code, *what)
            for kind, code in ((b"exact", record.exact(one)), (b"coarse", record.coarse(one)))
        ]
        return OfRecord(*seeds)


@dataclass(frozen=True, repr=False)
class OfRecord:
    """Noise of one record under `Keyed`; of the same shape it is always the same."""

    exact: bytes
    coarse: bytes

    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normals [1, *shape], float32. Raises RequestError for more records than the one."""
        if records != 1:
            raise RequestError(f"keyed noise of one record for {records}", wanted="one record at a time")
        size = repr(tuple(int(n) for n in shape)).encode()
        halves = np.empty((2, math.prod(shape)), np.float32)
        for half, key in zip(halves, (self.exact, self.coarse), strict=True):
            fill(half, record.keyed(key, "sfumato shape", size))
        return torch.from_numpy((halves[0] + halves[1]) * np.float32(math.sqrt(0.5))).reshape(1, *shape)

    @property
    def draw(self) -> bytes:
        """16 bytes that say which noise it is, and nothing else: what a ledger may keep."""
        return record.keyed(self.exact, "sfumato draw", self.coarse)[:16]
