"""Identity linkage alone, as the full audit runs it, against the clean head output and releases of one artefact.

    python benchmarks/score_linkage.py --data LFW --recogniser MobileFaceNet.onnx --work DIR [--artefacts A --weights W]

For comparing fits without a whole audit: AUC and TAR at a FAR of .01 on people never seen, and the AUC of what the
scene alone gives. Seed 0; `--work` keeps the head's outputs for the next time and belongs inside the trust zone.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from sfumato.attack.base import FULL, Clean, Releases, Tap
from sfumato.attack.identity import Linkage
from sfumato.attack.recogniser import Recogniser
from sfumato.auditing import prey
from sfumato.facade import load
from sfumato.tasks.detection.task import FaceDetection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="photographs, one folder a person")
    parser.add_argument("--recogniser", type=Path, required=True)
    parser.add_argument("--artefacts", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--alpha", type=float, action="append")
    parser.add_argument("--size", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(1)
    protected = load(args.artefacts, weights=args.weights, task=FaceDetection(size=(args.size, args.size)))
    found = prey.build(protected, prey.source(args.data), args.work, size=args.size)
    effort, attacker = dataclasses.replace(FULL, quiet=True), Linkage(Recogniser(args.recogniser))
    print(
        f"{len(found.test)} records to test on, {effort.tested} at most, {effort.steps} steps; {protected.digest[:16]}"
    )
    print(f"{'alpha':8}{'AUC':>8}{'TAR .01':>9}{'scene':>8}")
    taps: list[Tap] = [Clean(), *(Releases(protected, alpha) for alpha in args.alpha or (0.8, 0.95))]
    for tap in taps:
        f = attacker.attack(found, tap, effort).figures
        name = "clean" if tap.alpha is None else f"{tap.alpha:g}"
        print(f"{name:8}{f['auc']:8.3f}{f['tar at far 1e-2']:9.3f}{f['auc without the middle']:8.3f}", flush=True)


if __name__ == "__main__":
    main()
