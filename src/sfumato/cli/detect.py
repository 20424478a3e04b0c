"""`sfumato detect`: faces in photographs and folders, clean and obfuscated."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sfumato.cli.common import (
    Artefacts,
    Device,
    DeviceOption,
    Quiet,
    Size,
    TailOption,
    Weights,
    load,
    note,
    plural,
    size_of,
    tail_of,
    writable,
)

if TYPE_CHECKING:
    from sfumato.attack.decoder import Decoder
    from sfumato.detecting import Findings
    from sfumato.trusted.protect import Protected


def detect(
    inputs: Annotated[list[Path], typer.Argument(help="Images, or folders of images.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for pictures, detections.json and detections.csv.")] = Path("out"),
    alpha: Annotated[float, typer.Option(help="Share of the bits withheld, 0 <= alpha < 1.")] = 0.8,
    clean: Annotated[bool, typer.Option("--clean", help="The model as it is: nothing is obfuscated.")] = False,
    artefacts: Artefacts = None,
    weights: Weights = None,
    tail: TailOption = None,
    size: Size = "1024",
    score: Annotated[float, typer.Option(help="Faces that score at least this, 0 to 1.")] = 0.5,
    device: DeviceOption = Device.AUTO,
    force: Annotated[bool, typer.Option("--force", help="Do again what this folder already holds.")] = False,
    quiet: Quiet = False,
) -> None:
    """Find faces: a picture with boxes, one of clean | obfuscated | reconstructed side by side, JSON and CSV.

    An image that cannot be read is reported at the end and the rest is done. Started again it goes on after the images
    that are done. The results show what the photographs show: keep them where those may be seen.
    """
    from sfumato import detecting

    protected = load(artefacts, weights, tail, size_of(size), device)
    writable(out / detecting.LIST)
    attacker = None if clean else _decoder(artefacts, protected)
    findings = detecting.detect(
        protected,
        inputs,
        out,
        alpha=None if clean else alpha,
        score=score,
        decoder=attacker,
        facts={"size": size, "tail": "none" if clean else tail_of(artefacts, tail)},
        force=force,
        quiet=quiet,
    )
    _report(findings, out, None if clean else alpha)


def _decoder(artefacts: Path | None, protected: "Protected") -> "Decoder | None":
    from sfumato.attack import decoder
    from sfumato.detecting import DECODER
    from sfumato.facade import SHIPPED

    path = (artefacts or SHIPPED) / DECODER
    if not path.exists():
        note(
            f"no {DECODER} beside the artefacts, so no reconstruction is shown; sfumato fit --decoder-steps trains one"
        )
        return None
    return decoder.load(path, protected).to(protected.obfuscator.mean.device)


def _report(findings: "Findings", out: Path, alpha: float | None) -> None:
    kept = f" ({findings.kept} of them done before)" if findings.kept else ""
    found = plural(findings.faces, "face") + ("" if alpha is None else f", clean {findings.clean_faces:,}")
    typer.echo(f"{plural(len(findings.rows), 'image')}{kept}: {found}; results in {out}")
    if alpha is not None and findings.rows:
        bits = max(row["bits_per_site"] for row in findings.rows)
        size = max(row["release_bytes"] for row in findings.rows) / 1000
        typer.echo(
            f"alpha {alpha:g}: at most {bits:.2f} bits a site and {size:.1f} kB an image leave; boxes leave in clear"
        )
    if findings.failed:
        note(f"error: {len(findings.failed)} of {len(findings.rows) + len(findings.failed)} images cannot be read")
        for failure in findings.failed:
            note(f"  {failure['error']}")
        raise typer.Exit(1)
