"""`sfumato fit`: an obfuscator and a server for FaceBoxes, from photographs without labels."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sfumato.cli.common import Device, DeviceOption, Quiet, Tail, Weights, note, plural, size_of, writable

if TYPE_CHECKING:
    from sfumato.datasets.folder import Photographs
    from sfumato.learn.identity import Recognise
    from sfumato.trusted.protect import Protected


def fit(
    data: Annotated[Path, typer.Option(help="Folder of photographs; no labels are read, subfolders are.")],
    out: Annotated[Path, typer.Option(help="Where the artefacts go, and in out/work what a resumed fit needs.")],
    weights: Weights = None,
    tail: Annotated[Tail, typer.Option(help="Fine-tune the tail, or leave the provider's as it is.")] = Tail.ADAPTED,
    start: Annotated[
        Path | None,
        typer.Option(help="Artefacts to begin from; with a frozen tail their client is kept for the new server."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the fit.")] = 5000,
    batch: Annotated[int, typer.Option(min=2, help="Records a step.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="The same seed and data give the same artefacts.")] = 0,
    privacy: Annotated[
        float, typer.Option(min=0.0, max=100.0, help="Weight of the adversary that rebuilds the picture.")
    ] = 0.5,
    recogniser: Annotated[
        Path | None,
        typer.Option(help="Face recogniser as ONNX, [1, 3, 112, 112]: the fit plays against being recognised by it."),
    ] = None,
    identity: Annotated[
        float, typer.Option(min=0.0, max=1000.0, help="Weight of the adversary that recognises, with --recogniser.")
    ] = 10.0,
    size: Annotated[int, typer.Option(min=128, max=4096, help="Side of the input in pixels while fitting.")] = 1024,
    decoder_steps: Annotated[
        int, typer.Option(min=0, help="Train an attacker's decoder for so many steps afterwards: decoder.safetensors.")
    ] = 0,
    half: Annotated[bool, typer.Option("--half", help="Write the server in half precision.")] = False,
    device: DeviceOption = Device.AUTO,
    quiet: Quiet = False,
) -> None:
    """Fit obfuscator and server to a face detector, label-free; killed and started again it goes on.

    Photographs that cannot be read are found before the work begins, counted and left out.
    """
    from sfumato import facade
    from sfumato.learn.fit import Settings
    from sfumato.tasks.detection.task import FaceDetection

    settings = Settings(tail=tail.value, steps=steps, batch=batch, seed=seed, privacy=privacy, identity=identity)
    known = None if recogniser is None else _recogniser(recogniser)
    cut = facade.face_split(weights)
    writable(out / facade.CLIENT)
    photographs = _photographs(data, quiet)
    fitted = facade.fit(
        cut,
        photographs,
        task=FaceDetection(size=size_of(str(size))),
        out=out,
        settings=settings,
        start=start,
        recogniser=known,
        device=device.value,
        half=half,
        quiet=quiet,
    )
    typer.echo(f"{out}: {facade.CLIENT} for the trust zone, {facade.SERVERS[tail.value]} for outside, card.md to read")
    if decoder_steps:
        _decoder(fitted, photographs, out, decoder_steps, seed, quiet)


def _recogniser(path: Path) -> "Recognise":
    from sfumato.attack.recogniser import Recogniser

    return Recogniser(path, crop=1.0).embed  # a fit shows it the face alone


def _photographs(data: Path, quiet: bool) -> "Photographs":
    from sfumato.datasets.folder import Photographs

    photographs = Photographs(data, quiet=quiet)
    if skipped := photographs.skipped:
        total = len(skipped) + len(photographs)
        note(f"{len(skipped)} of {plural(total, 'image')} cannot be read and are left out, the first: {skipped[0].got}")
    return photographs


def _decoder(fitted: "Protected", photographs: "Photographs", out: Path, steps: int, seed: int, quiet: bool) -> None:
    from sfumato.attack import decoder
    from sfumato.detecting import DECODER

    trained = decoder.train(fitted, photographs, steps=steps, seed=seed, quiet=quiet)
    decoder.save(trained, out / DECODER, fitted.digest)
    typer.echo(f"{out / DECODER}: what an attacker with these photographs could train; see `sfumato detect`")
