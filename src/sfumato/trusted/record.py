"""Codes of a record: an exact one, and a coarse one that near-duplicates of a picture share.

    exact(x)  = BLAKE2b(type, shape and bytes of x)
    coarse(x) = floor(m / 32),  m the 4 x 4 area means of x in grey: 16 values of 0..7

A picture that was compressed again or had a bit flipped keeps its coarse code unless a mean lies at the edge of a cell;
another picture has the same one where all 16 means agree to a cell. Both errors are measured in
benchmarks/bench_record_codes.py. What is no picture (uint8 of two or three axes) has no coarse code but the exact one.

Codes stay inside the trust zone: they are hashed under a key before they name anything.
"""

import hashlib

import cv2
import numpy as np
from numpy.typing import NDArray

GRID, CELL = 4, 32
CODE_BYTES = 16
KEY_BYTES = 32


def exact(record: NDArray[np.generic]) -> bytes:
    """16 bytes: the same for the same array alone."""
    head = f"{record.dtype.str} {record.shape} ".encode()
    return hashlib.blake2b(head + np.ascontiguousarray(record).tobytes(), digest_size=CODE_BYTES).digest()


def coarse(record: NDArray[np.generic]) -> bytes:
    """16 bytes: near-duplicates of a picture [H, W] or [H, W, 3] have the same; of anything else `exact`."""
    if record.dtype != np.uint8 or record.ndim not in (2, 3) or (record.ndim == 3 and record.shape[2] != 3):
        return exact(record)
    picture = np.asarray(record, np.uint8)
    grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY) if picture.ndim == 3 else picture
    means = cv2.resize(grey.astype(np.float32), (GRID, GRID), interpolation=cv2.INTER_AREA)
    return (means / CELL).astype(np.uint8).tobytes()


def named(key: bytes, record: NDArray[np.generic]) -> bytes:
    """16 bytes that name the record, and its near-duplicates, in a ledger whose guard has `key`."""
    return keyed(key, "sfumato ledger", coarse(record))[:CODE_BYTES]


def keyed(key: bytes, purpose: str, *parts: bytes) -> bytes:
    """32 bytes: keyed BLAKE2b of the parts, each with its length, in a domain of its own per purpose (16 letters)."""
    hashed = hashlib.blake2b(key=key, digest_size=32, person=purpose.encode())
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return hashed.digest()
