"""Whether protection still costs no more than it may: `sfumato bench obfuscate` and `pipeline` against thresholds.

Ratios of medians of runs in turns on one machine, so that they compare across machines as times do not. Prints every
ratio, exits 1 where one is past its threshold, and with --record appends a line to history.jsonl beside this file:
date, machine, versions, settings and ratios.

    python benchmarks/gate.py [--threads 1] [--runs 25] [--pairs 15] [--limit 12] [--record]
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sfumato import benchmarking
from sfumato.facade import load
from sfumato.tasks.detection.task import FaceDetection

STEP_TO_RANDN = 1.0  # at most: the step over z + sigma randn_like(z), the faster layout, 1080p on the CPU
STEP_TO_HEAD = 0.05  # at most: the step over the head
THROUGHPUT = 0.95  # at least: images a second of the pipeline, obfuscated over clean
HISTORY = Path(__file__).with_name("history.jsonl")


def failures(ratios: Mapping[str, float]) -> list[str]:
    """What is past its threshold, as sentences."""
    found = [
        f"{name} is {ratios[name]:.3f}, more than {most}"
        for name, most in (("step/randn", STEP_TO_RANDN), ("step/head", STEP_TO_HEAD))
        if not ratios[name] <= most
    ]
    if not ratios["throughput"] >= THROUGHPUT:
        found.append(f"throughput is {ratios['throughput']:.3f}, less than {THROUGHPUT}")
    return found


def measured(alpha: float, threads: int | None, runs: int, pairs: int, limit: int) -> dict[str, float]:
    """The ratios of this machine, now."""
    step = benchmarking.step(load(task=FaceDetection(size=None)), benchmarking.full_hd(), alpha=alpha, runs=runs)
    with benchmarking.photographs(None, limit) as paths:
        pipeline = benchmarking.pipeline(load(), paths, alpha=alpha, pairs=pairs, workers=threads)
    return {**step.ratios, "throughput": pipeline.ratio}


def line(machine: benchmarking.Machine, settings: Mapping[str, Any], ratios: Mapping[str, float]) -> str:
    """One line of the history."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    rounded = {name: round(ratio, 4) for name, ratio in ratios.items()}
    return json.dumps({"date": date, "machine": asdict(machine), "settings": dict(settings), "ratios": rounded})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alpha", type=float, default=0.8)
    parser.add_argument("--threads", type=int, help="of torch, and workers of the pipeline; without it as many as fit")
    parser.add_argument("--runs", type=int, default=25, help="of each arm of the step")
    parser.add_argument("--pairs", type=int, default=15, help="of the pipeline")
    parser.add_argument("--limit", type=int, default=12, help="photographs of the pipeline")
    parser.add_argument("--record", action="store_true", help="append to the history")
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in ("alpha", "runs", "pairs", "limit")}
    with benchmarking.threads(args.threads):
        machine = benchmarking.machine()
        ratios = measured(threads=args.threads, **settings)
    if args.record:
        with HISTORY.open("a", encoding="utf-8") as history:
            history.write(line(machine, settings, ratios) + "\n")
    for name, ratio in ratios.items():
        print(f"{name:<12} {ratio:.3f}")
    if past := failures(ratios):
        raise SystemExit("\n".join(past))  # exit code 1


if __name__ == "__main__":
    main()
