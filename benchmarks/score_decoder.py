"""What the shipped decoder recovers from releases of photographs it never saw, beside the zero-information anchor.

Mean PSNR and SSIM of 256 x 256 reconstructions of releases at 1024 x 1024 with fresh noise; the anchor is the mean of
the scored photographs. One decoder of modest size, trained briefly: a floor of what attackers reach, not a ceiling.

    python benchmarks/score_decoder.py --photos FOLDER [--limit 100] [--alpha .05 --alpha .8]
"""

import argparse
from pathlib import Path

from sfumato.attack import decoder
from sfumato.datasets.folder import Photographs
from sfumato.facade import SHIPPED, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=100, help="so many, evenly spaced over the folder")
    parser.add_argument("--alpha", type=float, action="append")
    args = parser.parse_args()
    protected = load()
    attacker = decoder.load(SHIPPED / "decoder.safetensors", protected)
    every = Photographs(args.photos, quiet=True)
    photos = every[:: max(1, len(every) // args.limit)][: args.limit]
    print(f"{len(photos)} of {len(every)} photographs, obfuscator {protected.digest[:16]}")
    print("alpha  PSNR   SSIM   (anchor PSNR, SSIM)")
    for alpha in args.alpha or (0.05, 0.4, 0.8, 0.9, 0.95):
        s = decoder.score(protected, attacker, photos, alpha)
        print(f"{alpha:<5}  {s['psnr']:.2f}  {s['ssim']:.3f}  ({s['anchor_psnr']:.2f}, {s['anchor_ssim']:.3f})")


if __name__ == "__main__":
    main()
