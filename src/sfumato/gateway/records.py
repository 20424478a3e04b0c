"""Tensors of a request -> the records in them, as the guard takes them: BGR uint8 [H, W, 3].

IMAGE     BYTES [N] or [N, 1]     a whole JPEG or PNG file each
IMAGE     UINT8 [N, H, W, 3]      BGR
INPUT__0  FP32  [N, 3, h, w]      what the whole model takes, where the task can tell which picture it was
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from sfumato.core.errors import ImageError, RequestError
from sfumato.core.task import Image, Task
from sfumato.datasets import images
from sfumato.gateway.protocol import Array, Tensor

IMAGE, INPUT = "IMAGE", "INPUT__0"
FORMATS = ("JPEG", "PNG")


def inverse(task: Task) -> Callable[[Array], Image] | None:
    """The task's `picture`: its preprocessing backwards; None where it has none."""
    return getattr(task, "picture", None)


def inputs_of(task: Task) -> list[dict[str, object]]:
    """What the model's metadata say that it takes."""
    high, wide = getattr(task, "size", None) or (-1, -1)
    model: dict[str, object] = {"name": INPUT, "datatype": "FP32", "shape": [-1, 3, high, wide]}
    encoded: dict[str, object] = {"name": IMAGE, "datatype": "BYTES", "shape": [-1]}
    return [encoded, model] if inverse(task) else [encoded]


def records_of(inputs: Mapping[str, Tensor], task: Task, most: int, pixels: int) -> list[Image]:
    """At most `most` records of so many pixels together. Raises RequestError, and ImageError for what is no picture."""
    names = [IMAGE, *([INPUT] if inverse(task) else [])]
    if len(inputs) != 1 or not set(inputs) <= set(names):
        raise RequestError(f"{len(inputs)} inputs, or one of another name", wanted=f"{' or '.join(names)} alone")
    ((name, tensor),) = inputs.items()
    count = tensor.shape[0]
    if not 1 <= count <= most:
        raise RequestError(f"{count} records", wanted=f"1 to {most} in a request", do="send fewer at once")
    if isinstance(tensor.data, list):
        return _decoded(name, tensor.data, tensor.shape, pixels)
    if math.prod(tensor.shape) > 3 * pixels:
        raise RequestError("too many pixels", wanted=f"at most {pixels / 1e6:.3g} megapixels in a request")
    if name == INPUT:
        return _inverted(tensor.data, task)
    if tensor.datatype != "UINT8" or tensor.data.ndim != 4 or tensor.shape[3] != 3 or not tensor.data.size:
        raise ImageError(
            f"IMAGE of {tensor.datatype} {list(tensor.shape)}", wanted="BYTES [N], or UINT8 [N, H, W, 3] in BGR"
        )
    return [np.ascontiguousarray(one) for one in tensor.data]


def _decoded(name: str, files: list[bytes], shape: tuple[int, ...], pixels: int) -> list[Image]:
    if name != IMAGE or shape[1:] not in ((), (1,)):
        raise RequestError(f"{name} of BYTES {list(shape)}", wanted=f"{IMAGE} of BYTES [N]")
    found: list[Image] = []
    for number, data in enumerate(files):
        one = images.decode(data, f"{IMAGE} {number}", formats=FORMATS, pixels=pixels)
        pixels -= one.shape[0] * one.shape[1]
        found.append(one)
    return found


def _inverted(array: Array, task: Task) -> list[Image]:
    invert = inverse(task)
    if array.dtype != np.float32 or array.ndim != 4 or invert is None:
        raise RequestError(f"{INPUT} of {list(array.shape)}", wanted=f"{INPUT} of FP32 [N, 3, h, w]")
    return [invert(one) for one in array]
