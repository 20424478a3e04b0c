"""Standard normals from a key: what fresh and keyed noise have in common, and what a device without torch needs.

ChaCha20 (RFC 8439) under the key gives 32-bit words, and Box-Muller turns two words into two normals,

    r = sqrt(-2 ln((a + 1/2) / 2^32)),  t = 2 pi b / 2^32,  (r cos t, r sin t)

the radius in float64, rounded to float32 as it meets the angle in float32. No draw lies beyond sqrt(66 ln 2) = 6.764,
where a normal lies with probability 1.3e-11; radii have 2^32 equally likely values, angles a grid of 2^-24 of a turn at
the coarsest. The wire is coarser by far: an int8 code saturates from 4 standard deviations and is 4/127 wide at the
least.
"""

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

KEY_BYTES = 32
_NONCE = bytes(16)  # block counter and nonce: a key serves one stream only, so both start at zero
_WORD = 2.0**-32


def fill(out: NDArray[np.float32], key: bytes) -> None:
    """Standard normals of one key, float32 [n]; the same key gives the same."""
    # the stream's first half of words gives the radii, its second half the angles; cosines fill the first half
    pairs = -(-out.size // 2)
    words = np.frombuffer(_keystream(key, 8 * pairs), "<u4").reshape(2, pairs)
    r, t = _polar(words[0], words[1])
    np.multiply(r, np.cos(t), out=out[:pairs])
    rest = out.size - pairs
    np.multiply(r[:rest], np.sin(t[:rest]), out=out[pairs:])


def _keystream(key: bytes, size: int) -> bytes:
    return Cipher(ChaCha20(key, _NONCE), mode=None).encryptor().update(bytes(size))


def _polar(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Words a and b [n] -> radii and angles [n] of n pairs of normals."""
    u = a + 0.5
    u *= _WORD
    np.log(u, out=u)
    u *= -2
    np.sqrt(u, out=u)
    return u.astype(np.float32), b.astype(np.float32) * np.float32(2 * np.pi * _WORD)
