"""Clients through a gateway to the real server, which is killed and started again in mid-flight.

    python benchmarks/load_gateway.py --seconds 60 --clients 4

Every byte that goes outside passes a proxy that reads it as a release; what cannot be read as one is leaked. Prints
requests sent, answered, refused by status, failed (an answer that is neither) and lost (none at all), and latencies.
"""

import argparse
import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from tritonclient.utils import InferenceServerException

from sfumato import facade
from sfumato.core import wire
from sfumato.core.errors import SfumatoError
from sfumato.outside import repository, serving
from sfumato.tasks.detection.task import FaceDetection

DTYPES = {"INT8": np.int8, "UINT8": np.uint8, "FP32": np.float32, "INT32": np.int32}
CODES = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
REFUSALS = {"429", "503", "504", *(f"StatusCode.{code}" for code in CODES)}


class Proxy(ThreadingHTTPServer):
    """Hands on to the server at `port` and counts what it sees; 0: there is none."""

    daemon_threads = True

    def __init__(self, sent: int, block: int) -> None:
        self.port, self.sent, self.block, self.seen = 0, sent, block, Counter()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"

    def handed_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command == "POST":
            self.server.seen["releases" if self.release(body) else "leaked"] += 1
        try:
            link = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)
            link.request(self.command, self.path, body, dict(self.headers))
            answer = link.getresponse()
            told = answer.read()
        except (OSError, http.client.HTTPException):
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name in ("Content-Type", "Content-Encoding", "Inference-Header-Content-Length"):
            if answer.headers.get(name):
                self.send_header(name, answer.headers[name])
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def release(self, body: bytes) -> bool:
        try:
            at = int(self.headers["Inference-Header-Content-Length"])
            told, found = json.loads(body[:at]), {}
            for one in told["inputs"]:
                size = one["parameters"]["binary_data_size"]
                found[one["name"]] = np.frombuffer(body[at : at + size], DTYPES[one["datatype"]]).reshape(one["shape"])
                at += size
            wire.from_tensors(found, self.server.sent, self.server.block, 4)
        except (KeyError, ValueError, TypeError, SfumatoError):
            return False
        return at == len(body) and set(found) == set(wire.TYPES) and set(told) <= {"inputs", "parameters"}

    do_GET = do_POST = handed_on  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def outside(place: Path, proxy: Proxy, seconds: float, ready: threading.Event) -> None:
    """The server: up, killed at a third of the time, up again from a half on."""
    with serving.serve(place, ports=(0, 0, 0)) as server:
        proxy.port = server.http
        ready.set()
        time.sleep(seconds / 3)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        proxy.port = 0
    print(f"killed at {seconds / 3:.0f} s")
    time.sleep(seconds / 6)
    start = time.monotonic()
    with serving.serve(place, ports=(0, 0, 0)) as server:
        proxy.port = server.http
        print(f"started again at {seconds / 2:.0f} s, ready {time.monotonic() - start:.0f} s later")
        ready.wait()
        STOP.wait()


STOP = threading.Event()


def client(kind: str, address: str, end: float, seed: int, counts: Counter, took: list[float]) -> None:
    library = {"http": over_http, "grpc": over_grpc}[kind]
    random = np.random.default_rng(seed)
    link = library.InferenceServerClient(address)
    while time.monotonic() < end:
        image = random.integers(0, 256, (1, 600, 800, 3), np.uint8)
        one = library.InferInput("IMAGE", list(image.shape), "UINT8")
        one.set_data_from_numpy(image)
        counts["sent"] += 1
        start = time.monotonic()
        try:
            answer = link.infer("face_detection", [one])
            right = answer.as_numpy("OUTPUT__0").shape == (1, 21824, 4)
            counts["answered" if right else "failed"] += 1
            took.append(time.monotonic() - start)
        except InferenceServerException as error:
            status = str(error.status())
            counts[f"refused {status}" if status in REFUSALS else f"failed {status}"] += 1
            time.sleep(0.5)
        except Exception as error:
            counts[f"lost {type(error).__name__}"] += 1
    link.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=4)
    given = parser.parse_args()
    protected = facade.load(task=FaceDetection())
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        plan = repository.Plan(
            "face-detection", protected.outside, protected.reference, facade.SHIPPED / "server.safetensors",
            facade.face_split().digest(), 4, (32, 32),
        )  # fmt: skip
        for written in repository.write(plan, place / "models"):
            if written.parent.name != "face_detection_release":
                shutil.rmtree(written.parent)  # the server is ready sooner
        key = place / "tenant.key"
        key.touch(0o600)
        key.write_text("ab" * 32 + "\n")
        shape = protected.obfuscator.shape
        proxy, ready = Proxy(shape.sent, shape.block), threading.Event()
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        server = threading.Thread(target=outside, args=(place / "models", proxy, given.seconds, ready))
        server.start()
        ready.wait()
        command = [sys.executable, "-c", "from sfumato.cli.app import main; main()", "gateway", "--http-port", "0"]
        command += ["--grpc-port", "0", "--upstream", f"http://127.0.0.1:{proxy.server_address[1]}"]
        command += ["--ledger", str(place / "ledger.db"), "--key", str(key)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as gateway:
            found = re.search(r"http://(\S+) and grpc://(\S+),", gateway.stderr.readline())
            addresses = {"http": found[1], "grpc": found[2]}
            lines: list[str] = []
            threading.Thread(target=lambda: lines.extend(gateway.stderr), daemon=True).start()
            counts, took, end = Counter(), [], time.monotonic() + given.seconds
            clients = [
                threading.Thread(target=client, args=(kind, addresses[kind], end, i, counts, took))
                for i, kind in enumerate(("http", "grpc")[i % 2] for i in range(given.clients))
            ]
            for one in clients:
                one.start()
            for one in clients:
                one.join()
            gateway.send_signal(signal.SIGTERM)
            code = gateway.wait(60)
        STOP.set()
        server.join()
        report(counts, took, proxy.seen, lines, code)


def report(counts: Counter, took: list[float], seen: Counter, lines: list[str], code: int) -> None:
    print(f"sent {counts['sent']}: {dict(sorted(counts.items()))}; the gateway ended with {code}")
    print(f"outside: {dict(seen)}")
    if not took:
        return
    print(f"latency ms p50 {1000 * np.percentile(took, 50):.0f}, p95 {1000 * np.percentile(took, 95):.0f}")
    stages = defaultdict(list)
    for line in lines:
        if line.startswith("{") and (told := json.loads(line))["status"] == 200:
            for name, value in told["ms"].items():
                stages[name].append(value)
    for name, times in stages.items():
        print(f"{name}: p50 {np.percentile(times, 50):.1f} ms, p95 {np.percentile(times, 95):.1f} ms")


if __name__ == "__main__":
    main()
