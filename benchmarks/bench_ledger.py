"""Releases entered per second by several processes into one ledger, and none of them lost to kill -9.

    rate = releases entered / seconds from the moment every process is ready until the last is done

Each process enters batches of fresh draws of records of its own, and of records that all of them share (one in ten).
With --kills N, processes that enter without pause are killed at random moments, N times; each writes an entry down
after `enter` has returned, and every entry written down must be in the ledger, with at least the bits of an independent
count, and exactly those where nothing else of the record was entered.

    python benchmarks/bench_ledger.py [--url postgresql://...] [--processes 4] [--batch 64] [--releases 40000]
    python benchmarks/bench_ledger.py --kills 50
"""

import argparse
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from sfumato.trusted.ledger import Entry, Ledger

ARTEFACTS = [hashlib.sha256(bytes([i])).hexdigest() for i in range(2)]
ALPHAS = (0.4, 0.8)
SITES = 256  # sites of a record, for the size of its bits only


def capacity(alpha: float, releases: int) -> float:
    """Bits of K releases, (repeats) with one channel a site."""
    return SITES * 0.5 * math.log2(1 + releases * (2 ** (2 * (1 - alpha)) - 1))


def entry(record: bytes, draw: bytes, artefact: int, alpha: float) -> Entry:
    return Entry(record, draw, ARTEFACTS[artefact], alpha, 0, lambda releases: capacity(alpha, releases))


def entries(batch: int, rng: random.Random) -> Iterator[list[Entry]]:
    shared = [hashlib.sha256(b"shared %d" % i).digest()[:16] for i in range(200)]
    while True:
        records = [rng.choice(shared) if rng.random() < 0.1 else os.urandom(16) for _ in range(batch)]
        yield [entry(record, os.urandom(16), rng.randrange(2), rng.choice(ALPHAS)) for record in records]


def work(url: str, batch: int, batches: int) -> None:
    """One process of the rate."""
    ledger = Ledger(url)
    made = [several for several, _ in zip(entries(batch, random.Random()), range(batches), strict=False)]
    print("ready", flush=True)
    sys.stdin.readline()
    for several in made:
        ledger.enter(several)
    ledger.close()


def work_until_killed(url: str, batch: int) -> None:
    """One process of the kills: an entry is written down after it is in the ledger."""
    rng = random.Random()
    ledger = Ledger(url)
    for several in entries(rng.randint(1, batch), rng):
        if rng.random() < 0.3:
            several.append(several[0])  # a repeat
        ledger.enter(several)
        lines = [[e.record.hex(), e.draw.hex(), ARTEFACTS.index(e.artefact), e.alpha] for e in several]
        os.write(1, (json.dumps(lines) + "\n").encode())  # one write: whole, or torn only at its end


def start(mode: str, *words: object) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, "--as", mode, *map(str, words)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def rate(url: str, processes: int, batch: int, releases: int) -> float:
    batches = -(-releases // (batch * processes))
    before = Ledger(url)
    had = before.totals().releases
    children = [start("worker", url, batch, batches) for _ in range(processes)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    began = time.perf_counter()
    for child in children:
        child.communicate("go\n")
    spent = time.perf_counter() - began
    assert not any(child.returncode for child in children)
    entered = before.totals().releases - had
    before.close()
    assert entered == processes * batches * batch, "releases are missing"
    print(f"{processes} processes, batches of {batch}, {entered} releases: {entered / spent:,.0f} a second")
    return entered / spent


def kills(url: str, count: int, processes: int, batch: int) -> None:
    """Raises AssertionError where an entry that was acknowledged is not in the ledger, or counted wrongly."""
    rng = random.Random()
    with tempfile.TemporaryDirectory() as folder:
        for done in range(0, count, processes):
            outs = [Path(folder) / f"{n}.jsonl" for n in range(done, min(done + processes, count))]
            children = []
            for out in outs:
                with out.open("wb") as stream:
                    command = [sys.executable, __file__, "--as", "victim", url, str(batch), "0"]
                    children.append(subprocess.Popen(command, stdout=stream))
            for child, out in zip(children, outs, strict=True):
                while not out.stat().st_size and child.poll() is None:
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 0.5))
                child.send_signal(signal.SIGKILL)
                assert child.wait() == -signal.SIGKILL, "a process ended by itself"
        check(url, sorted(Path(folder).iterdir()), count)


def check(url: str, outs: list[Path], count: int) -> None:
    sent: Counter[bytes] = Counter()
    draws: dict[tuple[bytes, int, float], set[str]] = defaultdict(set)
    for out in outs:
        for line in out.read_bytes().split(b"\n")[:-1]:
            for record, draw, artefact, alpha in json.loads(line):
                sent[bytes.fromhex(record)] += 1
                draws[bytes.fromhex(record), artefact, alpha].add(draw)
    bits: defaultdict[bytes, float] = defaultdict(float)
    for (record, _, alpha), seen in draws.items():
        bits[record] += capacity(alpha, len(seen))
    ledger = Ledger(url)
    exact = 0
    for record, releases in sent.items():
        found = ledger.exposure(record)
        # more than was acknowledged, where a batch was entered and its process killed before it could say so
        assert found.releases >= releases, f"{record.hex()}: {releases - found.releases} lost"
        assert found.bits >= bits[record] * (1 - 1e-12)
        exact += found.releases == releases and math.isclose(found.bits, bits[record], rel_tol=1e-12)
    total = ledger.totals()
    ledger.close()
    unacknowledged = total.releases - sum(sent.values())
    assert unacknowledged >= 0
    print(
        f"{count} kills: {sum(sent.values())} releases acknowledged, 0 lost; {exact} of {len(sent)} records exactly as"
    )
    print(f"counted independently, the rest with some of {unacknowledged} releases entered and not acknowledged")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of an empty ledger; without it a file in --folder")
    parser.add_argument("--folder", type=Path, help="where that file lies for the time; without it the system's")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--releases", type=int, default=40_000)
    parser.add_argument("--kills", type=int, default=0, help="kill so many processes instead of measuring")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        url = args.url or str(Path(folder) / "ledger.db")
        if args.kills:
            kills(url, args.kills, args.processes, args.batch)
            return
        rate(url, args.processes, args.batch, args.releases)
        rate(url, 1, args.batch, args.releases // 4)
        rate(url, args.processes, 1, args.releases // 40)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as"]:
        mode, where, size, number = sys.argv[2:]
        work(where, int(size), int(number)) if mode == "worker" else work_until_killed(where, int(size))
    else:
        main()
