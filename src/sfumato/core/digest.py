"""sha256 over names, dtypes, shapes and bytes: one digest means the same tensors to the bit."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 as 64 hex digits; names sorted, so the order of the mapping, the device and the strides do not matter."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").resolve_conj().resolve_neg().contiguous()
        head = f"{name!r} {tensor.dtype} {list(tensor.shape)} ".encode()
        sha.update(len(head).to_bytes(8, "little") + head)
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
