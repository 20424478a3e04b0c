"""The Open Inference Protocol v2, REST and gRPC, as one kind of request: named tensors in, named tensors out.

REST is a JSON object, after which the tensors follow that name a `binary_data_size` in it; the header
`Inference-Header-Content-Length` says where it ends. gRPC has `raw_input_contents`, one an input, or typed lists. Every
byte of a request must belong to a tensor. Tensors of bytes are lists of byte strings: in JSON base64, elsewhere each
after its length in four bytes, little-endian.
"""

import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sfumato.core.errors import RequestError, ServerError

DTYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
TAKEN = ("BYTES", "FP32", "UINT8")  # types of inputs
_NAMES = {np.dtype(code): name for name, code in DTYPES.items()}
_CONTENTS = {"BYTES": "bytes_contents", "FP32": "fp32_contents", "UINT8": "uint_contents"}
_MOST = 2**31  # elements of a tensor: more cannot be sent
_PREFIX = 4  # bytes of a byte string's length

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Tensor:
    """An input: `data` is an array of `shape`, or for BYTES a list."""

    datatype: str
    shape: tuple[int, ...]
    data: Array | list[bytes]


@dataclass(frozen=True)
class Asked:
    """A request. `outputs` says which are wanted, and whether as bytes; without any, all are, as `binary` says.

    `model` and `version` are those that the body names; over REST the path does.
    """

    inputs: Mapping[str, Tensor]
    id: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    outputs: Mapping[str, bool] = field(default_factory=dict)
    binary: bool = False
    model: str = ""
    version: str = ""


@dataclass(frozen=True)
class Answered:
    """Outputs of a model of this name and version."""

    model: str
    version: str
    outputs: Mapping[str, Array]


# REST


def from_rest(body: bytes, header: int | None, most: int) -> Asked:
    """The request in a body whose first `header` bytes are JSON, at most `most`; None: all of it. Raises RequestError.

    What is refused is described by its place, never by its content.
    """
    size = len(body) if header is None else header
    if not 0 < size <= len(body):
        raise RequestError(f"a JSON part of {size} bytes in a body of {len(body)}", wanted="one that is there")
    if size > most:
        raise RequestError(f"{size} bytes of JSON", wanted=f"at most {most}", do="send tensors as binary data")
    told = _object(_json(body[:size]), "the body")
    data = memoryview(body)[size:]
    inputs: dict[str, Tensor] = {}
    for one in _objects(told.get("inputs"), "inputs"):
        name, shape, datatype, parameters = _described(one)
        if "binary_data_size" in parameters:
            length = parameters["binary_data_size"]
            if type(length) is not int or not 0 <= length <= len(data):
                raise RequestError("a binary_data_size past the end of the body", wanted="bytes that are there")
            found, data = _raw(data[:length], datatype, shape), data[length:]
        else:
            found = _listed(one.get("data"), datatype, shape)
        _add(inputs, name, Tensor(datatype, shape, found))
    if len(data):
        raise RequestError(f"{len(data)} bytes that belong to no input", wanted="binary_data_size of each input")
    return _asked(inputs, told)


def _asked(inputs: dict[str, Tensor], told: Mapping[str, Any]) -> Asked:
    number = told.get("id", "")
    if not isinstance(number, str):
        raise RequestError("an id that is no string", wanted="a string")
    parameters = _object(told.get("parameters", {}), "parameters")
    binary, outputs = parameters.get("binary_data_output", False) is True, {}
    for one in _objects(told.get("outputs", []), "outputs"):
        of_it = _object(one.get("parameters", {}), "an output's parameters")
        _refuse_unknown(of_it)
        outputs[_text(one.get("name"), "an output's name")] = of_it.get("binary_data", binary) is True
    return Asked(inputs, number, parameters, outputs, binary)


def to_rest(asked: Asked, answered: Answered) -> tuple[bytes, int | None]:
    """The answer's body and the length of its JSON part, None where it is all of it. Raises RequestError."""
    parts: list[bytes] = []
    outputs = []
    for name in _wanted(asked, answered):
        array = answered.outputs[name]
        one: dict[str, Any] = {"name": name, "datatype": name_of(array), "shape": list(array.shape)}
        if asked.outputs.get(name, asked.binary):
            parts.append(_bytes(array))
            one["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            one["data"] = array.ravel().tolist()
        outputs.append(one)
    told: dict[str, Any] = {"model_name": answered.model, "model_version": answered.version, "outputs": outputs}
    if asked.id:
        told["id"] = asked.id
    text = json.dumps(told, allow_nan=False).encode()
    return b"".join([text, *parts]), len(text) if parts else None


# gRPC


def from_grpc(message: bytes) -> Asked:
    """The request in a protobuf message. Raises RequestError."""
    from tritonclient.grpc import service_pb2

    request = parsed(service_pb2.ModelInferRequest, message)
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError(f"{len(raw)} raw contents for {len(request.inputs)} inputs", wanted="one each, or none")
    inputs: dict[str, Tensor] = {}
    for i, one in enumerate(request.inputs):
        _refuse_unknown(one.parameters)
        shape, datatype = _shape(list(one.shape)), _taken(one.datatype)
        if raw:
            found = _raw(memoryview(raw[i]), datatype, shape)
        else:
            values = list(getattr(one.contents, _CONTENTS[datatype]))
            found = _counted(values, shape) if datatype == "BYTES" else _listed(values, datatype, shape)
        _add(inputs, one.name, Tensor(datatype, shape, found))
    for output in request.outputs:
        _refuse_unknown(output.parameters)
    parameters = {name: _value(value) for name, value in request.parameters.items()}
    outputs = dict.fromkeys((output.name for output in request.outputs), True)
    return Asked(inputs, request.id, parameters, outputs, True, request.model_name, request.model_version)


def to_grpc(asked: Asked, answered: Answered) -> bytes:
    """The answer as a protobuf message. Raises RequestError."""
    from tritonclient.grpc import service_pb2

    told = service_pb2.ModelInferResponse(model_name=answered.model, model_version=answered.version, id=asked.id)
    for name in _wanted(asked, answered):
        array = answered.outputs[name]
        told.outputs.add(name=name, datatype=name_of(array), shape=array.shape)
        told.raw_output_contents.append(_bytes(array))
    return bytes(told.SerializeToString())


def parsed(kind: Any, message: bytes) -> Any:
    """A protobuf message of this kind. Raises RequestError."""
    try:
        return kind.FromString(message)
    except Exception as error:  # protobuf has an error for it, and each of its implementations others
        raise RequestError("no message of this call", wanted="protobuf") from error


def _value(parameter: Any) -> Any:
    chosen = parameter.WhichOneof("parameter_choice")
    return getattr(parameter, chosen) if chosen else None


# Both


def name_of(array: Array) -> str:
    """FP32, ... . Raises ServerError: of an answer whose type the protocol does not have."""
    if array.dtype not in _NAMES:
        raise ServerError("an answer of another type than numbers", status="wrong")
    return _NAMES[array.dtype]


def _bytes(array: Array) -> bytes:
    return np.ascontiguousarray(array).astype(DTYPES[name_of(array)], copy=False).tobytes()


def _wanted(asked: Asked, answered: Answered) -> Sequence[str]:
    if any(name not in answered.outputs for name in asked.outputs):
        raise RequestError("an output that is not there", wanted=" or ".join(answered.outputs))
    return list(asked.outputs or answered.outputs)


def _json(text: bytes) -> Any:
    def no_number(_: str) -> None:
        raise ValueError

    try:
        return json.loads(text, parse_constant=no_number)
    except (ValueError, RecursionError):
        raise RequestError("a body that is no JSON", wanted="a request of the open inference protocol") from None


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"{what}: no object", wanted="a JSON object")
    return value


def _objects(value: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise RequestError(f"{what}: no list", wanted="a JSON list")
    return [_object(one, f"one of {what}") for one in value]


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{what}: no string", wanted="a string")
    return value


def _described(one: Mapping[str, Any]) -> tuple[str, tuple[int, ...], str, dict[str, Any]]:
    name, datatype = _text(one.get("name"), "an input's name"), _taken(_text(one.get("datatype"), "a datatype"))
    parameters = _object(one.get("parameters", {}), "an input's parameters")
    _refuse_unknown(parameters)
    return name, _shape(one.get("shape")), datatype, parameters


def _refuse_unknown(parameters: Any) -> None:
    """Of Triton's extensions, those that change what a tensor is. Raises RequestError."""
    if any(name.startswith("shared_memory") for name in parameters) or "classification" in parameters:
        raise RequestError("shared memory or classification", wanted="tensors in the request and in the answer")


def _taken(datatype: str) -> str:
    if datatype not in TAKEN:
        raise RequestError("an input of another type", wanted=" or ".join(TAKEN))
    return datatype


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(side) is int and 0 <= side < _MOST for side in value):
        raise RequestError("a shape that is none", wanted="a list of whole numbers")
    if not 1 <= len(value) <= 8 or math.prod(value) >= _MOST:
        raise RequestError(f"a shape of {len(value)} axes, or with too many elements", wanted="1 to 8 axes")
    return tuple(value)


def _add(inputs: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in inputs:
        raise RequestError("an input that is there twice", wanted="each once")
    inputs[name] = tensor


def _raw(data: memoryview, datatype: str, shape: tuple[int, ...]) -> Array | list[bytes]:
    if datatype == "BYTES":
        return _counted(_strings(data, math.prod(shape)), shape)
    size = math.prod(shape) * np.dtype(DTYPES[datatype]).itemsize
    if len(data) != size:
        raise RequestError(f"{len(data)} bytes for a {datatype} tensor of shape {list(shape)}", wanted=f"{size}")
    return np.frombuffer(data, DTYPES[datatype]).reshape(shape)


def _strings(data: memoryview, most: int) -> list[bytes]:
    found: list[bytes] = []
    at = 0
    while at < len(data) and len(found) <= most:
        start = at + _PREFIX
        at = start + int.from_bytes(data[at:start], "little")
        if start > len(data) or at > len(data):
            raise RequestError("a byte string past the end of its tensor", wanted="its length, then its bytes")
        found.append(bytes(data[start:at]))
    return found


def _counted(found: list[bytes], shape: tuple[int, ...]) -> list[bytes]:
    if len(found) != math.prod(shape):
        raise RequestError(f"{len(found)} byte strings in a tensor of shape {list(shape)}", wanted="as many as it says")
    return found


def _listed(values: Any, datatype: str, shape: tuple[int, ...]) -> Array | list[bytes]:
    """Of JSON, flat or nested, or of gRPC's typed lists."""
    if not isinstance(values, list):
        raise RequestError("an input without data", wanted="data, or binary_data_size")
    if datatype == "BYTES":
        return _counted([_decoded(one) for one in _flat(values)], shape)
    whole = datatype == "UINT8"
    # Of objects: where one is a string, an array of strings would give each of the others as much memory.
    array = np.array(values, object)
    if not set(map(type, array.flat)) <= ({int} if whole else {int, float}):
        raise RequestError("data that are not all numbers of the datatype", wanted=datatype)
    if array.size != math.prod(shape) or (whole and array.size and not 0 <= array.min() <= array.max() <= 255):
        raise RequestError(f"{array.size} values for a {datatype} tensor of shape {list(shape)}", wanted="those it has")
    try:
        with np.errstate(over="ignore"):
            return array.astype(DTYPES[datatype]).reshape(shape)
    except OverflowError:
        raise RequestError("a number past what the datatype holds", wanted=datatype) from None


def _flat(values: list[Any]) -> list[Any]:
    return [leaf for one in values for leaf in (one if isinstance(one, list) else [one])]


def _decoded(text: Any) -> bytes:
    try:
        return base64.b64decode(_text(text, "a byte string"), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("a byte string that is no base64", wanted="base64 in JSON, or binary data") from None
