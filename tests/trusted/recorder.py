"""A server that keeps all it is sent, and answers as one of the open inference protocol does."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from sfumato.core import wire
from sfumato.core.release import Release

_DTYPES = {"INT8": np.int8, "UINT8": np.uint8, "FP32": np.float32, "INT32": np.int32}


class Recorder(ThreadingHTTPServer):
    """`bodies` are those of requests to infer, `asked` the paths of the others."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.asked: list[str] = []
        self.statuses: list[int] = []  # of the next answers; 200 after them
        self.said: dict[str, Any] = {}  # of the model, instead of what is so
        self.wrong: Any = None  # outputs to answer with instead of right ones
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Recorder
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path.endswith("/config"):
            return self._answer(404, {"error": "no such thing in the open protocol"})
        inputs = [{"name": name, "datatype": kind, "shape": [-1]} for name, kind in wire.TYPES.items()]
        outputs = [{"name": "OUTPUT__0", "datatype": "FP32", "shape": [-1, 2]}]
        return self._answer(
            200, {"name": "m", "versions": ["1"], "inputs": inputs, "outputs": outputs, **self.server.said}
        )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append(body)
        self.server.headers.append(dict(self.headers))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        records = len(tensors(body, int(self.headers["Inference-Header-Content-Length"]))["ALPHA"])
        right = [{"name": "OUTPUT__0", "datatype": "FP32", "shape": [records, 2], "data": [0.5] * (2 * records)}]
        wrong = self.server.wrong
        outputs = right if wrong is None else wrong
        self._answer(status, {"model_name": "m", "model_version": "1", "outputs": outputs})

    def _answer(self, status: int, what: object) -> None:
        body = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def recording() -> Iterator[Recorder]:
    server = Recorder()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def tensors(body: bytes, header: int | None = None) -> wire.Tensors:
    """Of a binary request. Every byte of it must belong to one of the five inputs."""
    header = body.rindex(b"}") + 1 if header is None else header
    told, at, found = json.loads(body[:header]), header, {}
    for given in told["inputs"]:
        size = given["parameters"]["binary_data_size"]
        found[given["name"]] = np.frombuffer(body[at : at + size], _DTYPES[given["datatype"]]).reshape(given["shape"])
        at += size
    assert at == len(body) and set(found) == set(wire.TYPES)
    return found


def released(server: Recorder, number: int, sent: int, block: int, ndim: int = 4) -> Release:
    """The release that a request was."""
    header = int(server.headers[number]["Inference-Header-Content-Length"])
    return wire.from_tensors(tensors(server.bodies[number], header), sent, block, ndim)
