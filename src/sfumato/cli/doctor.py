"""`sfumato doctor`: what is installed, on what it computes, and whether artefacts and data are whole."""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from sfumato.cli.common import Artefacts, Device, DeviceOption, Weights, load, work_folder

PARTS = (
    "torch", "numpy", "opencv-python-headless", "pillow", "safetensors", "scikit-image", "scikit-learn",
    "matplotlib", "cryptography", "typer", "rich",
)  # fmt: skip
GLAD = {"ok": "green", "absent": "yellow", "broken": "red"}


class Finding(NamedTuple):
    """One thing looked at; `needed` and not ok is why doctor exits 1."""

    what: str
    state: str
    says: str
    needed: bool


def doctor(
    artefacts: Artefacts = None,
    weights: Weights = None,
    dataset: Annotated[Path | None, typer.Option(help="Look whether FDDB is there and whole.")] = None,
    device: DeviceOption = Device.AUTO,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Versions, device and threads; whether the artefacts verify and work together; whether FDDB is whole.

    Exits 1 where something that is needed is broken.
    """
    findings = list(_findings(artefacts, weights, dataset, device))
    if as_json:
        typer.echo(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        _show(findings)
    if any(finding.needed and finding.state != "ok" for finding in findings):
        raise typer.Exit(1)


def _findings(artefacts: Path | None, weights: Path | None, dataset: Path | None, device: Device) -> Iterator[Finding]:
    from sfumato import __version__
    from sfumato.facade import CLIENT, SERVERS, SHIPPED

    place = artefacts or SHIPPED
    yield Finding("sfumato", "ok", __version__, True)
    yield Finding("python", "ok", f"{sys.version.split()[0]}, {platform.system()} {platform.machine()}", True)
    yield from (_package(name) for name in PARTS)
    yield _looked("device", lambda: _device(device))
    yield _looked("detector", lambda: _detector(weights))
    yield _looked(CLIENT, lambda: _artefact(place / CLIENT, "client"))
    servers = {name: place / name for name in SERVERS.values()}
    here = {name: path for name, path in servers.items() if path.exists()}
    for name, path in (here or servers).items():
        yield _looked(name, partial(_artefact, path, "server"))
    yield _decoder(place, weights)
    yield _looked("one record through", lambda: _through(artefacts, weights, device))
    work = work_folder("measure")
    yield Finding("cache folder", "ok" if work else "absent", str(work or "none can be written: no resuming"), False)
    if dataset is not None:
        yield _looked("FDDB", lambda: _fddb(dataset))


def _looked(what: str, look: Callable[[], str], *, needed: bool = True) -> Finding:
    from sfumato.core.errors import SfumatoError

    try:
        return Finding(what, "ok", look(), needed)
    except SfumatoError as error:
        return Finding(what, "broken", str(error).replace("\n ", ";"), needed)


def _package(name: str) -> Finding:
    try:
        return Finding(name, "ok", metadata.version(name), True)
    except metadata.PackageNotFoundError:
        # A checkout on the path and another build of OpenCV do the same work.
        return Finding(name, "absent", "not installed under this name", False)


def _device(device: Device) -> str:
    import torch

    from sfumato.facade import device_of

    where = device_of(device.value)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else platform.processor() or platform.machine()
    return f"{where.type} ({name}); {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _detector(weights: Path | None) -> str:
    from sfumato.facade import face_split

    cut = face_split(weights)
    count = sum(p.numel() for p in cut.model.parameters())
    return f"FaceBoxes, {count:,} parameters, digest {cut.digest()[:16]}, cut at {cut.at}"


def _artefact(path: Path, side: str) -> str:
    from sfumato.core import artefact

    header, _ = artefact.read(path, side=side)
    shape = ", ".join(f"{name} {value:g}" for name, value in header.shape.as_dict().items())
    tail = f", tail {header.tail}" if side == "server" else ""
    return f"digest {header.digest[:16]}, for model {header.model_digest[:16]}{tail}; {shape}"


def _decoder(place: Path, weights: Path | None) -> Finding:
    from sfumato import facade
    from sfumato.attack import decoder
    from sfumato.detecting import DECODER

    path = place / DECODER
    if not path.exists():
        return Finding(DECODER, "absent", "sfumato fit --decoder-steps 1500 trains one", False)

    def look() -> str:
        decoder.load(path, facade.load(place, weights=weights))
        return "an attacker's decoder, of this client"

    return _looked(DECODER, look, needed=False)


def _through(artefacts: Path | None, weights: Path | None, device: Device) -> str:
    """A grey picture through both sides: parts that verify singly may still not fit together."""
    from time import perf_counter

    import numpy as np

    protected: Any = load(artefacts, weights, None, (256, 256), device)
    started = perf_counter()
    release = protected(np.full((256, 256, 3), 128, np.uint8), alpha=0.8)
    protected.postprocess(protected.outside(release), (256, 256))
    bits = float(protected.obfuscator.bits_per_site(0.8))
    took = 1000 * (perf_counter() - started)
    return f"head, obfuscator, restorer, tail in {took:.0f} ms; {bits:.2f} bits a site at alpha 0.8"


def _fddb(dataset: Path) -> str:
    from sfumato.datasets import fddb

    found = fddb.load(dataset)
    whole = (found.images, found.faces) == (fddb.IMAGES, fddb.FACES)
    return f"{found.images:,} images, {found.faces:,} faces" + ("" if whole else "; FDDB's layout, but NOT FDDB")


def _show(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for what, state, says, _ in findings:
        table.add_row(Text(what), Text(state, style=GLAD[state]), Text(says))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(table)
