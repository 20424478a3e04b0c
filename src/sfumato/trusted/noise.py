"""eps ~ N(0, I), cryptographic and fresh: whoever does not hold a record's key cannot tell its noise from chance.

Every record of every call gets a key of its own from the operating system; ChaCha20 (RFC 8439) under it gives 32-bit
words, and Box-Muller turns two words into two normals,

    r = sqrt(-2 ln((a + 1/2) / 2^32)),  t = 2 pi b / 2^32,  (r cos t, r sin t)

in float64, rounded to float32 at the end. The transform is exact but for the words being finite: no draw lies beyond
sqrt(66 ln 2) = 6.764, where a normal lies with probability 1.3e-11, and the law of r is a step function of 2^32 equal
steps. The wire is coarser by far: an int8 code saturates from 4 standard deviations and is 4/127 wide at the least.
Keys are used once, never stored and never sent; a forked process asks the system again, so it repeats nothing.
"""

import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray
from torch import Tensor

_KEY_BYTES = 32
_NONCE = bytes(16)  # block counter and nonce: a key serves one stream only, so both start at zero
_WORD = 2.0**-32
_BLOCK = 1 << 14  # pairs turned at a time: what the transform holds then stays in the cache


class Fresh:
    """New noise for every record of every call. There is no seed: nothing can make it repeat."""

    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normals [records, *shape], float32 on the CPU; empty where an axis is."""
        count = math.prod(shape)
        out = np.empty((records, count), np.float32)
        for row in out:
            _fill(row, os.urandom(_KEY_BYTES))
        return torch.from_numpy(out).reshape(records, *shape)


def _fill(out: NDArray[np.float32], key: bytes) -> None:
    # the stream's first half of words gives the radii, its second half the angles
    pairs = -(-out.size // 2)
    words = np.frombuffer(_keystream(key, 8 * pairs), "<u4").reshape(2, pairs)
    for start in range(0, pairs, _BLOCK):
        block = words[:, start : start + _BLOCK]
        pair = _normals(block[0], block[1]).T.reshape(-1)
        out[2 * start : 2 * start + pair.size] = pair[: out.size - 2 * start]


def _keystream(key: bytes, size: int) -> bytes:
    return Cipher(ChaCha20(key, _NONCE), mode=None).encryptor().update(bytes(size))


def _normals(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Box-Muller: words a and b [n] -> the two normals of each pair [2, n]."""
    r = np.sqrt(-2 * np.log((a + 0.5) * _WORD))
    t = b * (2 * np.pi * _WORD)
    return np.stack([r * np.cos(t), r * np.sin(t)])
