"""A Triton model repository of one fit.

    REPO/face_detection_base/      INPUT__0  FP32 [N, C, h, w], clean  -> the provider's own tail
    REPO/face_detection_noisy/     INPUT__0  FP32 [N, C, h, w], a restored release -> the fit's tail
    REPO/face_detection_release/   the tensors of `core.wire` -> restorer -> tail; the one to use

Each with config.pbtxt and numbered versions; OUTPUT__0, OUTPUT__1 ... are what the model returns. A version and a new
model are written elsewhere on the same disk and renamed into place, so that a server that polls never sees half of
one. The first model takes what must not leave the trust zone: it is there to compare with.
"""

import fcntl
import hashlib
import json
import os
import py_compile
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.core import programs, wire
from sfumato.core.errors import OutputError, RequestError
from sfumato.core.files import write_bytes
from sfumato.core.release import Release
from sfumato.outside.backend import PROGRAM, SERVER
from sfumato.outside.export import Answer, Named
from sfumato.outside.model import Outside

BACKENDS = ("python", "onnxruntime", "pytorch")
BASE, NOISY, RELEASE = "base", "noisy", "release"
WARM_ALPHA = 0.8
_TYPES = {torch.float32: "TYPE_FP32", torch.float16: "TYPE_FP16", torch.int64: "TYPE_INT64", torch.int32: "TYPE_INT32"}
_ABOUT = "sfumato.json"
_FILES = {"onnxruntime": "model.onnx", "pytorch": "model.pt"}
_MODEL = """import os
import sys

# The server's interpreter does not look at PYTHONPATH.
sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]

from sfumato.outside.backend import {name} as TritonPythonModel

__all__ = ["TritonPythonModel"]
"""
_CONFIG = Template("""# Written by sfumato export triton. $about
name: "$name"
$engine
max_batch_size: $batch
dynamic_batching { max_queue_delay_microseconds: $delay }
version_policy: { latest { num_versions: 1 } }
instance_group [ { kind: KIND_$kind count: $instances } ]
$inputs
$outputs
$warmup
$parameters
""")


@dataclass(frozen=True)
class Plan:
    """What is exported. `base` is the provider's own tail; `server` the artefact's file that `outside` was read from.

    `size` is (height, width) of the sites that warm-up and tracing use; `channels` those of the cut tensor.
    """

    task: str
    outside: Outside
    base: nn.Module
    server: Path
    model_digest: str
    ndim: int
    size: tuple[int, int]
    backend: str = "python"
    gpu: bool = False
    instances: int = 1
    threads: int = 1
    batch: int = 16
    delay: int = 200

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise RequestError(f"backend {self.backend}", wanted=" or ".join(BACKENDS), do="--backend python")
        if min(self.instances, self.threads, self.batch) < 1 or self.delay < 0:
            raise RequestError("fewer than one instance, thread or record", wanted="at least one of each")

    @property
    def name(self) -> str:
        """Of the task, as Triton's models are named."""
        return self.task.replace("-", "_")


def write(plan: Plan, repository: Path, *, told: Callable[[str], None] = lambda _: None) -> list[Path]:
    """The versions written, one a model; models whose newest version is this very one are left as they are.

    Raises OutputError, and RequestError where a tail cannot be traced or a model there was made for another backend.
    """
    example = _example(plan)
    makers: dict[str, Callable[[Path], Sequence[str]]] = {
        BASE: lambda place: _tail(plan, plan.base, example, place),
        NOISY: lambda place: _tail(plan, plan.outside.tail, example, place),
        RELEASE: lambda place: _release(plan, example, place),
    }
    written = []
    try:
        repository.mkdir(parents=True, exist_ok=True)
        with _alone(repository):
            for kind, make in makers.items():
                told(f"{plan.name}_{kind}")
                made = _place(plan, repository / f"{plan.name}_{kind}", kind, make)
                written += [made] if made else []
    except OSError as error:
        raise OutputError(
            f"{repository}: {error.strerror}", wanted="a folder that can be written, on a disk with room", do="another"
        ) from error
    return written


def _place(plan: Plan, model: Path, kind: str, make: Callable[[Path], Sequence[str]]) -> Path | None:
    """The next version of one model."""
    facts = _facts(plan, kind)
    mark = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    before, config = _read(model / "config.pbtxt"), model / "config.pbtxt"
    versions = sorted((v for v in model.glob("*") if v.name.isdigit()), key=lambda v: int(v.name))
    if not all((version / _ABOUT).is_file() for version in versions) or (before and not versions):
        raise RequestError(f"{model} is of another origin", wanted="a model that sfumato exported, or none",
                           do="export into an empty folder")  # fmt: skip
    if before and f'backend: "{plan.backend}"' not in before:
        raise RequestError(f"{model} is for another backend", wanted=plan.backend, do="export into an empty folder")
    about = json.loads(_read(versions[-1] / _ABOUT)) if versions else {}
    if about.get("mark") == mark and "config" in about:
        if mark in before:
            return None
        write_bytes(config, about["config"].encode())  # a kill came between the version and its configuration
        return versions[-1]
    model.mkdir(exist_ok=True)
    newest = int(versions[-1].name) if versions else 0
    with tempfile.TemporaryDirectory(prefix=".sfumato-", dir=_beside(model)) as temporary:
        version, warmup = Path(temporary) / str(newest + 1), Path(temporary) / "warmup"
        version.mkdir()
        text = _config(plan, kind, {**facts, "mark": mark}, make(version))
        (version / _ABOUT).write_text(json.dumps({"mark": mark, **facts, "config": text}))
        if kind == RELEASE and not (model / warmup.name / mark).exists():
            _warm(plan, warmup)
            (model / warmup.name).mkdir(exist_ok=True)
            _readable(warmup)
            os.rename(warmup, model / warmup.name / mark)
        _readable(version)
        os.rename(version, model / version.name)
    # Last: without it the server takes the folder for no model, so it never sees half of a new one.
    write_bytes(config, text.encode())
    return model / version.name


def _readable(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


@contextmanager
def _alone(repository: Path) -> Iterator[None]:
    """One export to a repository at a time; the lock of one that was killed is gone with it."""
    folder = os.open(repository, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _beside(model: Path) -> Path:
    """Where to make a version that is to be renamed into the model: out of the repository, which a server looks into.

    On a disk that ends with the repository, a mounted volume, it is the model itself: folders that are no number there
    are no versions, though a server that polls loads the present one again.
    """
    place = model.parent.parent
    same = place.stat().st_dev == model.stat().st_dev and os.access(place, os.W_OK | os.X_OK)
    return place if same else model


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _facts(plan: Plan, kind: str) -> dict[str, str]:
    shape = plan.outside.restorer.shape
    facts = {"kind": kind, "task": plan.task, "model_digest": plan.model_digest}
    if kind != BASE:
        server = hashlib.sha256(plan.server.read_bytes()).hexdigest()
        facts |= {"artefact_digest": plan.outside.digest, "server_sha256": server}
    if kind == RELEASE:
        facts |= {"channels": str(shape.sent), "block": str(shape.block)}
        facts |= {"whole_blocks": str(plan.backend != "python").lower()}
    set_up = (plan.gpu, plan.instances, plan.threads, plan.batch, plan.delay, plan.size)
    return {**facts, "threads": str(plan.threads), "set_up": repr(set_up)}


def _example(plan: Plan) -> Tensor:
    """A cut tensor that is no constant: two records, since a tracer takes one for a fact."""
    shape, generator = plan.outside.restorer.shape, torch.Generator().manual_seed(0)
    sites = torch.rand(2, shape.channels, *plan.size, generator=generator)
    return {4: sites, 3: sites.flatten(2).transpose(1, 2), 2: sites.flatten(1)}[plan.ndim]


def _tail(plan: Plan, tail: nn.Module, example: Tensor, place: Path) -> list[str]:
    if plan.backend == "python":
        _program(tail, example, place)
        _model(place, "Tail")
    elif plan.backend == "onnxruntime":
        fixed = {"INPUT__0": [programs.channel_axis(example)]}
        programs.onnx(Named(tail), {"INPUT__0": example}, _names(tail, example), fixed, place / _FILES[plan.backend])
    else:
        programs.script(Named(tail), [example], place / _FILES[plan.backend])
    return _outputs(tail, example)


def _model(place: Path, name: str) -> None:
    (place / "model.py").write_text(_MODEL.format(name=name))
    # Else the server would write this file itself, and one that polls would take that for a new version.
    py_compile.compile(str(place / "model.py"), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)


def _program(tail: nn.Module, example: Tensor, place: Path) -> None:
    programs.program(Named(tail), example, [programs.channel_axis(example)], place / PROGRAM)


def _release(plan: Plan, example: Tensor, place: Path) -> list[str]:
    tail, shape = plan.outside.tail, plan.outside.restorer.shape
    if plan.backend == "python":
        _program(tail, example, place)
        shutil.copyfile(plan.server, place / SERVER)
        _model(place, "Released")
        return _outputs(tail, example)
    high, wide = shape.codes(plan.size)[1:]
    whole = (high * shape.block, wide * shape.block)
    tensors = {name: torch.from_numpy(np.repeat(t, 2, 0)) for name, t in _zeros(plan, whole).items()}
    answer = Answer(plan.outside.restorer, tail, plan.outside.digest, plan.ndim)
    if plan.backend == "onnxruntime":
        fixed = {name: [1] for name in wire.TYPES if name != "CODES"}
        programs.onnx(answer, tensors, _names(tail, example), fixed, place / _FILES[plan.backend])
    else:
        programs.script(answer, list(tensors.values()), place / _FILES[plan.backend])
    return _outputs(tail, example)


def _names(tail: nn.Module, example: Tensor) -> list[str]:
    return [f"OUTPUT__{i}" for i in range(len(_outputs(tail, example)))]


@torch.inference_mode()
def _outputs(tail: nn.Module, example: Tensor) -> list[str]:
    """type and dims, without the batch, of every output; what the size of the input decides is open."""
    answers = programs.flat(tail(example))
    larger = example
    if example.ndim > 2:
        axes = (2, 3) if example.ndim == 4 else (1,)
        larger = example.repeat([2 if axis in axes else 1 for axis in range(example.ndim)])
    others = programs.flat(tail(larger))
    lines = []
    for i, (one, other) in enumerate(zip(answers, others, strict=True)):
        dims = [a if a == b else -1 for a, b in zip(one.shape[1:], other.shape[1:], strict=True)]
        lines.append(f'  {{ name: "OUTPUT__{i}" data_type: {_TYPES[one.dtype]} dims: {dims} }}')
    return lines


def _zeros(plan: Plan, size: tuple[int, int]) -> wire.Tensors:
    """A release of one record that holds nothing, as the server is warmed up with."""
    shape, restorer = plan.outside.restorer.shape, plan.outside.restorer
    codes = torch.zeros(1, *shape.codes(size), dtype=torch.int8)
    alpha = torch.tensor([WARM_ALPHA])
    channels = restorer.allocation.carrying(alpha.to(restorer.mean.device)).cpu().numpy()
    release = Release(codes, alpha, plan.outside.digest, torch.zeros(1), plan.ndim, shape.block, size)
    return wire.to_tensors(release, channels)


def _warm(plan: Plan, place: Path) -> None:
    place.mkdir()
    for name, tensor in _zeros(plan, plan.size).items():
        (place / name).write_bytes(tensor.tobytes())


def _config(plan: Plan, kind: str, facts: Mapping[str, str], outputs: Sequence[str]) -> str:
    if kind == RELEASE:
        zeros = _zeros(plan, plan.size)
        open_ = {"CODES": [-1, -1, -1]}
        inputs = [
            f'  {{ name: "{name}" data_type: TYPE_{kind_} dims: {open_.get(name, list(zeros[name].shape[1:]))} }}'
            for name, kind_ in wire.TYPES.items()
        ]
        warm = [
            f'    inputs {{ key: "{name}" value: {{ data_type: TYPE_{wire.TYPES[name]} '
            f'dims: {list(t.shape[1:])} input_data_file: "{facts["mark"]}/{name}" }} }}'
            for name, t in zeros.items()
        ]
    else:
        example = _example(plan)
        channels = programs.channel_axis(example)
        dims = [n if axis == channels else -1 for axis, n in enumerate(example.shape)][1:]
        inputs = [f'  {{ name: "INPUT__0" data_type: TYPE_FP32 dims: {dims} }}']
        shape = list(example.shape[1:])
        warm = [f'    inputs {{ key: "INPUT__0" value: {{ data_type: TYPE_FP32 dims: {shape} zero_data: true }} }}']
    engines = {
        "python": 'backend: "python"',
        "onnxruntime": 'backend: "onnxruntime"\ndefault_model_filename: "model.onnx"',
        "pytorch": 'backend: "pytorch"\ndefault_model_filename: "model.pt"',
    }
    about = {
        BASE: "Takes the clean cut tensor: for comparison, inside the trust zone.",
        NOISY: "Takes a release that the client has restored.",
        RELEASE: "Takes releases.",
    }
    return _CONFIG.substitute(
        about=about[kind], name=f"{plan.name}_{kind}", engine=engines[plan.backend], batch=plan.batch,
        delay=plan.delay, kind="GPU" if plan.gpu else "CPU", instances=plan.instances,
        inputs="input [\n" + ",\n".join(inputs) + "\n]", outputs="output [\n" + ",\n".join(outputs) + "\n]",
        warmup='model_warmup [ {\n    name: "one record"\n    batch_size: 1\n' + "\n".join(warm) + "\n} ]",
        parameters="\n".join(
            f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}' for key, value in facts.items()
        ),
    )  # fmt: skip
