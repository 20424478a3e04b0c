"""What a gateway tells of itself: figures for Prometheus and one line of JSON a request. Never content, nor a name.

Not even the client's own request id is told: people put names of patients into such fields.
"""

import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

STAGES = ("read", "wait", "decode", "obfuscate", "upstream", "answer")
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TEXT = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class Call:
    """One request for an inference, as it is counted."""

    protocol: str
    request: str = field(default_factory=lambda: secrets.token_hex(8))
    began: float = field(default_factory=time.perf_counter)
    status: int = 200
    reason: str = ""
    fault: str = ""
    records: int = 0
    alpha: float | None = None
    bits: float = 0.0
    bytes_in: int = 0
    bytes_released: int = 0
    bytes_out: int = 0
    stages: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage, one that fails too."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = time.perf_counter() - start


class Metrics:
    """Figures in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self.registry, "namespace": "sfumato", "subsystem": "gateway"}
        self.stages = Histogram("stage_seconds", "Time of a stage.", ["stage"], buckets=_BUCKETS, **common)
        self.whole = Histogram("request_seconds", "Time of a request.", ["protocol"], buckets=_BUCKETS, **common)
        self.requests = Counter("requests", "Requests for an inference.", ["protocol", "status"], **common)
        self.refusals = Counter("refusals", "Requests refused, by reason.", ["reason"], **common)
        self.records = Counter("records", "Records released.", **common)
        self.bits = Counter("released_bits", "Bits that releases can carry at most, not composed.", **common)
        self.bytes = Counter("bytes", "Bytes, by direction: in, released, out.", ["direction"], **common)
        self.in_flight = Gauge("in_flight", "Requests under way, waiting ones too.", **common)
        self.answered, self.failed = 0, 0
        self.ns = {"success": 0, "fail": 0, "wait": 0, "upstream": 0}

    def add(self, call: Call) -> None:
        """A call that has ended."""
        took = time.perf_counter() - call.began
        self.requests.labels(call.protocol, str(call.status)).inc()
        self.whole.labels(call.protocol).observe(took)
        for name, seconds in call.stages.items():
            self.stages.labels(name).observe(seconds)
        for direction, count in (("in", call.bytes_in), ("released", call.bytes_released), ("out", call.bytes_out)):
            self.bytes.labels(direction).inc(count)
        self.records.inc(call.records)
        self.bits.inc(call.bits)
        if call.reason:
            self.refused(call.reason)
        self.answered += call.status == 200
        self.failed += call.status != 200
        self.ns["success" if call.status == 200 else "fail"] += round(took * 1e9)
        for name in ("wait", "upstream"):
            self.ns[name] += round(call.stages.get(name, 0.0) * 1e9)

    def refused(self, reason: str) -> None:
        """One refusal."""
        self.refusals.labels(reason).inc()

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)


def line(call: Call) -> str:
    """A call as one line of JSON."""
    told = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "request": call.request,
        "protocol": call.protocol,
        "status": call.status,
        **({"reason": call.reason} if call.reason else {}),
        **({"fault": call.fault} if call.fault else {}),
        "records": call.records,
        **({} if call.alpha is None else {"alpha": call.alpha}),
        "bits": round(call.bits, 1),
        "bytes": {"in": call.bytes_in, "released": call.bytes_released, "out": call.bytes_out},
        "ms": {name: round(1000 * seconds, 2) for name, seconds in call.stages.items()},
        "total_ms": round(1000 * (time.perf_counter() - call.began), 2),
    }
    return json.dumps(told)


def to_stderr(text: str) -> None:
    """Where lines go without another place."""
    print(text, file=sys.stderr, flush=True)


Log = Callable[[str], None]
