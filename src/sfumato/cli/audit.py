"""`sfumato audit`: attackers trained against an artefact, and a verdict."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sfumato.cli.common import Device, Quiet, TailOption, Weights, load, note, work_folder, writable


class Noise(StrEnum):
    """Modes of `trusted.noise`."""

    FRESH = "fresh"
    KEYED = "keyed"


def audit(
    data: Annotated[Path, typer.Option(help="Photographs to attack, one folder a person; best not those of the fit.")],
    artefact: Annotated[
        Path | None, typer.Argument(help="Folder that `sfumato fit` wrote; without it the artefacts that ship.")
    ] = None,
    weights: Weights = None,
    tail: TailOption = None,
    alpha: Annotated[list[float] | None, typer.Option(help="Alpha under attack; may be given again.")] = None,
    budget: Annotated[str, typer.Option(help="quick (minutes) or full (hours, with baselines).")] = "quick",
    noise: Annotated[
        Noise,
        typer.Option(help="Attack releases under fresh noise, or under noise keyed to the record."),
    ] = Noise.FRESH,
    recogniser: Annotated[
        Path | None,
        typer.Option(help="Face recogniser as ONNX, [1, 3, 112, 112]: makes the identity attackers stronger."),
    ] = None,
    html: Annotated[Path, typer.Option(help="The report.")] = Path("audit.html"),
    json: Annotated[Path | None, typer.Option(help="Everything but pictures, for programs.")] = None,
    keep_pictures: Annotated[
        bool, typer.Option("--keep-pictures", help="Reconstructions of people go into the report.")
    ] = False,
    fail_above: Annotated[
        list[str] | None,
        typer.Option(help="Exit code 1 where an attacker passes auc=, tar= or psnr=; may be repeated."),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(help="What a killed audit goes on from. It holds pictures of the people: keep it inside."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split and of the attackers, never of the noise.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Train attackers against an artefact and say what they learn; killed and started again it goes on."""
    import json as encoder

    from sfumato.auditing.run import SIZE
    from sfumato.auditing.run import audit as run
    from sfumato.auditing.verdict import limits_of
    from sfumato.core.errors import OutputError
    from sfumato.core.files import write_bytes
    from sfumato.trusted.noise import Keyed

    limits = limits_of(fail_above or [])
    writable(html)
    writable(json)
    place = work or work_folder("audit")
    if place is None:
        raise OutputError("no cache folder can be written", wanted="a place for work in progress", do="--work FOLDER")
    protected = load(artefact, weights, tail, (SIZE, SIZE), Device.CPU)
    if noise is Noise.KEYED:
        protected = protected.with_noise(Keyed(os.urandom(32)))
    chosen = tuple(dict.fromkeys(alpha or (0.8, 0.95)))
    result = run(
        protected, data, alphas=chosen, budget=budget, recogniser=recogniser, work=place, seed=seed, limits=limits,
        quiet=quiet,
    )  # fmt: skip
    result.to_html(html, keep_pictures=keep_pictures)
    if json is not None:
        write_bytes(json, (encoder.dumps(result.as_dict(), indent=1) + "\n").encode())
    for one in chosen:
        typer.echo(f"alpha {one:g}: {result.verdict(one)}")
    typer.echo(f"{html}: the report")
    passed = result.above(limits)
    for sentence in passed:
        note(sentence)
    if passed:
        raise typer.Exit(1)
