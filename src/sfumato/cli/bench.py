"""What protection costs on this machine: medians of runs in turns, and their ratios."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli.common import Artefacts, Device, DeviceOption, Size, Weights, listed, load, plural, size_of, writable

if TYPE_CHECKING:
    from sfumato.benchmarking import Machine, Step, Stream, Timing

WIDTH = 110  # columns of a table where the output is no terminal

Alpha = Annotated[float, typer.Option(help="Share of the bits withheld, 0 <= alpha < 1.")]
Data = Annotated[Path | None, typer.Option(help="Folder of photographs; without it those that dependencies ship.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch; without it as many as it takes.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write every figure there as JSON, times in seconds.")]


def obfuscate(
    runs: Annotated[int, typer.Option(min=1, help="Runs of each; TR-4928 made 5.")] = 25,
    alpha: Alpha = 0.8,
    stream: Annotated[
        int | None, typer.Option(min=10, help="Obfuscate so many images of 320 x 180 too, and see what memory stays.")
    ] = None,
    artefacts: Artefacts = None,
    weights: Weights = None,
    threads: Threads = None,
    json_file: Json = None,
) -> None:
    """TR-4928's experiment: the obfuscation step of a 1920 x 1080 image, alone and with the head.

    On the CPU and, where there is one, on the GPU with its allocator's cache emptied between runs. The baseline is
    z + sigma randn_like(z) on the head output, in the faster of two layouts of memory.
    """
    import torch

    from sfumato import benchmarking

    writable(json_file)
    image, done, streamed = benchmarking.full_hd(), [], None
    with benchmarking.threads(threads):
        here = benchmarking.machine()
        for device in (Device.CPU, *((Device.CUDA,) if torch.cuda.is_available() else ())):
            protected = load(artefacts, weights, None, None, device)
            done.append(benchmarking.step(protected, image, alpha=alpha, runs=runs))
        if stream is not None:
            protected = load(artefacts, weights, None, None, Device.CPU)
            streamed = benchmarking.stream(protected, stream, alpha=alpha)
    found = {"devices": [one.as_dict() for one in done], "stream": streamed and streamed.as_dict()}
    _save(json_file, here, found)
    for one in done:
        _step(one, runs)
    if streamed:
        _stream(streamed)
    theirs = listed(benchmarking.TR_4928_MS)
    typer.echo(f"TR-4928: {theirs} ms on one V100, mean {sum(benchmarking.TR_4928_MS) / 5:.3f} ms")
    _about(here)


def pipeline(
    data: Data = None,
    limit: Annotated[int, typer.Option(min=1, help="Photographs, the first by name.")] = 12,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of runs, clean and obfuscated, after one to warm up.")] = 15,
    alpha: Alpha = 0.8,
    size: Size = "1024",
    artefacts: Artefacts = None,
    weights: Weights = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Images at a time; without it one a core.")] = None,
    device: DeviceOption = Device.CPU,
    json_file: Json = None,
) -> None:
    """Images a second of decode, head, obfuscate, restore, tail and NMS, against clean, as `measure` runs them."""
    from sfumato import benchmarking

    writable(json_file)
    protected = load(artefacts, weights, None, size_of(size), device)
    here = benchmarking.machine()
    with benchmarking.photographs(data, limit) as paths:
        done = benchmarking.pipeline(protected, paths, alpha=alpha, pairs=pairs, workers=threads)
    _save(json_file, here, {"device": device.value, "size": size, "workers": threads, **done.as_dict()})
    rows = [
        (name, *(f"{value:.2f}" for value in (median(rates), min(rates), max(rates))))
        for name, rates in (("clean", done.clean), (f"obfuscated, alpha {alpha:g}", done.obfuscated))
    ]
    _table(("images/s", "median", "lowest", "highest"), rows)
    each = f"{plural(done.images, 'photograph')}, {plural(pairs, 'pair')} after one to warm up, one thread a worker"
    typer.echo(f"{each}; fresh noise; input {size}")
    low, high = min(done.ratios), max(done.ratios)
    typer.echo(f"obfuscated / clean throughput: median over pairs {done.ratio:.3f}, from {low:.3f} to {high:.3f}")
    _about(here)


def wire(
    alpha: Annotated[list[float] | None, typer.Option(help="Of a release; as often as you like.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 25,
    size: Size = "1024",
    artefacts: Artefacts = None,
    weights: Weights = None,
    threads: Threads = None,
    json_file: Json = None,
) -> None:
    """Bytes of a release, and the time to write and to read them, against the head output as FP32 and as JSON."""
    from sfumato import benchmarking

    writable(json_file)
    protected = load(artefacts, weights, None, size_of(size), Device.CPU)
    with benchmarking.threads(threads):
        here = benchmarking.machine()
        done = benchmarking.wire(protected, benchmarking.full_hd(), alphas=alpha or benchmarking.ALPHAS, runs=runs)
    _save(json_file, here, done.as_dict())
    rows = [
        (one.name, f"{one.bytes:,}", f"{done.ratio(one):.2f}", _ms(one.write.median), _ms(one.read.median))
        for one in done.encodings
    ]
    _table((f"head output {list(done.shape)}", "bytes", "FP32 / this", "write ms", "read ms"), rows)
    typer.echo(f"medians of {plural(runs, 'run')}, in turns")
    _about(here)


def fit(
    data: Data = None,
    limit: Annotated[int, typer.Option(min=10, help="Photographs, the first by name.")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed, after one to warm up.")] = 5,
    batch: Annotated[int, typer.Option(min=2, help="Records a step.")] = 8,
    size: Annotated[int, typer.Option(min=128, max=4096, help="Side of the input in pixels.")] = 1024,
    weights: Weights = None,
    threads: Threads = None,
    device: DeviceOption = Device.CPU,
    json_file: Json = None,
) -> None:
    """Steps a second of a short fit in a temporary folder, and what comes before the first."""
    from sfumato import benchmarking
    from sfumato.datasets import images

    writable(json_file)
    with benchmarking.threads(threads), benchmarking.photographs(data, limit) as paths:
        here = benchmarking.machine()
        records = [images.read(path) for path in paths]
        done = benchmarking.fit(records, weights=weights, size=size, batch=batch, steps=steps, device=device.value)
    _save(json_file, here, {"device": device.value, "size": size, **done.as_dict()})
    low, high = done.each.spread
    _table(
        ("", "value"),
        [
            ("steps/s, median", f"{done.per_second:.3f}"),
            ("a step, ms: median [quartiles]", f"{_ms(done.each.median)} [{_ms(low)}, {_ms(high)}]"),
            ("before the first step, s", f"{done.before:.1f}"),
        ],
    )
    typer.echo(f"{plural(done.records, 'photograph')}, {done.batch} records a step at {size} x {size}")
    _about(here)


def _step(one: "Step", runs: int) -> None:
    step = one.arms["step"].median
    rows = [(name, *_spread(timing), f"{step / timing.median:.3f}") for name, timing in one.arms.items()]
    if one.floor:
        rows.append(("floor of the step", _ms(one.floor.seconds), "", "", f"{step / one.floor.seconds:.3f}"))
    title = f"{one.device}: head output {list(one.shape)}, alpha {one.alpha:g}"
    _table((title, "median ms", "quartile", "quartile", "step / this"), rows)
    typer.echo(f"{plural(runs, 'run')} each, in turns, after one to warm up; the faster baseline is `{one.baseline}`")
    typer.echo("ratios of medians: " + ", ".join(f"{name} {value:.3f}" for name, value in one.ratios.items()))
    if one.floor:
        work, rates = one.floor.work, one.floor
        typer.echo(
            f"floor: {work.multiply_adds / 1e6:.1f} M multiply-adds at {rates.matmul / 1e9:.1f} G/s (torch.mm) and "
            f"{work.words:,} words of keystream at {rates.keystream / 1e9:.2f} GB/s; "
            f"{work.bytes / 1e6:.2f} MB at {rates.copy / 1e9:.1f} GB/s (copy)"
        )
    typer.echo("")


def _stream(one: "Stream") -> None:
    high, wide = one.size
    typer.echo(
        f"stream: {plural(one.images, 'image')} of {wide} x {high} (a sixth of Full HD's side, so that it ends soon), "
        f"preprocessed, obfuscated and written to bytes in {one.seconds:.0f} s"
    )
    typer.echo(
        f"resident after a tenth {one.early:.1f} MB, at the end {one.late:.1f} MB: difference {one.growth:+.1f} MB"
    )


def _about(here: "Machine") -> None:
    cores = plural(here.cores, "core")
    typer.echo(f"machine: {here.cpu}, {cores}, {plural(here.threads, 'thread')} of torch, {here.system}")
    typer.echo(f"versions: sfumato {here.sfumato}, Python {here.python}, torch {here.torch}, numpy {here.numpy}")


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3f}"


def _spread(timing: "Timing") -> tuple[str, str, str]:
    low, high = timing.spread
    return _ms(timing.median), _ms(low), _ms(high)


def _save(path: Path | None, here: "Machine", found: dict[str, Any]) -> None:
    from sfumato.core.files import write_bytes

    if path is not None:
        document = {"machine": asdict(here), **found}
        write_bytes(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)
    for i, name in enumerate(names):
        table.add_column(Text(name), justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    console.print(table)
