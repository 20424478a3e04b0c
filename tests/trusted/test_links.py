"""Where a release goes, how long a client waits and how much it reads is not for the server to say."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.http import InferInput

from sfumato.core.errors import ServerError
from sfumato.trusted import links
from sfumato.trusted.client import AsyncClient, Client, _Memory
from tests.trusted.recorder import Recorder, _Handler, recording
from tests.trusted.test_guard import guard, picture


class _Elsewhere(_Handler):
    """Sends every request on, as 307 does: with its body."""

    def _answer(self, status: int, what: object) -> None:
        self.send_response(307)
        self.send_header("Location", f"{self.server.to}{self.path}")  # type: ignore[attr-defined]
        self.send_header("Content-Length", "0")
        self.end_headers()


class _Endless(_Handler):
    def _answer(self, status: int, what: object) -> None:
        if self.command == "GET":
            return super()._answer(status, what)
        self.send_response(200)
        self.send_header("Content-Length", str(1 << 40))
        self.end_headers()
        with_room = b" " * (1 << 16)
        try:
            while True:
                self.wfile.write(with_room)
        except OSError:
            return None


class _Packed(_Handler):
    def end_headers(self) -> None:
        if self.command == "POST":
            self.send_header("Content-Encoding", "gzip")
        super().end_headers()


@pytest.fixture
def server() -> Iterator[Recorder]:
    with recording() as one:
        yield one


def ask(kind: type, url: str, door: Any, **options: Any) -> None:
    """One release to the server there."""
    release = door(picture())
    if kind is Client:
        with Client(url, door, **options) as client:
            client(release)
        return

    async def go() -> None:
        async with AsyncClient(url, door, **options) as client:
            await client(release)

    asyncio.run(go())


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_no_redirect_is_followed(tmp_path: Path, server: Recorder, kind: type) -> None:
    with recording() as other:
        server.RequestHandlerClass = _Elsewhere
        server.to = other.url  # type: ignore[attr-defined]
        with pytest.raises(ServerError):
            ask(kind, server.url, guard(tmp_path), headers={"x-api-key": "secret"})
        assert not other.bodies and not other.asked


@pytest.mark.parametrize("handler", [_Endless, _Packed])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_an_answer_without_end_or_packed_is_none(
    tmp_path: Path, server: Recorder, kind: type, handler: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "MOST", 1 << 20)
    server.RequestHandlerClass = handler
    with pytest.raises(ServerError) as error:
        ask(kind, server.url, guard(tmp_path))
    assert error.value.status == "wrong" and len(server.bodies) == 1


class _Silent(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, end: threading.Event) -> None:
        self.end = end

    def service(self, _: object) -> Any:
        return grpc.unary_unary_rpc_method_handler(lambda _request, _context: self.end.wait(20) and b"")


@pytest.mark.parametrize("shared_memory", [False, True])
def test_a_server_that_says_nothing_is_not_waited_for(tmp_path: Path, shared_memory: bool) -> None:
    end = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool, handlers=(_Silent(end),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        began, door = time.monotonic(), guard(tmp_path)
        url = f"grpc://127.0.0.1:{port}"
        try:
            with Client(url, door, timeout=0.5, retries=0, shared_memory=shared_memory) as client:
                with pytest.raises(ServerError) as error:
                    client.statistics()
                with pytest.raises(ServerError):
                    client(door(picture()))
                memory = client._lent([], {"CODES": np.zeros(4, np.int8)})
                if shared_memory:
                    with pytest.raises(Exception, match="Deadline"), memory:
                        pass
            assert error.value.status == "slow" and time.monotonic() - began < 10
        finally:
            end.set()
            server.stop(0)


def test_no_proxy_of_the_environment_sees_what_stays_here(
    tmp_path: Path, server: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, server.url)
    lines: list[str] = []
    server.RequestHandlerClass = type("Told", (_Handler,), {"log_message": lambda _, *told: lines.append(str(told))})
    with pytest.raises(ServerError):
        ask(Client, "grpc://127.0.0.1:9", guard(tmp_path), timeout=2, retries=0)
    assert not lines


def test_a_thread_that_ends_leaves_no_shared_memory(tmp_path: Path, server: Recorder) -> None:
    class Link:
        def register_system_shared_memory(self, *_: Any) -> None:
            pass

    with Client(server.url, guard(tmp_path), shared_memory=True) as client:

        def lent() -> None:
            with client._own.__dict__.setdefault("memory", _Memory({})).lent(Link(), [given], {"CODES": np.ones(4)}):
                names.append(client._own.memory.name)

        given, names = InferInput("CODES", [4], "FP64"), []  # type: ignore[var-annotated]
        thread = threading.Thread(target=lent)
        thread.start()
        thread.join()
        assert names and not Path("/dev/shm", names[0]).exists()
