"""How often a near-duplicate loses its coarse code, and how often two photographs share one.

Near-duplicates of every photograph: one bit of one value changed; compressed again as JPEG at quality 95, 85, 75, 50;
halved. Pairs: all of the photographs. A collection that holds duplicates has pairs that ought to agree.

    python benchmarks/bench_record_codes.py --photos FOLDER [--limit 1000] [--seed 0]
"""

import argparse
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from sfumato.datasets import images
from sfumato.trusted import record

Picture = NDArray[np.uint8]
QUALITIES = (95, 85, 75, 50)


def near(picture: Picture, draw: np.random.Generator) -> dict[str, Picture]:
    """Near-duplicates by name."""
    flipped = picture.copy()
    flipped[tuple(draw.integers(0, n) for n in picture.shape)] ^= 1
    found = {"one bit": flipped, "halved": cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)}
    for quality in QUALITIES:
        coded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        found[f"JPEG {quality}"] = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)
    return {name: np.asarray(one, np.uint8) for name, one in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = np.random.default_rng(args.seed)
    paths = images.paths(args.photos)
    chosen = [paths[i] for i in sorted(draw.permutation(len(paths))[: args.limit])]
    lost, codes = Counter[str](), Counter[bytes]()
    for path in chosen:
        picture = images.read(path)
        own = record.coarse(picture)
        codes[own] += 1
        lost.update(name for name, one in near(picture, draw).items() if record.coarse(one) != own)
    pairs = len(chosen) * (len(chosen) - 1) // 2
    shared = sum(n * (n - 1) // 2 for n in codes.values())
    print(f"{len(chosen)} of {len(paths)} photographs, seed {args.seed}")
    for name in ("one bit", *(f"JPEG {quality}" for quality in QUALITIES), "halved"):
        print(f"code lost, {name}: {lost[name] / len(chosen):.2%}")
    print(f"code shared: {shared} of {pairs:,} pairs")


if __name__ == "__main__":
    main()
