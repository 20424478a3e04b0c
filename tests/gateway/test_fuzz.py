"""Thousands of requests that are wrong in every place: each gets a status, none ends the gateway, none leaks.

Counts are asserted: sent = answered, and what the server outside saw are releases, one for each that the ledger has.
"""

import contextlib
import json
import os
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any

import cv2
import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as messages

from sfumato.gateway.refusals import GRPC
from sfumato.gateway.service import Limits
from tests.gateway.upstream import MODEL, Running, Tail, ask, door, gateway, picture, sent, tail

TRIED = int(os.environ.get("SFUMATO_FUZZ", "550"))  # of each of the four kinds: 2,200 in CI
PATH = f"/v2/models/{MODEL}/infer"
STATUSES = {200, 400, 404, 405, 408, 411, 413, 415, 417}
SMALL = picture(1, 8, 8)
LISTS: list[Any] = [[300] * 192, [1.5] * 192, [0] * 193, [[0] * 192], [True] * 192, [10**30] * 192]
FILE = cv2.imencode(".png", SMALL)[1].tobytes()
QUIET = settings(
    derandomize=True, deadline=None, max_examples=TRIED, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module")
def outside() -> Iterator[Tail]:
    with tail() as server:
        yield server


@pytest.fixture(scope="module")
def running(outside: Tail, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    limits = Limits(body=1 << 18, json=1 << 17, records=4, pixels=100_000, body_timeout=0.2, idle=0.4)
    with gateway(outside.url, door(tmp_path_factory.mktemp("fuzz")), limits=limits) as one:
        yield one
        report = one.service.metrics.text().decode()
        print(report[report.index("# HELP sfumato_gateway_requests_total") :][:900])


def checked(running: Running, outside: Tail, seen: Counter[Any], least: int) -> None:
    """Still alive, still right, nothing but releases outside, and as many as the ledger has."""
    assert sum(seen.values()) >= least
    one = {"name": "IMAGE", "datatype": "UINT8", "shape": [1, 8, 8, 3], "data": SMALL.tolist()}
    status, _, body = ask(
        running.http, "POST", PATH, json.dumps({"inputs": [{**one, "shape": [1, *SMALL.shape]}]}).encode()
    )
    assert status == 200 and len(json.loads(body)["outputs"]) == 2
    assert len(sent(outside)) == len(outside.bodies) == running.service.guard.ledger.totals().releases
    assert running.service._taken == 0 and b"in_flight 0.0" in running.service.metrics.text()
    print(dict(seen))


def mostly(right: Any, wrong: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(*[st.just(right)] * 7, wrong)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=5,
)
side = st.sampled_from([0, 1, 3, 8, 2**31, 2**63, 10**30, -1, 1.0, True, "8", None])
inputs = st.fixed_dictionaries(
    {
        "name": mostly("IMAGE", st.sampled_from(["INPUT__0", "CODES", "", "\x00"]) | anything),
        "datatype": mostly("UINT8", st.sampled_from(["BYTES", "FP32", "INT8", "uint8"]) | anything),
        "shape": mostly([1, 8, 8, 3], st.lists(side, max_size=9) | anything),
        "data": mostly(SMALL.tolist(), anything | st.sampled_from(LISTS)),
    },
    optional={
        "parameters": st.fixed_dictionaries({}, optional={
            "binary_data_size": st.integers(-5, 300) | anything, "shared_memory_region": anything,
            "classification": anything, "else": anything,
        }) | anything
    },
)  # fmt: skip
parameters = st.fixed_dictionaries(
    {}, optional={"alpha": st.floats() | st.integers(-2, 2) | anything, "binary_data_output": anything, "x": anything}
)
wanted = st.fixed_dictionaries({"name": st.sampled_from(["OUTPUT__0", "x", 7])})
bodies = st.fixed_dictionaries(
    {"inputs": mostly(None, anything)},
    optional={
        "id": anything, "parameters": parameters | anything,
        "outputs": st.lists(wanted | anything, max_size=3),
    },
)  # fmt: skip


def test_json_of_every_kind(running: Running, outside: Tail) -> None:
    seen: Counter[int] = Counter()

    @QUIET
    @given(body=bodies, several=st.tuples(inputs) | st.lists(inputs, max_size=2), whole=mostly(None, anything))
    def tried(body: dict[str, Any], several: Any, whole: Any) -> None:
        if body["inputs"] is None:
            body["inputs"] = list(several)
        text = json.dumps(body if whole is None else whole).encode()
        status, _, answer = ask(running.http, "POST", PATH, text)
        assert status in STATUSES and json.loads(answer)
        seen[status] += 1

    tried()
    assert seen[200] and seen[400]
    checked(running, outside, seen, TRIED)


def test_sizes_that_lie(running: Running, outside: Tail) -> None:
    seen: Counter[int] = Counter()

    @QUIET
    @given(
        header=st.none() | st.integers(-3, 400) | st.sampled_from(["x", "", "²", "1e2", "9" * 30]),
        size=mostly(len(FILE) + 4, st.integers(-1, 300) | st.sampled_from([2**31, 2**64])),
        prefix=mostly(len(FILE), st.integers(0, 2**32 - 1)),
        shape=mostly([1], st.lists(st.integers(-1, 4), max_size=4)),
        cut=st.integers(-6, 6) | st.just(0),
        at=st.integers(0, len(FILE) - 1),
        flip=st.integers(0, 255),
        right=st.booleans(),
    )
    def tried(header: Any, size: int, prefix: int, shape: list[int], cut: int, at: int, flip: int, right: bool) -> None:
        one = {"name": "IMAGE", "datatype": "BYTES", "shape": shape, "parameters": {"binary_data_size": size}}
        text = json.dumps({"inputs": [one], "parameters": {"binary_data_output": True}}).encode()
        file = bytearray(FILE)
        file[at] ^= flip
        body = text + struct.pack("<I", prefix) + bytes(file)
        body = body[: len(body) + cut] if cut < 0 else body + bytes(cut)
        told = len(text) if right else header
        headers = {} if told is None else {"Inference_Header_Content_Length": str(told).encode("latin-1", "replace")}
        status, _, _ = ask(running.http, "POST", PATH, body, **headers)  # type: ignore[arg-type]
        assert status in STATUSES
        seen[status] += 1

    tried()
    assert seen[200] and seen[400]
    checked(running, outside, seen, TRIED)


def test_http_of_every_kind(running: Running, outside: Tail) -> None:
    """Raw bytes on the connection: it is answered with a status or closed."""
    seen: Counter[int] = Counter()
    one = {"inputs": [{"name": "IMAGE", "datatype": "UINT8", "shape": [1, 8, 8, 3], "data": SMALL.flatten().tolist()}]}
    body = json.dumps(one).encode()
    good = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()

    @QUIET
    @given(
        changes=st.lists(st.tuples(st.integers(0, len(good) - 1), st.binary(max_size=3)), max_size=3),
        more=st.sampled_from([
            b"", b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n", b"Content-Length: 5\r\n",
            b"Expect: 100-continue\r\n", b"Upgrade: websocket\r\n", b"X: " + b"y" * 9000 + b"\r\n", b"\x00: \xff\r\n",
            b"Content-Encoding: br\r\n", b"Content-Type: multipart/form-data\r\n",
        ]),
        tail=st.sampled_from([body, body[:-1], body + b"}", b"", b"0\r\n\r\n"]),
    )  # fmt: skip
    def tried(changes: list[tuple[int, bytes]], more: bytes, tail: bytes) -> None:
        text = bytearray(good)
        for at, put in sorted(changes, reverse=True):
            text[at : at + len(put)] = put
        split = text.find(b"\r\n") + 2
        text[split:split] = more
        host, port = running.http.split(":")
        with socket.create_connection((host, int(port)), timeout=10) as link:
            answer = b""
            with contextlib.suppress(ConnectionError):
                link.sendall(bytes(text) + tail)
                while b"\r\n\r\n" not in answer and (part := link.recv(1 << 16)):
                    answer = (answer + part).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        status = int(answer.split(b" ")[1]) if answer else 0
        assert status in STATUSES | {0}
        seen[status] += 1

    tried()
    assert seen[200] and seen[400]
    checked(running, outside, seen, TRIED)


def message() -> bytes:
    request = messages.ModelInferRequest(model_name=MODEL, id="7")
    request.inputs.add(name="IMAGE", datatype="UINT8", shape=[1, 8, 8, 3])
    request.raw_input_contents.append(np.ascontiguousarray(SMALL).tobytes())
    request.parameters["alpha"].double_param = 0.8
    return bytes(request.SerializeToString())


def test_mutated_messages(running: Running, outside: Tail) -> None:
    seen: Counter[str] = Counter()
    good = message()
    calls = ["ModelInfer"] * 6 + ["ModelMetadata", "ModelConfig", "ModelReady", "ModelStatistics", "ModelStreamInfer"]
    valid = {*GRPC.values(), "UNIMPLEMENTED", "OK"} - {"UNKNOWN", "INTERNAL", "UNAVAILABLE"}
    with grpc.insecure_channel(running.grpc) as channel:

        @QUIET
        @given(
            call=st.sampled_from(calls),
            changes=st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), max_size=4),
            cut=st.none() | st.none() | st.integers(0, len(good)),
            more=st.just(b"") | st.binary(max_size=20),
        )
        def tried(call: str, changes: list[tuple[int, int]], cut: int | None, more: bytes) -> None:
            text = bytearray(good)
            for at, value in changes:
                text[at] = value
            send = channel.unary_unary(f"/inference.GRPCInferenceService/{call}")
            try:
                send(bytes(text[:cut]) + more, timeout=20)
                status = "OK"
            except grpc.RpcError as error:
                status = error.code().name
            assert status in valid
            seen[status] += 1

        tried()
    assert seen["OK"] and seen["INVALID_ARGUMENT"]
    checked(running, outside, seen, TRIED)


def test_of_all_requests_none_was_a_fault_of_ours(running: Running) -> None:
    lines = running.lines()
    assert {line["status"] for line in lines} <= {200, 400, 404, 408, 413}
    assert Counter(line["status"] for line in lines)[400] > TRIED
