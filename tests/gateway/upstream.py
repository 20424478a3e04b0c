"""A gateway on a thread of its own, before a server that keeps all it is sent and answers as the real tail does."""

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfumato.core.release import Release
from sfumato.facade import load
from sfumato.gateway.server import Listening, Place, listen
from sfumato.gateway.service import Limits, Service
from sfumato.tasks.detection.task import FaceDetection
from sfumato.trusted.client import AsyncClient
from sfumato.trusted.guard import Guard
from sfumato.trusted.ledger import Ledger, Policy
from sfumato.trusted.noise import Keyed
from sfumato.trusted.protect import Protected
from tests.trusted.recorder import Recorder, _Handler, recording, released

KEY, SIDE, MODEL = bytes(range(32)), 128, "face_detection"


class Tail(Recorder):
    """Answers with what `protected` has outside. `wait` seconds pass before."""

    protected: Protected
    wait = 0.0
    told: Any = None  # outputs in the metadata, instead of right ones
    digest = ""  # told as the model's, where it is not empty


class _Answering(_Handler):
    server: Tail

    def do_GET(self) -> None:  # noqa: N802
        if self.path.endswith("/config") and self.server.digest:
            self.server.asked.append(self.path)
            told = {"artefact_digest": {"string_value": self.server.digest}}
            inputs = [{"name": name} for name in ("CODES", "CHANNELS", "ALPHA", "SITES", "DIGEST")]
            return self._answer(200, {"input": inputs, "max_batch_size": 16, "parameters": told})
        return super().do_GET()

    def do_POST(self) -> None:  # noqa: N802
        time.sleep(self.server.wait)
        super().do_POST()

    def _answer(self, status: int, what: Any) -> None:
        if self.command == "GET" and "outputs" in what and self.server.told is not None:
            what["outputs"] = self.server.told
        elif self.command == "GET" and "outputs" in what:
            what["outputs"] = [
                {"name": f"OUTPUT__{i}", "datatype": "FP32", "shape": [-1, -1, width]} for i, width in ((0, 4), (1, 2))
            ]
            what["versions"] = ["1", "7"]
        if self.command == "POST" and self.server.wrong is None:
            release = sent(self.server)[-1]
            assert self.server.protected.outside is not None
            with torch.no_grad():
                outputs = self.server.protected.outside(release)
            what["outputs"] = [
                {"name": f"OUTPUT__{i}", "datatype": "FP32", "shape": list(o.shape), "data": o.flatten().tolist()}
                for i, o in enumerate(outputs)
            ]
        super()._answer(status, what)


def sent(server: Recorder) -> list[Release]:
    """Every request as the release that it was; raises where one holds anything else."""
    shape = _SHIPPED.obfuscator.shape
    return [released(server, number, shape.sent, shape.block) for number in range(len(server.bodies))]


_SHIPPED = load(task=FaceDetection(size=(SIDE, SIDE)))


def door(place: Path, policy: Policy | None = None, *, keyed: bool = True) -> Guard:
    """A guard of the shipped detector on a small input."""
    protected = _SHIPPED.with_noise(Keyed(KEY)) if keyed else _SHIPPED
    return Guard(protected, Ledger(place / "ledger.db", policy or Policy()), KEY)


@contextmanager
def tail() -> Iterator[Tail]:
    """The server outside."""
    with recording() as plain:
        plain.RequestHandlerClass = _Answering
        plain.__class__ = Tail
        assert isinstance(plain, Tail)
        plain.protected = _SHIPPED
        yield plain


@dataclass
class Running:
    """A gateway that listens, and its log."""

    listening: Listening
    log: list[str]
    stop: Any
    errors: list[BaseException] = field(default_factory=list)

    @property
    def service(self) -> Service:
        return self.listening.service

    @property
    def http(self) -> str:
        return f"127.0.0.1:{self.listening.http}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.listening.grpc}"

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log]


@contextmanager
def gateway(
    url: str,
    guard: Guard,
    *,
    limits: Limits | None = None,
    place: Place | None = None,
    timeout: float = 10.0,
    retries: int = 0,
    **options: Any,
) -> Iterator[Running]:
    """A gateway before the server at `url`, on free ports."""
    log: list[str] = []
    started: list[Running] = []
    ready, failed = threading.Event(), []

    async def whole() -> None:
        ended = asyncio.Event()
        outside = AsyncClient(url, guard, timeout=timeout, retries=retries)
        service = Service(guard, outside, limits=limits, log=log.append, **options)
        try:
            async with listen(service, place or Place(http=0, grpc=0)) as listening:
                loop = asyncio.get_running_loop()

                def stop() -> None:
                    with contextlib.suppress(RuntimeError):  # it has ended already
                        loop.call_soon_threadsafe(ended.set)

                started.append(Running(listening, log, stop))
                ready.set()
                await ended.wait()
        except BaseException as error:
            failed.append(error)
            raise
        finally:
            ready.set()

    thread = threading.Thread(target=lambda: asyncio.run(whole()), daemon=True)
    thread.start()
    assert ready.wait(30) and started, failed
    try:
        yield started[0]
    finally:
        started[0].stop()
        thread.join(30)
        assert not thread.is_alive() and not failed
        guard.ledger.close()


def picture(seed: int = 0, high: int = SIDE, wide: int = SIDE) -> np.ndarray:
    """BGR, never the same to a ledger's coarse code for other seeds but by chance."""
    drawn = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return np.ascontiguousarray(np.kron(drawn, np.ones((-(-high // 4), -(-wide // 4), 1), np.uint8))[:high, :wide])


def ask(address: str, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """One plain HTTP request."""
    link = http.client.HTTPConnection(address, timeout=20)
    try:
        link.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = link.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        link.close()
