"""What both protocols carry is read as tritonclient writes it and written as it reads it; refusals have their cases."""

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from tritonclient.grpc import service_pb2 as messages

from sfumato.core.errors import LedgerError, PolicyError, RequestError, ServerError
from sfumato.gateway.protocol import Answered, Asked, from_grpc, from_rest, name_of, parsed, to_grpc, to_rest
from sfumato.gateway.refusals import GRPC, RefusedError, refusal

ARRAYS = [
    ("IMAGE", np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3), "UINT8"),
    ("INPUT__0", np.linspace(-1, 1, 6, dtype=np.float32).reshape(1, 3, 1, 2), "FP32"),
    ("IMAGE", np.array([b"one", b"", b"\xff\x00three"], object), "BYTES"),
]


def same(tensor: Any, array: np.ndarray) -> bool:
    if isinstance(tensor.data, list):
        return bool(tensor.data == array.tolist())
    return tensor.data.dtype == array.dtype and np.array_equal(tensor.data, array)


@pytest.mark.parametrize(("name", "array", "datatype"), ARRAYS)
def test_as_the_real_clients_write_it(name: str, array: np.ndarray, datatype: str) -> None:
    one = over_http.InferInput(name, list(array.shape), datatype)
    one.set_data_from_numpy(array)
    body, size = over_http.InferenceServerClient.generate_request_body([one], request_id="7")
    asked = from_rest(body, size, 1000)
    assert same(asked.inputs[name], array) and (asked.id, asked.binary) == ("7", True)
    two = over_grpc.InferInput(name, list(array.shape), datatype)
    two.set_data_from_numpy(array)
    request = messages.ModelInferRequest(model_name="m", model_version="3")
    request.inputs.extend([two._get_tensor()])
    request.raw_input_contents.extend([two._get_content()])
    found = from_grpc(request.SerializeToString())
    assert same(found.inputs[name], array) and (found.model, found.version) == ("m", "3")


def test_typed_lists_of_grpc() -> None:
    request = messages.ModelInferRequest()
    request.inputs.add(name="a", datatype="UINT8", shape=[2]).contents.uint_contents.extend([1, 255])
    request.inputs.add(name="b", datatype="FP32", shape=[1]).contents.fp32_contents.append(0.5)
    request.inputs.add(name="c", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"\xff")
    found = from_grpc(request.SerializeToString()).inputs
    assert [np.asarray(found[name].data).tolist() for name in "abc"] == [[1, 255], [0.5], [b"\xff"]]
    request.inputs[0].contents.uint_contents[0] = 256
    with pytest.raises(RequestError):
        from_grpc(request.SerializeToString())


def test_answers_as_the_real_clients_read_them() -> None:
    outputs = {
        "OUTPUT__0": np.linspace(0, 1, 8, dtype=np.float32).reshape(1, 2, 4),
        "OUTPUT__1": np.zeros((1, 0), "f4"),
    }
    answered = Answered("m", "1", outputs)
    for binary in (True, False):
        body, size = to_rest(Asked({}, id="7", binary=binary), answered)
        assert (size is not None) == binary
        read = over_http.InferResult.from_response_body(body, header_length=size)
        assert all(np.array_equal(read.as_numpy(name), array) for name, array in outputs.items())
    message = messages.ModelInferResponse.FromString(to_grpc(Asked({}, outputs={"OUTPUT__0": True}), answered))
    assert np.array_equal(over_grpc.InferResult(message).as_numpy("OUTPUT__0"), outputs["OUTPUT__0"])
    assert len(message.outputs) == 1
    for write in (to_rest, to_grpc):
        with pytest.raises(RequestError):
            write(Asked({}, outputs={"x": True}), answered)
    with pytest.raises(ServerError):
        name_of(np.array(["x"], object))


GOOD = {"name": "IMAGE", "datatype": "UINT8", "shape": [2], "data": [1, 2]}


WRONG: list[dict[str, Any]] = [
    {"name": 1}, {"datatype": "INT8"}, {"datatype": None}, {"shape": None}, {"shape": [-1]}, {"shape": [2.0]},
    {"shape": []}, {"shape": [1] * 9}, {"shape": [2**31]}, {"shape": [2**20, 2**20]}, {"shape": [3]},
    {"data": None}, {"data": [1, "x"]}, {"data": [1, None]}, {"data": [1, [2]]}, {"data": [1, 256]},
    {"data": [True, False]}, {"data": [0.5, 1]}, {"data": [10**40, 1]}, {"parameters": 3},
    {"parameters": {"binary_data_size": 1}}, {"parameters": {"binary_data_size": -1}},
    {"parameters": {"binary_data_size": True}}, {"parameters": {"shared_memory_region": "x"}},
    {"datatype": "BYTES", "data": ["_", "_"]}, {"datatype": "BYTES", "data": [1, 2]},
    {"datatype": "BYTES", "data": ["YQ=="]},
]  # fmt: skip
BESIDE: list[dict[str, Any]] = [
    {"id": 7}, {"parameters": []}, {"outputs": {}}, {"outputs": [{"name": 1}]},
    {"outputs": [{"name": "x", "parameters": {"classification": 3}}]},
]  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"\xff", b'{"inputs": NaN}', b"[" * 100_000, b'{"inputs": 1}', b'{"inputs": [1]}',
        *(json.dumps({"inputs": [{**GOOD, **change}]}).encode() for change in WRONG),
        *(json.dumps({"inputs": [GOOD], **more}).encode() for more in BESIDE),
        json.dumps({"inputs": [GOOD, GOOD]}).encode(),
    ],
)  # fmt: skip
def test_bodies_that_are_none(body: bytes) -> None:
    with pytest.raises(RequestError):
        from_rest(body, None, 1 << 20)


def test_every_byte_belongs_to_a_tensor() -> None:
    binary = {**GOOD, "parameters": {"binary_data_size": 2}}
    del binary["data"]
    head = json.dumps({"inputs": [binary]}).encode()
    assert from_rest(head + b"ab", len(head), 1000).inputs["IMAGE"].data.tolist() == [97, 98]  # type: ignore[union-attr]
    for tail, size in ((b"abc", len(head)), (b"a", len(head)), (b"ab", None), (b"ab", 0), (b"ab", len(head) + 3)):
        with pytest.raises(RequestError):
            from_rest(head + tail, size, 1000)
    with pytest.raises(RequestError, match="at most 10"):
        from_rest(head + b"ab", len(head), 10)


def test_byte_strings_that_lie() -> None:
    for data in (b"\x01", b"\x02\x00\x00\x00a", b"\xff\xff\xff\xffa", b"\x00\x00\x00\x00" * 2):
        head = json.dumps({"inputs": [
            {"name": "a", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(data)}}
        ]}).encode()  # fmt: skip
        with pytest.raises(RequestError):
            from_rest(head + data, len(head), 1000)


def test_messages_that_are_none() -> None:
    with pytest.raises(RequestError):
        parsed(messages.ModelInferRequest, b"\xff\xff")
    request = messages.ModelInferRequest()
    request.inputs.add(name="a", datatype="UINT8", shape=[1])
    for wrong in (b"ab", None):
        if wrong is None:
            request.raw_input_contents.append(b"a")
        else:
            request.raw_input_contents.append(wrong)
        with pytest.raises(RequestError):
            from_grpc(request.SerializeToString())


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("x"), 400), (PolicyError("x", wanted="y"), 403), (LedgerError("/a/path: locked"), 503),
        (ServerError("x", status="down"), 503), (ServerError("x", status="busy"), 503),
        (ServerError("x", status="slow"), 504), (ServerError("x", status="wrong"), 502),
        (ServerError("x", status="refused"), 502), (TimeoutError(), 504), (KeyError("x"), 500),
        (RefusedError(429, "busy", "x"), 429),
    ],
)  # fmt: skip
def test_every_error_has_a_status(error: Exception, status: int) -> None:
    told = refusal(error)
    assert told.status == status and told.grpc == GRPC[status] and "/a/path" not in told.text


@pytest.mark.parametrize("data", [["a" * 20_000, *[""] * 1000], [[1.0], "a"], [1.0, None], [True], [[1], 2], [10**400]])
def test_data_that_are_no_numbers_take_no_memory(data: list[Any]) -> None:
    told = {"name": "INPUT__0", "datatype": "FP32", "shape": [len(data)], "data": data}
    body = json.dumps({"inputs": [told]}).encode()
    tracemalloc.start()
    try:
        with pytest.raises(RequestError):
            from_rest(body, None, 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
