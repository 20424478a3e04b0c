"""A release as named tensors, one row a record, for inference servers that batch rows of several clients.

    CODES     i8  [N, m, H, W]          codes of the m channels that travel
    CHANNELS  u8  [N, ceil(k s^2 / 8)]  which ones: a bit a channel, lowest first
    ALPHA     f32 [N, 1]
    SITES     i32 [N, 2]                height and width in sites; the codes cover them in whole blocks
    DIGEST    u8  [N, 32]               of the obfuscator

It holds what `Release.to_bytes` holds, but for the codes of channels that have bits and happen to be 0: with them, all
releases of one alpha and size have one shape, so the server can batch them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from sfumato.core.channel import INT8_MAX
from sfumato.core.errors import ReleaseError
from sfumato.core.release import MOST, Release

Tensors = dict[str, np.ndarray[Any, Any]]
TYPES = {"CODES": "INT8", "CHANNELS": "UINT8", "ALPHA": "FP32", "SITES": "INT32", "DIGEST": "UINT8"}
_DTYPES = {"INT8": np.int8, "UINT8": np.uint8, "FP32": np.float32, "INT32": np.int32}
DIGEST_BYTES = 32


def to_tensors(release: Release, channels: np.ndarray[Any, Any]) -> Tensors:
    """`channels`: numbers of those that travel, ascending. Raises ReleaseError where another one is not 0."""
    codes, count = release.tensor.cpu().numpy(), len(release.tensor)
    some = np.ascontiguousarray(codes[:, channels])
    if np.count_nonzero(some) != np.count_nonzero(codes):
        raise ReleaseError("codes in channels that do not travel", wanted="a release of this obfuscator")
    mask = np.zeros(codes.shape[1], bool)
    mask[channels] = True
    rows: Tensors = {
        "CHANNELS": np.packbits(mask, bitorder="little"),
        "SITES": np.array(release.sites, np.int32),
        "DIGEST": np.frombuffer(bytes.fromhex(release.digest), np.uint8),
    }
    alike = {name: np.repeat(row[None], count, 0) for name, row in rows.items()}
    alpha = release.alpha.cpu().numpy().astype(np.float32)[:, None]
    made = {"CODES": some, "ALPHA": alpha, **alike}
    return {name: made[name] for name in TYPES}


def from_tensors(tensors: Mapping[str, np.ndarray[Any, Any]], sent: int, block: int, ndim: int) -> Release:
    """Inverse of `to_tensors` for an obfuscator of k s^2 = `sent` channels. Raises ReleaseError.

    Rows may differ in alpha and channels; all are of one obfuscator and size. Bits are nan.
    """
    _check_rows(tensors, sent)
    codes, count = tensors["CODES"], len(tensors["CODES"])
    high, wide = _size(tensors, block, ndim)
    if count * sent * codes.shape[2] * codes.shape[3] > MOST:
        raise ReleaseError(f"{count} records of {high} x {wide} sites", wanted="fewer", do="send fewer at once")
    alpha = tensors["ALPHA"][:, 0]
    if not bool(((alpha >= 0) & (alpha < 1) & ~np.signbit(alpha)).all()):
        raise ReleaseError("a release whose alpha is outside [0, 1)")
    if codes.size and codes.min() < -INT8_MAX:
        raise ReleaseError("a code of -128", wanted="codes from -127 to 127")
    mask = np.unpackbits(tensors["CHANNELS"], axis=1, bitorder="little").astype(bool)
    if mask[:, sent:].any() or (mask.sum(1) != codes.shape[1]).any():
        raise ReleaseError(f"{codes.shape[1]} channels of codes", wanted="as many as CHANNELS names")
    whole = np.zeros((count, sent, *codes.shape[2:]), np.int8)
    whole[mask[:, :sent]] = codes.reshape(-1, *codes.shape[2:])
    digest = tensors["DIGEST"][0].tobytes().hex()
    return Release(
        torch.from_numpy(whole), torch.from_numpy(alpha.copy()), digest, torch.full((count,), torch.nan), ndim, block,
        (high, wide),
    )  # fmt: skip


def _check_rows(tensors: Mapping[str, np.ndarray[Any, Any]], sent: int) -> None:
    """Every tensor is there, of its type, and has a row a record."""
    for name, kind in TYPES.items():
        if name not in tensors or tensors[name].dtype != _DTYPES[kind]:
            raise ReleaseError(f"{tensors[name].dtype if name in tensors else 'nothing'} as {name}", wanted=kind)
    if tensors["CODES"].ndim != 4 or not len(tensors["CODES"]):
        raise ReleaseError(f"CODES of shape {list(tensors['CODES'].shape)}", wanted="[N, m, H, W], N > 0")
    for name, width in {"CHANNELS": -(-sent // 8), "ALPHA": 1, "SITES": 2, "DIGEST": DIGEST_BYTES}.items():
        want = (len(tensors["CODES"]), width)
        if tensors[name].shape != want:
            raise ReleaseError(f"{name} of shape {list(tensors[name].shape)}", wanted=f"{list(want)}")


def _size(tensors: Mapping[str, np.ndarray[Any, Any]], block: int, ndim: int) -> tuple[int, int]:
    """Height and width in sites, the same for every record."""
    sites, digest, codes = tensors["SITES"], tensors["DIGEST"], tensors["CODES"]
    if (sites != sites[0]).any() or (digest != digest[0]).any():
        raise ReleaseError("records of several sizes or obfuscators in one batch", wanted="one of each")
    high, wide = (int(side) for side in sites[0])
    if codes.shape[2:] != (-(-high // block), -(-wide // block)) or min(high, wide) < 1:
        raise ReleaseError(f"codes of {list(codes.shape[2:])} blocks for {high} x {wide} sites")
    if ndim not in (2, 3, 4) or (ndim < 4 and wide != 1) or (ndim < 3 and high != 1):
        raise ReleaseError(f"sites {high} x {wide} of a cut tensor of {ndim} dimensions", wanted="sites that unfold")
    return high, wide
