"""What obfuscation costs: time of an obfuscated measurement over that of a clean one, same code, same photographs.

    ratio = seconds(measure at alpha .8, fresh noise) / seconds(measure clean),  in turns, median over pairs

TR-4928's logs give 1.25 (52 s to 65 s) to 1.37 (1.64 s to 2.24 s per fold) for its own two runs.

    python benchmarks/bench_measure.py [--dataset FDDB] [--limit 12] [--pairs 5] [--artefacts DIR --weights W]
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from sfumato.datasets import fddb, sampler
from sfumato.facade import load
from sfumato.measurement import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="FDDB; without it the embedded sampler")
    parser.add_argument("--limit", type=int, default=12, help="photographs of each fold")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--alpha", type=float, default=0.8)
    parser.add_argument("--artefacts", type=Path)
    parser.add_argument("--weights", type=Path)
    args = parser.parse_args()
    protected = load(args.artefacts, weights=args.weights)
    with tempfile.TemporaryDirectory() as folder:
        data = fddb.load(args.dataset or sampler.compose(Path(folder) / "set"))
        seconds: dict[float | None, list[float]] = {None: [], args.alpha: []}
        for _ in range(args.pairs + 1):
            for alpha, taken in seconds.items():
                run = measure(protected, data, alphas=(alpha,), seeds=(None,), limit=args.limit, quiet=True)
                taken.append(run.seconds)
    ratios = [b / a for a, b in zip(*(taken[1:] for taken in seconds.values()), strict=True)]
    low, high = min(ratios), max(ratios)
    print(f"{run.images} photographs, {args.pairs} pairs after one to warm up, alpha {args.alpha}")
    print(f"obfuscated / clean: median {statistics.median(ratios):.3f}, from {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
