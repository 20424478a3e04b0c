"""`sfumato measure`: TR-4928's accuracy run and its table, with what the table of the report left out."""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli.common import (
    Artefacts,
    Device,
    DeviceOption,
    Quiet,
    Size,
    TailOption,
    Weights,
    listed,
    load,
    note,
    numbers,
    plural,
    size_of,
    tail_of,
    work_folder,
    writable,
)  # fmt: skip

if TYPE_CHECKING:
    from sfumato.datasets.fddb import Fddb
    from sfumato.measurement import Arm, Measurement
    from sfumato.tasks.detection.precision import Precision

DEFAULT_ALPHA = 0.8  # of --noisy alone
COLUMNS = ("alpha", "AP as detected", "drop from clean", "FDDB convention", "TR-4928", "its drop", "bits/site", "kB")
STDOUT = Path("-")
WIDTH = 132  # columns of the table where the output is no terminal


def measure(
    dataset: Annotated[Path, typer.Option(help="Folder in FDDB's layout: originalPics and FDDB-folds.")],
    alpha: Annotated[
        list[float] | None, typer.Option(help="Share of the bits withheld, 0 <= alpha < 1; as often as you like.")
    ] = None,
    noisy: Annotated[bool, typer.Option("--noisy", help="Obfuscate; --alpha implies it, alone it is 0.8.")] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="The table: clean and TR-4928's alphas, or yours.")] = False,
    artefacts: Artefacts = None,
    weights: Weights = None,
    tail: TailOption = None,
    size: Size = "1024",
    folds: Annotated[str | None, typer.Option(help="Folds, such as 1,2,3; without it all ten.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first images of each fold only.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the noise, such as 0,1,2; the table gives their mean.")] = "0",
    fresh: Annotated[bool, typer.Option("--fresh", help="Cryptographic noise: figures will not repeat.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Images at a time; without it one a core.")] = None,
    device: DeviceOption = Device.AUTO,
    kept: Annotated[
        Path | None, typer.Option("--work", help="Keep what is done there, for other runs to go on from.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every figure there as JSON; - prints it, and nothing else.")
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write a line an arm there as CSV.")] = None,
    quiet: Quiet = False,
) -> None:
    """Average precision of the detector, clean and obfuscated, in TR-4928's words.

    Without --alpha, --noisy and --sweep the clean run. One threshold rule for every arm. Killed and started again it
    goes on after the folds that are done ($XDG_CACHE_HOME or ~/.cache, in sfumato/measure; removed at the end). With
    --work runs of single arms, on one machine or many, add up: a --sweep there scores what they have done.
    """
    from sfumato.core import channel
    from sfumato.datasets import fddb
    from sfumato.measurement import ALPHAS
    from sfumato.measurement import measure as run

    chosen = tuple(dict.fromkeys(alpha or (ALPHAS if sweep else (DEFAULT_ALPHA,) if noisy else ())))
    channel.as_alpha(chosen or 0.0, len(chosen) or 1)
    arms: tuple[float | None, ...] = (None, *chosen) if sweep or not chosen else chosen
    drawn: Sequence[int | None] = (None,) if fresh else numbers(seeds, "--seeds") or (0,)
    data = fddb.load(dataset)
    protected = load(artefacts, weights, tail, size_of(size), device)
    printed = json_file == STDOUT
    for path in (None if printed else json_file, csv_file, kept and kept / "any"):
        writable(path)
    if (work := kept or work_folder("measure")) is None:
        note("no cache folder can be written: if this run is killed, the next one starts anew")
    result = run(
        protected, data, alphas=arms, seeds=drawn, folds=numbers(folds, "--folds"), limit=limit, work=work,
        keep=kept is not None, workers=threads, quiet=quiet,
    )  # fmt: skip
    facts = _facts(result, data, drawn, size, "none" if arms == (None,) else tail_of(artefacts, tail), protected.digest)
    text = json.dumps(_finite({"facts": facts, **result.as_dict()}), indent=1, allow_nan=False)
    _write(None if printed else json_file, text + "\n")
    _write(csv_file, _csv(result))
    if printed:
        typer.echo(text)
    else:
        _show(result, facts, sweep)


def _facts(
    result: "Measurement", data: "Fddb", seeds: Sequence[int | None], size: str, tail: str, digest: str
) -> dict[str, Any]:
    """What a reader must know to believe the figures, or to repeat them."""
    from sfumato import __version__
    from sfumato.tasks.detection.boxes import KEEP, NMS_IOU

    ap = result.arms[0].detected
    return {
        "data": _named(data, result),
        "images": result.images,
        "faces": result.faces,
        "noise": "fresh" if None in seeds else f"seed {listed(seeds)}",
        "rule": f"score > {KEEP}, NMS at IoU {NMS_IOU}, the same for every arm; a hit at IoU {ap.iou}",
        "input": size if size == "native" else f"{size}x{size}",
        "tail": tail,
        "obfuscator": digest,
        "interval": f"{ap.level:.0%} bootstrap over images, {ap.resamples} resamples, seed {ap.seed}",
        "seconds": round(result.seconds, 1),
        "sfumato": __version__,
    }


def _named(data: "Fddb", result: "Measurement") -> str:
    """Which data this is: only all of FDDB compares with TR-4928."""
    from sfumato.datasets import fddb, sampler

    if (data.root / sampler.NOTE).is_file():
        name = "embedded sampler, NOT FDDB"
    elif (data.images, data.faces) == (fddb.IMAGES, fddb.FACES):
        name = "FDDB"
    else:
        name = "a set in FDDB's layout, NOT FDDB"
    if result.images == data.images:
        return name
    return f"{name}: part of it, {result.images} of {data.images} images, folds {listed(result.folds)}"


def _show(result: "Measurement", facts: dict[str, Any], sweep: bool) -> None:
    if sweep:
        table(facts, replace(result, arms=averaged(result.arms)).as_dict()["rows"])
    else:
        for arm in result.arms:
            _log(arm, result.folds, titled=len(result.arms) > 1)
        conditions(facts)


def table(facts: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """TR-4928's table of a run's facts and rows, as its JSON has them, one row an alpha; the conditions below it."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    made = Table(title=f"{facts['data']}; figures of TR-4928: all of FDDB", title_justify="left", box=SIMPLE_HEAD)
    for name in COLUMNS:
        made.add_column(name, justify="right", no_wrap=True)
    for cells in _cells(rows):
        made.add_row(*cells)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    console.print(made)
    conditions(facts)


def conditions(facts: dict[str, Any]) -> None:
    """What a reader must know beside the figures."""
    counted = f"{plural(facts['images'], 'image')}, {plural(facts['faces'], 'face')}"
    typer.echo(f"data: {facts['data']}; {counted}; noise: {facts['noise']}")
    typer.echo(f"rule: {facts['rule']}; intervals: {facts['interval']}")
    sides = f"tail: {facts['tail']}; obfuscator: {facts['obfuscator'][:16]}"
    typer.echo(f"input: {facts['input']}; {sides}; {facts['seconds']} s")


def _log(arm: "Arm", folds: Sequence[int], *, titled: bool) -> None:
    """One arm as TR-4928's job prints it."""
    if titled:
        typer.echo("clean" if arm.alpha is None else f"alpha {arm.alpha:g}, " + _drawn(arm))
    typer.echo("==================== Results ====================")
    for number, ap in zip(folds, arm.detected.folds, strict=True):
        typer.echo(f"FDDB-fold-{number} Val AP: {ap}")
    typer.echo(f"FDDB Dataset Average AP: {arm.detected.mean}")
    typer.echo(f"mAP: {arm.detected.mean}")


def _drawn(arm: "Arm") -> str:
    return "fresh noise" if arm.seed is None else f"seed {arm.seed}"


def averaged(arms: Sequence["Arm"]) -> list["Arm"]:
    """One arm an alpha: the mean over its noise seeds, whose resamples pair because they are of the same images."""
    groups = [[arm for arm in arms if arm.alpha == alpha] for alpha in dict.fromkeys(arm.alpha for arm in arms)]
    return [
        replace(
            group[0],
            detected=_mean([arm.detected for arm in group]),
            convention=_mean([arm.convention for arm in group]),
        )
        for group in groups
    ]


def _mean(parts: Sequence["Precision"]) -> "Precision":
    import numpy as np

    if len(parts) == 1:
        return parts[0]
    samples = np.mean([part.samples for part in parts], axis=0)
    outside = (1 - parts[0].level) / 2
    low, high = (float(edge) for edge in np.nanquantile(samples, [outside, 1 - outside]))
    folds = tuple(float(ap) for ap in np.mean([part.folds for part in parts], axis=0))
    return replace(parts[0], folds=folds, mean=float(np.mean(folds)), low=low, high=high, samples=samples)


def _cells(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    from sfumato.measurement import TR_4928

    for row in rows:
        theirs, drop, bits = row["tr_4928_ap"], row["drop"], row["bits_per_site"]
        yield [
            "clean" if row["alpha"] is None else f"{row['alpha']:g}",
            f"{row['ap']:.4f} [{row['ap_low']:.4f}, {row['ap_high']:.4f}]".replace("[", r"\["),
            f"{drop[0]:+.4f} [{drop[1]:+.4f}, {drop[2]:+.4f}]".replace("[", r"\[") if drop else "",
            f"{row['ap_convention']:.4f}",
            f"{theirs:.4f}" if theirs else "",
            f"{TR_4928[None] - theirs:+.4f}" if theirs and row["alpha"] is not None else "",
            "no bound" if bits is None or math.isinf(bits) else f"{bits:.2f}",
            f"{row['release_bytes'] / 1000:.1f}",
        ]


def _csv(result: "Measurement") -> str:
    """A line an arm and seed."""
    text = io.StringIO()
    rows = [_finite(row) for row in result.as_dict()["rows"]]
    for row in rows:
        row |= {f"fold_{n}": ap for n, ap in zip(result.folds, row.pop("folds"), strict=True)}
        row |= dict(zip(("drop", "drop_low", "drop_high"), row.pop("drop") or (None,) * 3, strict=True))
    table = csv.DictWriter(text, list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def _finite(value: Any) -> Any:
    """JSON has no infinity: the clean tensor's bits, which nothing bounds, become null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path | None, text: str) -> None:
    from sfumato.core.files import write_bytes

    if path is not None:
        write_bytes(path, text.encode())
