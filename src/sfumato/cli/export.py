"""`sfumato export`: what a fit becomes outside (a Triton model repository) and on a device (ONNX)."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sfumato.cli.common import Artefacts, Device, TailOption, Weights, load, note, size_of, tail_of

SHIPPED = "shipped"


class Backend(StrEnum):
    """What computes in the server."""

    PYTHON = "python"
    ONNXRUNTIME = "onnxruntime"
    PYTORCH = "pytorch"


class Kind(StrEnum):
    """Where it computes."""

    CPU = "cpu"
    GPU = "gpu"


def triton(
    artefacts: Annotated[str, typer.Argument(help="Folder that `sfumato fit` wrote, or shipped.")],
    repository: Annotated[Path, typer.Argument(help="The model repository: three models, each with versions.")],
    weights: Weights = None,
    tail: TailOption = None,
    backend: Annotated[
        Backend,
        typer.Option(help="python: torch and sfumato in the server; the others need neither, in the official image."),
    ] = Backend.PYTHON,
    kind: Annotated[Kind, typer.Option(help="Instances on the CPU, or one set on every GPU.")] = Kind.CPU,
    instances: Annotated[int, typer.Option(min=1, help="Instances of every model.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of one instance (python backend).")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Most records computed at once.")] = 16,
    delay: Annotated[int, typer.Option(min=0, help="Microseconds a request may wait for others.")] = 200,
    size: Annotated[int, typer.Option(min=128, max=4096, help="Side of the input the server warms up with.")] = 1024,
) -> None:
    """Write face_detection_base, _noisy and _release as a model repository for NVIDIA Triton.

    A repository that is there gets a new version of every model that changed; a server that polls it never sees half
    of one.
    """
    from sfumato import facade
    from sfumato.outside import repository as models

    folder = _folder(artefacts)
    protected = load(folder, weights, tail, size_of(str(size)), Device.CPU)
    assert protected.outside is not None and protected.reference is not None
    plan = models.Plan(
        task=protected.task.name,
        outside=protected.outside,  # type: ignore[arg-type]
        base=protected.reference,
        server=(folder or facade.SHIPPED) / facade.SERVERS[tail_of(folder, tail)],
        model_digest=facade.face_split(weights).digest(),
        ndim=4,
        size=(size // 32, size // 32),
        backend=backend.value,
        gpu=kind is Kind.GPU,
        instances=instances,
        threads=threads,
        batch=batch,
        delay=delay,
    )
    written = models.write(plan, repository, told=lambda name: note(f"{name} ..."))
    for version in written:
        typer.echo(str(version))
    if not written:
        note(f"{repository} holds these very models; nothing was written")
    note(
        f"next: sfumato serve {repository}"
        if backend is Backend.PYTHON
        else f"next: sfumato serve {repository} --docker"
    )


def onnx(
    file: Annotated[Path, typer.Argument(help="The ONNX file: head and obfuscator at one alpha, noise as an input.")],
    alpha: Annotated[float, typer.Option(help="Share of the bits withheld; a device has one.")] = 0.8,
    artefacts: Artefacts = None,
    weights: Weights = None,
    size: Annotated[int, typer.Option(min=128, max=4096, help="Side of the device's pictures in pixels.")] = 1024,
) -> None:
    """Write what a device runs with ONNX Runtime alone, without torch: `sfumato.trusted.edge`."""
    from sfumato.trusted import onnx as device

    device.export(load(artefacts, weights, None, size_of(str(size)), Device.CPU), alpha, file)
    typer.echo(f"{file}: {file.stat().st_size / 1e3:.0f} kB, alpha {alpha:g}, pictures of {size} x {size}")


def _folder(artefacts: str) -> Path | None:
    return None if artefacts == SHIPPED else Path(artefacts)
