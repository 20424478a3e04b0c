"""`sfumato demo`: a page that shows the main job on photographs that dependencies ship."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli.common import Artefacts, Device, Quiet, Size, Weights, load, plural, size_of, writable

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("alpha", "AP", "drop from clean", "bits/site", "kB", "decoder dB", "flat colour dB")
WIDTH = 100  # columns of the table where the output is no terminal


def demo(
    out: Annotated[Path, typer.Option(help="Folder for index.html, demo.json and the data.")] = Path("demo"),
    images: Annotated[int, typer.Option(min=10, help="How many photographs to compose.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Of the data and, so that figures repeat, of the noise.")] = 0,
    artefacts: Artefacts = None,
    weights: Weights = None,
    size: Size = "1024",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Faces found in photographs whose tensors were obfuscated: sweeps alpha and writes a page to look at.

    The photographs are composed from those that scikit-image, scikit-learn and Matplotlib ship, so nothing is fetched.

    Example: `sfumato demo --out demo`
    """
    from sfumato import demo as job

    writable(out / job.PAGE)
    protected = load(artefacts, weights, None, size_of(size), Device.CPU)
    decoder = job.decoder_of(artefacts, protected)
    named = {"--artefacts": artefacts, "--weights": weights, "--size": None if size == "1024" else size}
    options = [str(word) for pair in named.items() if pair[1] for word in pair]
    done = job.run(protected, decoder, out, images=images, seed=seed, options=options, quiet=quiet)
    if as_json:
        typer.echo(done.json.read_text(encoding="utf-8"), nl=False)
    else:
        _show(done.report, done.page)


def _show(report: dict[str, Any], page: Path) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    console.print(_table(report["table"]))
    data = report["data"]
    counted = f"{plural(data['images'], 'image')}, {plural(data['faces'], 'face')}, seed {data['seed']}"
    typer.echo(f"data: embedded sampler, NOT FDDB; {counted}. A demonstration, not evidence.")
    typer.echo(f"page: {page.resolve().as_uri()} ({report['seconds']:.0f} s)")


def _table(rows: list[dict[str, Any]]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            "clean" if row["alpha"] is None else f"{row['alpha']:g}",
            f"{row['ap']:.4f}",
            f"{row['drop'][0]:+.4f}" if row["drop"] else "",
            "no bound" if row["bits_per_site"] is None else f"{row['bits_per_site']:.1f}",
            f"{row['release_bytes'] / 1000:.1f}",
            *("" if row[name] is None else f"{row[name]:.1f}" for name in ("psnr", "flat_psnr")),
        )
    return table
