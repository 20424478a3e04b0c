"""Latency and throughput of a real Triton on this machine: releases against the requests of TR-4928, in one run.

    python benchmarks/bench_triton.py --rounds 40 --seconds 10

Arms, every one over HTTP and interleaved: `release` (sfumato.Client: guard, ledger, int8), `binary` (restored to FP32
[1, 128, 32, 32] at the client, binary tensors), `json` (the same as JSON, as the TR's snippet sends it) and `clean`
(the clean cut tensor, binary, to face_detection_base). Times from the photograph to the detections, and of the request
alone: from what is sent to what is answered. Throughput: 4 clients, each in a process of its own.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tritonclient.http as httpclient

from sfumato import facade
from sfumato.datasets import images, sampler
from sfumato.outside import repository, serving
from sfumato.trusted.client import Client
from sfumato.trusted.guard import Guard
from sfumato.trusted.ledger import Ledger, Policy

ALPHA = 0.8
OUTPUTS = ("OUTPUT__0", "OUTPUT__1")
Arm = Callable[[np.ndarray], tuple[float, float]]  # photograph -> seconds in all, seconds of the request


def arms(port: int, folder: Path) -> dict[str, Arm]:
    protected = facade.load()
    guard = Guard(protected, Ledger(folder / f"ledger-{time.monotonic_ns()}.db", Policy()), bytes(range(32)))
    ours = Client(f"http://127.0.0.1:{port}", guard)
    raw = httpclient.InferenceServerClient(f"127.0.0.1:{port}")

    def release(frame: np.ndarray) -> tuple[float, float]:
        start = time.perf_counter()
        made = guard(frame, ALPHA)
        sent = time.perf_counter()
        answers = ours(made)
        answered = time.perf_counter()
        ours.result(answers, frame.shape[:2])
        return time.perf_counter() - start, answered - sent

    def sending(model: str, binary: bool, tensor: Callable[[np.ndarray], np.ndarray]) -> Arm:
        def one(frame: np.ndarray) -> tuple[float, float]:
            start = time.perf_counter()
            z = tensor(frame)
            sent = time.perf_counter()
            given = httpclient.InferInput("INPUT__0", list(z.shape), "FP32")
            given.set_data_from_numpy(z, binary_data=binary)
            wanted = [httpclient.InferRequestedOutput(name, binary_data=binary) for name in OUTPUTS]
            answer = raw.infer(model, [given], outputs=wanted)
            loc, conf = (answer.as_numpy(name) for name in OUTPUTS)
            answered = time.perf_counter()
            protected.postprocess((torch.from_numpy(loc.copy()), torch.from_numpy(conf.copy())), frame.shape[:2])
            return time.perf_counter() - start, answered - sent

        return one

    def restored(frame: np.ndarray) -> np.ndarray:
        z: Any = protected.outside.restored(protected(frame, ALPHA))  # type: ignore[union-attr]
        return np.ascontiguousarray(z.numpy())

    def clean(frame: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(protected.cut([frame]).numpy())

    return {
        "release": release,
        "binary": sending("face_detection_noisy", True, restored),
        "json": sending("face_detection_noisy", False, restored),
        "clean": sending("face_detection_base", True, clean),
    }


def latency(port: int, folder: Path, rounds: int, frames: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """p50 and p95 in ms, in all and of the request."""
    ways, times = arms(port, folder), dict[str, list[tuple[float, float]]]()
    for turn in range(rounds + 3):
        for name, arm in ways.items():
            taken = arm(frames[turn % len(frames)])
            if turn >= 3:
                times.setdefault(name, []).append(taken)
    table = {}
    for name, taken in times.items():
        whole, request = (sorted(1e3 * t[i] for t in taken) for i in (0, 1))
        table[name] = {
            "p50": statistics.median(whole),
            "p95": whole[int(0.95 * len(whole))],
            "request p50": statistics.median(request),
        }
    return table


def _work(
    port: int, folder: Path, name: str, frames: list[np.ndarray], ready: Any, go: Any, seconds: float, out: Any
) -> None:
    torch.set_num_threads(1)
    arm = arms(port, folder)[name]
    arm(frames[0])
    ready.release()
    go.wait()
    end, done = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        arm(frames[done % len(frames)])
        done += 1
    out.put(done)


def throughput(port: int, folder: Path, name: str, frames: list[np.ndarray], clients: int, seconds: float) -> float:
    """Photographs a second of so many clients together."""
    context = multiprocessing.get_context("spawn")
    ready, go, out = context.Semaphore(0), context.Event(), context.Queue()
    work = [
        context.Process(target=_work, args=(port, folder, name, frames, ready, go, seconds, out))
        for _ in range(clients)
    ]
    for one in work:
        one.start()
    for _ in work:
        ready.acquire()
    go.set()
    done = sum(out.get() for _ in work)
    for one in work:
        one.join()
    return done / seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--pairs", type=int, default=3, help="of throughput runs, release and clean")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    protected, cut = facade.load(), facade.face_split()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sampled = sampler.compose(folder / "sampler", images=10, seed=0)
        frames = [images.read(path) for path in images.paths(sampled)]
        plan = repository.Plan(
            "face-detection", protected.outside, protected.reference, facade.SHIPPED / "server.safetensors",
            cut.digest(), 4, (32, 32),
        )  # fmt: skip
        repository.write(plan, folder / "models")
        with serving.serve(folder / "models", ports=(0, 0, 0)) as server:
            table = latency(server.http, folder, options.rounds, frames)
            rates: dict[str, list[float]] = {"release": [], "clean": []}
            for _ in range(options.pairs):
                for name, found in rates.items():
                    found.append(throughput(server.http, folder, name, frames, options.clients, options.seconds))
    print(
        f"{options.rounds} rounds, {len(frames)} photographs of the embedded sampler, seed 0, alpha {ALPHA}, one thread"
    )
    print(f"{'':10}{'p50 ms':>9}{'p95 ms':>9}{'request ms':>12}{'release / it':>14}{'request':>9}")
    ours = table["release"]
    for name, row in table.items():
        ratios = ours["p50"] / row["p50"], ours["request p50"] / row["request p50"]
        print(f"{name:10}{row['p50']:9.1f}{row['p95']:9.1f}{row['request p50']:12.1f}{ratios[0]:14.3f}{ratios[1]:9.3f}")
    ratio = statistics.median(a / b for a, b in zip(rates["release"], rates["clean"], strict=True))
    print(f"{options.clients} clients: {rates} a second, release / clean {ratio:.3f}")
    if options.json:
        options.json.write_text(json.dumps({"latency": table, "throughput": rates}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
