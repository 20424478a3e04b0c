"""What protection costs on this machine: time and memory of the obfuscation step, of the pipeline, the wire and a fit.

    ratio = median(t_a) / median(t_b),   a and b run in turns (a b a b ...) after a round to warm up

so that what else the machine does falls on both. Beside the step stands its floor, the time of what no implementation
of this obfuscator can leave out, at rates measured in turns with it:

    floor = max(M / r_mm + 4 W / r_key,  bytes / r_copy)                                                       (floor)

M multiply-adds of its convolutions and of the transform for the coefficients that are sent, W words of keystream,
bytes: head output and weights read once, codes written once. r_mm is that of torch.mm at the size of the first
convolution, r_key of ChaCha20, r_copy of a copy of the head output. Elementwise work and Box-Muller are not counted.
"""

import gc
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import cv2
import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor

from sfumato import __version__, facade
from sfumato.core import channel
from sfumato.core.errors import RequestError
from sfumato.core.obfuscator import Shape
from sfumato.core.release import Release
from sfumato.core.sites import stack
from sfumato.core.task import Image, Outputs
from sfumato.datasets import fddb, images, sampler
from sfumato.datasets.folder import Folder
from sfumato.learn.fit import Settings
from sfumato.measurement import measure
from sfumato.tasks.detection.task import FaceDetection
from sfumato.trusted.noise import Fresh
from sfumato.trusted.protect import Protected

FULL_HD = (1080, 1920)  # height, width
STREAMED = (180, 320)  # of the stream's images: Full HD at a sixth of its side, so that 10,000 take under a minute
# TR-4928: the step on a 1920 x 1080 image, five runs on one V100, the GPU's cache cleared between them.
TR_4928_MS = (5.47, 5.27, 4.54, 5.24, 4.84)
ALPHAS = (0.05, 0.4, 0.8, 0.95)  # of the wire
SIGMA = 0.5  # of the baseline z + sigma randn; its time does not depend on it


@dataclass(frozen=True)
class Timing:
    """Seconds of every run of one thing, in the order of the runs."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile, in seconds."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def as_dict(self) -> dict[str, Any]:
        low, high = self.spread
        return {"median": self.median, "low": low, "high": high, "seconds": list(self.seconds)}


@dataclass(frozen=True)
class Machine:
    """What the figures depend on."""

    cpu: str
    cores: int
    threads: int
    system: str
    python: str
    torch: str
    numpy: str
    sfumato: str


@dataclass(frozen=True)
class Work:
    """What the step must do for one record: multiply-adds, bytes to and from memory, 32-bit words of keystream."""

    multiply_adds: int
    bytes: int
    words: int


@dataclass(frozen=True)
class Floor:
    """`work` at the measured rates: multiply-adds, bytes copied (read and written), bytes of keystream a second."""

    work: Work
    matmul: float
    copy: float
    keystream: float

    @property
    def seconds(self) -> float:
        """See (floor)."""
        work = self.work
        return max(work.multiply_adds / self.matmul + 4 * work.words / self.keystream, work.bytes / self.copy)


@dataclass(frozen=True)
class Step:
    """The obfuscation step of one image on one device.

    Arms: `step` (head output to release), `head`, `head + step`, `noise` (of the step, alone), `randn` and
    `randn, channels last` (z + sigma randn_like(z) in either layout of memory).
    """

    device: str
    shape: tuple[int, ...]
    alpha: float
    arms: dict[str, Timing]
    floor: Floor | None

    @property
    def baseline(self) -> str:
        """The arm of the faster baseline."""
        return min(("randn", "randn, channels last"), key=lambda name: self.arms[name].median)

    @property
    def ratios(self) -> dict[str, float]:
        """Of medians: step over the faster baseline, over the head, and over the floor where there is one."""
        step = self.arms["step"].median
        found = {"step/randn": step / self.arms[self.baseline].median, "step/head": step / self.arms["head"].median}
        return found | ({"step/floor": step / self.floor.seconds} if self.floor else {})

    def as_dict(self) -> dict[str, Any]:
        floor = self.floor and asdict(self.floor) | {"seconds": self.floor.seconds}
        return {
            "device": self.device,
            "shape": list(self.shape),
            "alpha": self.alpha,
            "arms": {name: timing.as_dict() for name, timing in self.arms.items()},
            "baseline": self.baseline,
            "ratios": self.ratios,
            "floor": floor,
        }


@dataclass(frozen=True)
class Stream:
    """A stream of images, photograph to bytes: megabytes resident after a tenth of them and at the end."""

    images: int
    size: tuple[int, int]
    early: float
    late: float
    seconds: float

    @property
    def growth(self) -> float:
        """Megabytes."""
        return self.late - self.early

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"growth": self.growth}


@dataclass(frozen=True)
class Pipeline:
    """Images a second of decode, head, (obfuscate, restore,) tail and NMS; one figure an arm and pair."""

    images: int
    alpha: float
    clean: tuple[float, ...]
    obfuscated: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Throughput obfuscated over clean, pair by pair."""
        return tuple(ours / theirs for ours, theirs in zip(self.obfuscated, self.clean, strict=True))

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratios": list(self.ratios), "ratio": self.ratio}


@dataclass(frozen=True)
class Encoding:
    """One way to send a head output: bytes, and seconds to write and to read them."""

    name: str
    alpha: float | None
    bytes: int
    write: Timing
    read: Timing

    def as_dict(self) -> dict[str, Any]:
        both = {"write": self.write.as_dict(), "read": self.read.as_dict()}
        return {"name": self.name, "alpha": self.alpha, "bytes": self.bytes} | both


@dataclass(frozen=True)
class Wire:
    """Releases of one head output at several alphas beside itself as FP32: binary, and JSON."""

    shape: tuple[int, ...]
    encodings: list[Encoding]

    def ratio(self, encoding: Encoding) -> float:
        """Bytes of FP32 binary over those of `encoding`."""
        return next(e.bytes for e in self.encodings if e.name == "FP32") / encoding.bytes

    def as_dict(self) -> dict[str, Any]:
        rows = [encoding.as_dict() | {"smaller": self.ratio(encoding)} for encoding in self.encodings]
        return {"shape": list(self.shape), "encodings": rows}


@dataclass(frozen=True)
class Steps:
    """Steps of a fit: seconds of each after the first, and of what came before (head outputs, closed-form start)."""

    records: int
    batch: int
    before: float
    each: Timing

    @property
    def per_second(self) -> float:
        return 1 / self.each.median

    def as_dict(self) -> dict[str, Any]:
        facts = {"records": self.records, "batch": self.batch, "before": self.before}
        return facts | {"each": self.each.as_dict(), "per_second": self.per_second}


def machine() -> Machine:
    """This one, with torch's threads as they are now."""
    return Machine(
        _cpu(), os.cpu_count() or 1, torch.get_num_threads(), f"{platform.system()} {platform.machine()}",
        platform.python_version(), str(torch.__version__), np.__version__, __version__,
    )  # fmt: skip


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads for torch inside the block; None leaves them as they are. Raises RequestError."""
    if count is not None and count < 1:
        raise RequestError(f"{count} threads", wanted="1 or more", do="--threads 1")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved(
    arms: Mapping[str, Callable[[], object]], runs: int, device: torch.device | None = None
) -> dict[str, Timing]:
    """Every arm once a round, `runs` rounds after one to warm up. Raises RequestError for no run.

    On CUDA the allocator's cache is emptied before a run and the device waited for before and after it.
    """
    if runs < 1:
        raise RequestError(f"{runs} runs", wanted="1 or more", do="--runs 5")
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(runs + 1):
        for name, arm in arms.items():
            _settle(device)
            started = perf_counter()
            arm()
            _wait(device)
            taken[name].append(perf_counter() - started)
    return {name: Timing(tuple(seconds[1:])) for name, seconds in taken.items()}


def step(protected: Protected, image: Image, *, alpha: float = 0.8, runs: int = 25) -> Step:
    """Time the step on `image` [H, W, 3], on the device `protected` is on. Raises RequestError, AlphaError.

    The task should take images at their own size (FaceDetection(size=None)).
    """
    device = protected.obfuscator.mean.device
    x = stack([protected.task.preprocess(image)]).to(device)
    with torch.inference_mode():
        z: Tensor = protected.head(x)
        planar, last = z.contiguous(), z.contiguous(memory_format=torch.channels_last)
        _, high, wide = protected.obfuscator.shape.codes(z.shape[2:])
        work = required(protected, (z.shape[2], z.shape[3]), alpha)
        noise, sent = Fresh(), carrying(protected, alpha)
        arms: dict[str, Callable[[], object]] = {
            "head": lambda: protected.head(x),
            "step": lambda: protected.obfuscate(z, alpha),
            "head + step": lambda: protected.obfuscate(protected.head(x), alpha),
            "randn": lambda: planar + SIGMA * torch.randn_like(planar),
            "randn, channels last": lambda: last + SIGMA * torch.randn_like(last),
            "noise": lambda: noise.normals(1, (high, wide, sent)),
        }
        rates = _rates(protected.obfuscator.shape, last, 4 * work.words) if device.type == "cpu" else {}
        timed = interleaved(arms | {name: run for name, (run, _) in rates.items()}, runs, device)
    speed = {name: amount / timed.pop(name).median for name, (_, amount) in rates.items()}
    return Step(str(device), tuple(z.shape), alpha, timed, Floor(work, **speed) if speed else None)


def carrying(protected: Protected, alpha: float) -> int:
    """Coefficients of a block that carry bits at alpha."""
    return len(_sent(protected, alpha))


def _sent(protected: Protected, alpha: float) -> Tensor:
    obfuscator = protected.obfuscator
    return obfuscator.allocation.carrying(channel.as_alpha(alpha, 1, obfuscator.mean.device))


def required(protected: Protected, size: tuple[int, int], alpha: float) -> Work:
    """What one record of `size` (h, w) sites needs at alpha.

    With C channels in, k out of which anything is sent, m in the context, b a block's side and s coefficients sent a
    block, per site

        C (k + m) + 2 * 25 m + m^2 + m k     multiply-adds of convolutions,  and per block  s b^2  of the transform

    The transform is counted as a product with the rows of its matrix that are sent.
    """
    shape, coefficients = protected.obfuscator.shape, _sent(protected, alpha)
    c, m, square = shape.channels, shape.context, shape.block**2
    sent, k = len(coefficients), len((coefficients // square).unique())
    sites, blocks = size[0] * size[1], shape.coded(size) // square
    kernels = c * (k + m) + 2 * 25 * m + m * m + m * k
    transform = blocks * sent * square if square > 1 else 0
    weights = kernels + (k + m) + 3 * m + k + (square**2 if square > 1 else 0) + 3 * sent
    moved = 4 * sites * c + 4 * weights + blocks * shape.sent
    return Work(sites * kernels + transform, moved, 2 * -(-blocks * sent // 2))


def stream(protected: Protected, count: int, *, alpha: float = 0.8) -> Stream:
    """Obfuscate `count` images of noise, STREAMED (height, width), to bytes, and watch memory. Raises RequestError."""
    if count < 10:
        raise RequestError(f"a stream of {count} images", wanted="10 or more", do="--stream 10000")
    draw = np.random.default_rng(0)
    early, started = 0.0, perf_counter()
    for number in range(1, count + 1):
        image = draw.integers(0, 256, (*STREAMED, 3), np.uint8)
        protected(image, alpha).to_bytes()
        if number == count // 10:
            early = _resident()
    return Stream(count, STREAMED, early, _resident(), perf_counter() - started)


def pipeline(
    protected: Protected, paths: Sequence[Path], *, alpha: float = 0.8, pairs: int = 15, workers: int | None = None
) -> Pipeline:
    """Throughput of `measure` over the photographs at `paths`, clean and at alpha with fresh noise, in turns.

    Files are read and decoded in every run. Raises RequestError, ImageError, AlphaError.
    """
    if pairs < 1 or not paths:
        raise RequestError(f"{pairs} pairs of {len(paths)} photographs", wanted="1 or more of both", do="--pairs 15")
    channel.as_alpha(alpha, 1)
    # The truths of a measurement without a truth: its AP is not looked at.
    data = fddb.Fddb(paths[0].parent, [tuple(fddb.Entry(p.name, p, np.array([[0.0, 0.0, 1.0, 1.0]])) for p in paths)])
    rates: dict[float | None, list[float]] = {None: [], alpha: []}
    for _ in range(pairs + 1):
        for arm, rate in rates.items():
            run = measure(protected, data, alphas=(arm,), seeds=(None,), workers=workers, quiet=True)
            rate.append(run.images / run.seconds)
    return Pipeline(len(paths), alpha, tuple(rates[None][1:]), tuple(rates[alpha][1:]))


def wire(protected: Protected, image: Image, *, alphas: Sequence[float] = ALPHAS, runs: int = 25) -> Wire:
    """Size and time of the head output of `image` as releases, as FP32 and as JSON of FP32. Raises AlphaError."""
    z = protected.cut([image]).cpu().contiguous()
    arms: dict[str, Callable[[], object]] = {}
    sizes: dict[str, tuple[float | None, int]] = {}
    for alpha in dict.fromkeys(alphas):
        release, name = protected.obfuscate(z.to(protected.obfuscator.mean.device), alpha), f"release, alpha {alpha:g}"
        data = release.to_bytes()
        sizes[name] = alpha, len(data)
        arms |= {f"{name} write": release.to_bytes, f"{name} read": partial(Release.from_bytes, data)}
    binary, text = z.numpy().tobytes(), json.dumps(z.tolist())
    sizes |= {"FP32": (None, len(binary)), "FP32 as JSON": (None, len(text.encode()))}
    arms |= {
        "FP32 write": lambda: z.numpy().tobytes(),
        "FP32 read": lambda: torch.from_numpy(np.frombuffer(binary, np.float32).reshape(z.shape).copy()),
        "FP32 as JSON write": lambda: json.dumps(z.tolist()).encode(),
        "FP32 as JSON read": lambda: torch.tensor(json.loads(text)),
    }
    timed = interleaved(arms, runs)
    rows = [Encoding(n, a, size, timed[f"{n} write"], timed[f"{n} read"]) for n, (a, size) in sizes.items()]
    return Wire(tuple(z.shape), rows)


def fit(
    records: Sequence[Image],
    *,
    weights: Path | None = None,
    size: int = 1024,
    batch: int = 8,
    steps: int = 5,
    device: str = "cpu",
) -> Steps:
    """Time `steps` steps of a fit from nothing, adapted tail, in a temporary folder. Raises RequestError."""
    if steps < 1:
        raise RequestError(f"{steps} steps", wanted="1 or more", do="--steps 5")
    task = _Clock(size=(size, size))
    settings = Settings(steps=steps + 2, batch=batch, validations=1)
    with tempfile.TemporaryDirectory() as folder:
        started = perf_counter()
        facade.fit(
            facade.face_split(weights), records, task=task, out=folder, settings=settings, device=device, quiet=True
        )
    stamps = np.array(task.stamps[-settings.steps :])
    return Steps(len(records), batch, float(stamps[0] - started), Timing(tuple(np.diff(stamps)[1:].tolist())))


@dataclass(frozen=True)
class _Clock(FaceDetection):
    """Notes when a fit asks for the loss, once a step."""

    stamps: list[float] = field(default_factory=list, repr=False, compare=False)

    def distance(self, student: Outputs, teacher: Outputs) -> Tensor:
        self.stamps.append(perf_counter())
        return super().distance(student, teacher)


@contextmanager
def photographs(folder: Path | None, limit: int) -> Iterator[list[Path]]:
    """Paths of the first `limit` photographs of a folder, or of the embedded sampler. Raises DatasetError."""
    if limit < 1:
        raise RequestError(f"limit {limit}", wanted="1 or more", do="--limit 12")
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or sampler.compose(Path(temporary) / "set", images=max(limit, fddb.FOLDS))
        yield Folder(place).paths[:limit]


def full_hd() -> Image:
    """A photograph of the embedded sampler at 1920 x 1080, [1080, 1920, 3] uint8 BGR."""
    with photographs(None, 1) as paths:
        return cv2.resize(images.read(paths[0]), FULL_HD[::-1], interpolation=cv2.INTER_CUBIC)


def _rates(shape: Shape, z: Tensor, keyed: int) -> dict[str, tuple[Callable[[], object], float]]:
    """What runs beside the step to measure the machine: (run, amount of one run), by the names of `Floor`."""
    sites, width = z.numel() // shape.channels, shape.k + shape.context
    left, right, other = torch.randn(sites, shape.channels), torch.randn(shape.channels, width), torch.empty_like(z)
    key, nonce, plain = bytes(32), bytes(16), bytes(keyed)
    return {
        "matmul": (lambda: torch.mm(left, right), float(sites * shape.channels * width)),
        "copy": (lambda: other.copy_(z), 2.0 * 4 * z.numel()),
        "keystream": (lambda: Cipher(ChaCha20(key, nonce), mode=None).encryptor().update(plain), float(keyed)),
    }


def _settle(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident() -> float:
    """Megabytes resident now; where the system does not say, the most there have been."""
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / 1e6 if sys.platform == "darwin" else most / 1e3


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
