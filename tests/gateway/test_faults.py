"""A server outside that is down, slow or lying, clients that are slow or too many, an end in mid-flight."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as over_grpc
from tritonclient.utils import InferenceServerException

from sfumato.core.errors import AlphaError, RequestError, ServerError
from sfumato.gateway.server import Place
from sfumato.gateway.service import Limits, Service
from tests.gateway.upstream import MODEL, SIDE, Running, Tail, ask, door, gateway, picture, sent, tail

PATH = f"/v2/models/{MODEL}/infer"


@pytest.fixture
def outside() -> Iterator[Tail]:
    with tail() as server:
        yield server


def request(image: np.ndarray | None = None, side: int = SIDE) -> tuple[bytes, dict[str, str]]:
    """A binary request for one picture, and its header."""
    image = picture(0, side, side) if image is None else image
    size = {"binary_data_size": image.size}
    one = {"name": "IMAGE", "datatype": "UINT8", "shape": [1, *image.shape], "parameters": size}
    head = json.dumps({"inputs": [one], "parameters": {"binary_data_output": True}}).encode()
    return head + image.tobytes(), {"Inference_Header_Content_Length": str(len(head))}


def infer(running: Running, image: np.ndarray | None = None) -> tuple[int, dict[str, str], str]:
    body, headers = request(image)
    status, told, answer = ask(running.http, "POST", PATH, body, **headers)
    return status, told, answer.decode(errors="replace")


def infer_grpc(running: Running) -> str:
    image = picture()
    with over_grpc.InferenceServerClient(running.grpc) as client:
        one = over_grpc.InferInput("IMAGE", [1, *image.shape], "UINT8")
        one.set_data_from_numpy(image[None])
        try:
            client.infer(MODEL, [one])
        except InferenceServerException as error:
            return str(error.status()).removeprefix("StatusCode.")
        return "OK"


def test_no_server_outside_is_503_and_costs_no_release(tmp_path: Path) -> None:
    with tail() as gone:
        url = gone.url
    guard = door(tmp_path)
    with gateway(url, guard) as running:
        for _ in range(3):
            status, headers, text = infer(running)
            assert (status, headers["Retry-After"]) == (503, "1") and "cannot be reached" in text
        assert infer_grpc(running) == "UNAVAILABLE"
        assert ask(running.http, "GET", "/v2/health/ready")[0] == 503
        assert ask(running.http, "GET", "/v2/health/live")[0] == 200
        assert guard.ledger.totals().releases == 0


def test_those_who_wait_for_a_server_outside_that_is_slow_ask_it_once(tmp_path: Path) -> None:
    asked = []

    class Outside:
        async def ask(self) -> None:
            asked.append(1)
            await asyncio.sleep(0.1)
            raise ServerError("it is away", status="down")

        async def close(self) -> None:
            pass

    async def go() -> None:
        service = Service(door(tmp_path), Outside())  # type: ignore[arg-type]
        assert not any(await asyncio.gather(*(service.ready() for _ in range(50))))
        assert len(asked) == 1
        assert not await service.ready() and len(asked) == 2
        await service.close()

    asyncio.run(go())


def test_a_server_that_comes_back_is_found(tmp_path: Path, outside: Tail) -> None:
    guard = door(tmp_path)
    with gateway(outside.url, guard) as running:
        assert infer(running)[0] == 200
        outside.statuses = [503]
        assert infer(running)[0] == 503  # entered, sent, not answered
        assert infer(running)[0] == 200
        assert guard.ledger.totals().releases == 3 == len(sent(outside))


def test_a_slow_server_outside_is_504(tmp_path: Path, outside: Tail) -> None:
    outside.wait = 1.0
    with gateway(outside.url, door(tmp_path), timeout=0.3) as running:
        assert infer(running)[0] == 504
        assert infer_grpc(running) == "DEADLINE_EXCEEDED"
    with gateway(outside.url, door(tmp_path), limits=Limits(timeout=0.3)) as running:
        assert infer(running)[0] == 504


ROWS = 21 * 16 + 4 + 1


def output(i: int, shape: list[int], value: float = 0.5, datatype: str = "FP32") -> dict[str, Any]:
    return {"name": f"OUTPUT__{i}", "datatype": datatype, "shape": shape, "data": [value] * int(np.prod(shape))}


@pytest.mark.parametrize(
    "lie",
    [
        [],
        [output(0, [1, ROWS, 4])],
        [output(0, [2, ROWS, 4]), output(1, [2, ROWS, 2])],
        [output(0, [1, ROWS, 4]), output(1, [1, ROWS, 3])],
        [output(0, [1, 7, 4]), output(1, [1, 7, 2])],
        [output(0, [1]), output(1, [1])],
        [output(0, [1, ROWS, 4], float("nan")), output(1, [1, ROWS, 2])],
        [output(0, [1, ROWS, 4], float("inf")), output(1, [1, ROWS, 2])],
        [output(0, [1, ROWS, 4], 1, "INT32"), output(1, [1, ROWS, 2])],
        [output(0, [1, ROWS, 4], datatype="FP64"), output(1, [1, ROWS, 2])],
        [{"name": "OUTPUT__0", "datatype": "BYTES", "shape": [1], "data": ["x"]}, output(1, [1, ROWS, 2])],
        [{"name": "OUTPUT__0", "datatype": "FP32", "shape": [1, 9], "data": [1.0]}, output(1, [1, ROWS, 2])],
        "nothing",
        {"name": 7},
    ],
)
def test_a_lying_server_is_502(lie: Any, tmp_path: Path, outside: Tail) -> None:
    outside.wrong = lie
    with gateway(outside.url, door(tmp_path)) as running:
        status, _, text = infer(running)
        assert status == 502 and "no such model" in text
        assert infer_grpc(running) == "INTERNAL"
        outside.wrong = [output(0, [1, ROWS, 4]), output(1, [1, ROWS, 2])]
        assert infer(running)[0] == 200


def test_a_server_of_another_obfuscator_is_502_before_anything_is_sent(tmp_path: Path, outside: Tail) -> None:
    outside.digest = "ab" * 32
    guard = door(tmp_path)
    with gateway(outside.url, guard) as running:
        assert infer(running)[0] == 502
        assert ask(running.http, "GET", "/v2/health/ready")[0] == 503
        assert not outside.bodies and guard.ledger.totals().releases == 0
        outside.digest = guard.protected.digest
        assert infer(running)[0] == 200


@pytest.mark.parametrize("told", [[{"name": "OUTPUT__0"}], [{"name": "a", "datatype": "FP32", "shape": ["x"]}], [7], 7])
def test_metadata_that_are_none_are_502(told: Any, tmp_path: Path, outside: Tail) -> None:
    outside.told = told
    with gateway(outside.url, door(tmp_path)) as running:
        assert ask(running.http, "GET", f"/v2/models/{MODEL}")[0] == 502
        with over_grpc.InferenceServerClient(running.grpc) as client:
            with pytest.raises(InferenceServerException, match="no such model answers") as error:
                client.get_model_metadata(MODEL)
            assert error.value.status() == "StatusCode.INTERNAL"


def test_what_the_server_outside_says_is_not_passed_on(tmp_path: Path, outside: Tail) -> None:
    with gateway(outside.url, door(tmp_path)) as running:
        assert infer(running)[0] == 200
        for status in (400, 404, 500):
            outside.statuses, outside.wrong = [status], "a secret of the server"
            got, _, text = infer(running)
            assert got == 502 and "secret" not in text


def test_a_ledger_that_cannot_be_written_lets_nothing_out(tmp_path: Path, outside: Tail) -> None:
    guard = door(tmp_path)
    with gateway(outside.url, guard) as running:
        guard.ledger.close()
        (tmp_path / "ledger.db").write_bytes(b"rubbish" * 1000)
        status, _, text = infer(running)
        assert status == 503 and str(tmp_path) not in text
        assert infer_grpc(running) == "UNAVAILABLE"
    assert not outside.bodies


def test_one_too_many_is_429_at_once(tmp_path: Path, outside: Tail) -> None:
    outside.wait = 0.5
    limits = Limits(concurrency=1, waiting=2)
    with gateway(outside.url, door(tmp_path), limits=limits) as running, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: infer(running), range(8)))
        statuses = [status for status, _, _ in answers]
        assert statuses.count(200) == 3 and statuses.count(429) == 5
        assert all(headers["Retry-After"] == "1" for status, headers, _ in answers if status == 429)
        busy = [pool.submit(infer, running) for _ in range(3)]
        time.sleep(0.2)
        assert infer_grpc(running) == "RESOURCE_EXHAUSTED"
        assert [one.result()[0] for one in busy] == [200] * 3
    assert len(sent(outside)) == 6


def test_bodies_past_the_limit_are_413(tmp_path: Path, outside: Tail) -> None:
    with gateway(outside.url, door(tmp_path), limits=Limits(body=1 << 16)) as running:
        body, headers = request(side=160)
        assert ask(running.http, "POST", PATH, body, **headers)[0] == 413
        chunked = socket.create_connection(("127.0.0.1", running.listening.http), timeout=5)
        with chunked:  # one that does not say how long it is
            chunked.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            chunk = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
            assert drained(chunked, [chunk] * 8).startswith(b"HTTP/1.1 413")
        assert infer_grpc(running) == "OK"
        with over_grpc.InferenceServerClient(running.grpc) as client:
            one = over_grpc.InferInput("IMAGE", [1, 160, 160, 3], "UINT8")
            one.set_data_from_numpy(np.zeros((1, 160, 160, 3), np.uint8))
            for squeezed in (None, "gzip"):  # what counts is the size it unfolds to
                with pytest.raises(InferenceServerException, match="RESOURCE_EXHAUSTED"):
                    client.infer(MODEL, [one], compression_algorithm=squeezed)
        import gzip

        bomb = gzip.compress(bytes(1 << 20))
        assert ask(running.http, "POST", PATH, bomb, Content_Encoding="gzip")[0] in (400, 413)
    assert len(outside.bodies) == 1


def drained(link: socket.socket, parts: list[bytes]) -> bytes:
    with contextlib.suppress(OSError):
        for part in parts:
            link.sendall(part)
    return link.recv(1 << 16)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path, outside: Tail) -> None:
    import cv2

    bomb = cv2.imencode(".png", np.zeros((1000, 1100, 3), np.uint8))[1].tobytes()
    with gateway(outside.url, door(tmp_path), limits=Limits(pixels=1_000_000)) as running:
        head = json.dumps({"inputs": [
            {"name": "IMAGE", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(bomb) + 4}}
        ]}).encode()  # fmt: skip
        body = head + len(bomb).to_bytes(4, "little") + bomb
        status, _, text = ask(running.http, "POST", PATH, body, Inference_Header_Content_Length=str(len(head)))
        assert status == 400 and b"at most 1 megapixels" in text
        assert infer(running, picture(0, 1000, 1001))[0] == 400


def test_a_header_that_does_not_end_is_cut_off_and_others_are_served(tmp_path: Path, outside: Tail) -> None:
    with gateway(outside.url, door(tmp_path), limits=Limits(idle=0.6)) as running:
        links = [socket.create_connection(("127.0.0.1", running.listening.http), timeout=10) for _ in range(20)]
        ended = threading.Event()

        def drip() -> None:
            while not ended.is_set():
                for link in links:
                    with contextlib.suppress(OSError):
                        link.sendall(b"X-a: b\r\n")
                time.sleep(0.1)

        for link in links:
            link.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\n".encode())
        thread = threading.Thread(target=drip)
        thread.start()
        start = time.monotonic()
        assert infer(running)[0] == 200
        closed = [_closed(link) for link in links]
        ended.set()
        thread.join()
        for link in links:
            link.close()
        assert all(closed) and time.monotonic() - start < 5


def _closed(link: socket.socket) -> bool:
    try:
        return link.recv(100) == b""
    except ConnectionError:
        return True


def test_more_idle_connections_than_may_be_are_cut_off(tmp_path: Path, outside: Tail) -> None:
    with gateway(outside.url, door(tmp_path), limits=Limits(connections=4, idle=4.0)) as running:
        links = [socket.create_connection(("127.0.0.1", running.listening.http), timeout=3) for _ in range(10)]
        time.sleep(2.2)
        for link in links:
            link.settimeout(0.1)
        gone = 0
        for link in links:
            with contextlib.suppress(TimeoutError):
                gone += _closed(link)
            link.close()
        assert gone == 6


def test_a_body_that_does_not_end_is_408_and_frees_its_place(tmp_path: Path, outside: Tail) -> None:
    limits = Limits(body_timeout=0.5, concurrency=1, waiting=0)
    with gateway(outside.url, door(tmp_path), limits=limits) as running:
        body, headers = request()
        with socket.create_connection(("127.0.0.1", running.listening.http), timeout=10) as link:
            size = headers["Inference_Header_Content_Length"]
            link.sendall(
                f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
                f"Inference-Header-Content-Length: {size}\r\n\r\n".encode()
                + body[:100]
            )
            assert link.recv(1 << 16).startswith(b"HTTP/1.1 408")
        assert infer(running)[0] == 200
        with grpc.insecure_channel(running.grpc) as channel:  # a call whose message never comes
            call = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
            stuck = call.future(_never())
            assert stuck.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert infer_grpc(running) == "OK"


def _never() -> Iterator[bytes]:
    time.sleep(2)
    yield from ()


def test_the_end_lets_what_is_under_way_finish_and_takes_no_more(tmp_path: Path, outside: Tail) -> None:
    outside.wait = 1.0
    with gateway(outside.url, door(tmp_path)) as running, ThreadPoolExecutor(4) as pool:
        under_way = [pool.submit(infer, running), pool.submit(infer, running)]
        other = pool.submit(infer_grpc, running)
        time.sleep(0.5)
        running.stop()
        time.sleep(0.2)
        with pytest.raises(ConnectionError):
            socket.create_connection(("127.0.0.1", running.listening.http), timeout=0.5)
        assert [one.result()[0] for one in under_way] == [200, 200] and other.result() == "OK"
    assert len(sent(outside)) == 3


def test_the_end_is_bounded(tmp_path: Path, outside: Tail) -> None:
    outside.wait = 4.0
    start = time.monotonic()
    with (
        ThreadPoolExecutor(2) as pool,
        gateway(outside.url, door(tmp_path), limits=Limits(grace=0.5)) as running,
    ):
        pool.submit(lambda: _swallowed(running))
        time.sleep(0.5)
        running.stop()
        running.stop()
    assert time.monotonic() - start < 8


def _swallowed(running: Running) -> None:
    with contextlib.suppress(OSError):
        infer(running)


def test_a_fault_of_ours_is_500_and_says_nothing(
    tmp_path: Path, outside: Tail, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the picture was 1 2 3")

    with gateway(outside.url, door(tmp_path)) as running:
        monkeypatch.setattr(running.service.task.__class__, "preprocess", broken)
        status, _, text = infer(running)
        assert status == 500 and "1 2 3" not in text + "".join(running.log)
        assert infer_grpc(running) == "UNKNOWN"


@pytest.mark.parametrize("wrong", [{"body": 0}, {"records": 0}, {"waiting": -1}, {"timeout": 0}, {"concurrency": 0}])
def test_limits_of_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        Limits(**wrong)


def test_places_and_alphas_that_cannot_be(tmp_path: Path, outside: Tail) -> None:
    with pytest.raises(RequestError):
        Place(http=None, grpc=None)
    with gateway(outside.url, door(tmp_path)) as running:
        import asyncio

        from sfumato.gateway.server import listen
        from sfumato.gateway.service import Service
        from sfumato.trusted.client import AsyncClient

        async def taken(place: Place) -> None:
            guard = running.service.guard
            async with listen(Service(guard, AsyncClient(outside.url, guard)), place):
                pass

        for place in (Place(http=running.listening.http, grpc=None), Place(http=None, grpc=running.listening.grpc)):
            with pytest.raises(RequestError, match="cannot be listened on"):
                asyncio.run(taken(place))
        with pytest.raises(AlphaError):
            Service(running.service.guard, running.service.upstream, alpha=1.0)
