"""Train the shipped detector: FaceBoxes from random weights, with the public FaceBoxes as teacher; no labels are read.

    L = distance(student, teacher) + mean over (pool2, inception3, conv3_2, conv4_2) of |f - f^T|^2 / |f^T|^2

Knowledge distillation with hints (arXiv 1412.6550). The second pool is hinted as a whole, so the layers before it, like
all others, find weights of their own. Crops of 512 px at a random scale, then whole photographs at 1024 px for the last
fifth of each round; a round is one cycle of the learning rate, half as high as the one before. Every tenth photograph
is held out, and the agreement with the teacher on some of those is printed. Started again it goes on from its
checkpoint. The third round took 54 minutes on one core of a busy two-core machine.

    python benchmarks/train_faceboxes.py --teacher FaceBoxesProd.pth --photos A --photos B --out DIR/own.safetensors
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from sfumato.core.files import atomic, write_bytes
from sfumato.learn.objective import feature_error, watched
from sfumato.tasks.detection.faceboxes import FaceBoxes, with_weights
from sfumato.tasks.detection.task import MEAN_BGR, FaceDetection

HINTS = ("pool2", "inception3", "conv3_2", "conv4_2")
SMALL, WHOLE = 512, 1024
WHOLE_FROM = 0.8
HELD_OUT = 10  # every tenth photograph of a folder, as `sfumato fit` holds out
VALIDATED = 60
SMALLEST_SCALE, LARGEST_SCALE = 0.45, 1.3  # of 1024 px, the size the detector is used at


def crop(path: Path, draw: np.random.Generator, side: int) -> Tensor:
    """One training input [3, side, side]: random scale, aspect, place, mirror and brightness."""
    image = cv2.imread(str(path))
    scale = np.exp(draw.uniform(np.log(SMALLEST_SCALE), np.log(LARGEST_SCALE))) if side == SMALL else 1.0
    height, width = (max(32, round(WHOLE * scale * draw.uniform(0.85, 1.15))) for _ in range(2))
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    if draw.random() < 0.5:
        image = image[:, ::-1]
    canvas = np.full((side, side, 3), MEAN_BGR, np.float32)
    top, left = (int(draw.integers(min(0, side - length), max(0, side - length) + 1)) for length in (height, width))
    y0, x0 = max(0, top), max(0, left)
    y1, x1 = min(side, top + height), min(side, left + width)
    canvas[y0:y1, x0:x1] = image[y0 - top : y1 - top, x0 - left : x1 - left]
    canvas = (canvas - np.asarray(MEAN_BGR, np.float32)) * np.float32(draw.uniform(0.8, 1.2))
    return torch.from_numpy(canvas).permute(2, 0, 1)


def train(
    teacher: FaceBoxes, photos: list[Path], folder: Path, *, rounds: int, steps: int, batch: int, seed: int
) -> nn.Module:
    """The averaged student after `rounds` of `steps`."""
    torch.manual_seed(seed)
    student = FaceBoxes().to(memory_format=torch.channels_last)
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    checkpoint = folder / "faceboxes-checkpoint.pt"
    saved = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else {"step": 0}
    first = saved["step"]
    if first:
        student.load_state_dict(saved["student"])
        average.load_state_dict(saved["average"])
    bar = tqdm(total=rounds * steps, initial=first, desc="train", mininterval=5)
    for number in range(first // steps, rounds):
        rate = 3e-3 / 2**number
        optimiser = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps + 1, pct_start=0.1)
        if first % steps and number == first // steps:
            optimiser.load_state_dict(saved["optimiser"])
            schedule.load_state_dict(saved["schedule"])
        parts = {"student": student, "average": average, "optimiser": optimiser, "schedule": schedule}
        for step in range(max(first, number * steps), (number + 1) * steps):
            loss = train_step(student, teacher, photos, step, steps, batch, seed)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 5.0)
            optimiser.step()
            schedule.step()
            average.update_parameters(student)
            bar.update()
            if (step + 1) % 100 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
                with atomic(checkpoint) as temporary:
                    states = {name: part.state_dict() for name, part in parts.items()}
                    torch.save({"step": step + 1, **states}, temporary)
    return average.module.eval()


def train_step(
    student: nn.Module, teacher: nn.Module, photos: list[Path], step: int, steps: int, batch: int, seed: int
) -> Tensor:
    draw = np.random.default_rng([seed, step])
    whole = step % steps >= WHOLE_FROM * steps
    side, count = (WHOLE, max(2, batch // 4)) if whole else (SMALL, batch)
    task = FaceDetection(size=(side, side))
    x = torch.stack([crop(photos[int(draw.integers(len(photos)))], draw, side) for _ in range(count)])
    with torch.no_grad(), watched(teacher, HINTS) as wanted:
        target = task.outputs(teacher(x))
    # The whole photographs come in batches too small for batch statistics: the running ones are kept.
    student.train(mode=not whole)
    with watched(student, HINTS) as seen:
        output = task.outputs(student(x))
    return (task.distance(output, target) + 4 * feature_error(seen, wanted)).mean()


@torch.no_grad()
def agreement(student: nn.Module, teacher: nn.Module, photos: list[Path]) -> float:
    """AP of the student's detections against the teacher's in photographs it was not trained on."""
    task = FaceDetection()
    inputs = [task.preprocess(cv2.imread(str(path)))[None] for path in photos]
    sides = [[task.outputs(model(x)) for x in inputs] for model in (student, teacher)]
    ours, theirs = (tuple(torch.cat(parts) for parts in zip(*side, strict=True)) for side in sides)
    return task.agreement(ours, theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--photos", type=Path, action="append", required=True)
    parser.add_argument("--out", type=Path, default=Path("faceboxes.safetensors"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4500, help="of one round")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folders = [sorted(folder.rglob("*.jpg")) for folder in args.photos]
    photos = [path for paths in folders for i, path in enumerate(paths) if i % HELD_OUT != HELD_OUT - 1]
    held = folders[0][HELD_OUT - 1 :: HELD_OUT][:VALIDATED]
    teacher = with_weights(torch.load(args.teacher, map_location="cpu", weights_only=True))
    teacher = teacher.to(memory_format=torch.channels_last)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sizes = {"rounds": args.rounds, "steps": args.steps, "batch": args.batch}
    model = train(teacher, photos, args.out.parent, **sizes, seed=args.seed)
    # Weights fit into half precision; the variances of batch norm exceed its largest number.
    halved = {k: v.half() if v.is_floating_point() and v.dim() > 1 else v for k, v in model.state_dict().items()}
    state = {k: v.contiguous() for k, v in halved.items()}
    write_bytes(args.out, save(state))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, from {len(photos)} photographs")
    print(f"agreement with the teacher on {len(held)} photographs held out: {agreement(model, teacher, held):.4f}")


if __name__ == "__main__":
    main()
