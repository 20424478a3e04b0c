"""What the verbs share: options of one name and one meaning, how errors leave, where work in progress lies."""

import contextlib
import os
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, ParamSpec

import typer

if TYPE_CHECKING:
    from sfumato.trusted.protect import Protected

P = ParamSpec("P")
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
GOES_ON = "the same command goes on where this one stopped"
MEMORY = ("not enough memory", "can't allocate memory", "out of memory")  # how torch says it, CPU and CUDA


class Tail(StrEnum):
    """The two kinds of server."""

    ADAPTED = "adapted"
    FROZEN = "frozen"


class Device(StrEnum):
    """Where tensors live."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


Artefacts = Annotated[
    Path | None, typer.Option(help="Folder that `sfumato fit` wrote; without it the artefacts that ship.")
]
Weights = Annotated[
    Path | None, typer.Option(help="FaceBoxes weights, .pth or .safetensors; without it those that ship.")
]
TailOption = Annotated[
    Tail | None,
    typer.Option(help="Server with the fine-tuned tail or with the provider's own; without it whichever is there."),
]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute; auto takes CUDA where there is one.")]
Size = Annotated[str, typer.Option(help="Side of the square input in pixels, or native: each photograph's own size.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars, results only.")]


def fail(message: str, code: int) -> NoReturn:
    """Say why on stderr and leave with the exit code."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def note(text: str) -> None:
    """Something to know that is no result: stderr."""
    typer.echo(text, err=True)


def guarded(verb: Callable[P, None], *, resume: str = GOES_ON) -> Callable[P, None]:
    """The verb with its errors as sentences and exit codes; `resume` follows "interrupted"."""

    @wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        from sfumato.core.errors import SfumatoError

        try:
            verb(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo(f"\ninterrupted: {resume}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except SfumatoError as error:
            fail(str(error), error.exit_code)
        except BrokenPipeError:  # the reader of our output left; typer ends quietly
            raise
        except OSError as error:
            fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part), 1)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not any(words in str(error) for words in MEMORY):
                raise
            fail("out of memory\n  wanted: a smaller input or batch\n  do: --size 1024, or --batch 4 where fitting", 1)

    return run


def size_of(text: str) -> tuple[int, int] | None:
    """--size -> (height, width), None for native. Raises RequestError."""
    from sfumato.core.errors import RequestError

    if text == "native":
        return None
    if not text.isascii() or not text.isdigit() or not 32 <= int(text) <= 8192:
        raise RequestError(f"size {text}", wanted="native, or a side of 32 to 8192 pixels", do="--size 1024")
    return int(text), int(text)


def numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """A list such as 1,2,3 -> its numbers; None for None. Raises RequestError."""
    from sfumato.core.errors import RequestError

    if text is None:
        return None
    words = text.split(",")
    if not all(word.strip().isascii() and word.strip().isdigit() for word in words):
        raise RequestError(f"{option} {text}", wanted="whole numbers with commas between", do=f"{option} 1,2,3")
    return tuple(int(word) for word in words)


def writable(path: Path | None) -> None:
    """Find out before the work, not after it, that a result has no place. Raises OutputError."""
    from sfumato.core.files import atomic

    if path is not None:
        with contextlib.suppress(_OnlyTried), atomic(path):
            raise _OnlyTried


class _OnlyTried(BaseException):
    """Ends a trial of a place."""


def work_folder(verb: str) -> Path | None:
    """Where a verb keeps what it would need after a kill: $XDG_CACHE_HOME or ~/.cache; None where it cannot be had."""
    try:
        place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfumato" / verb
        place.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return place if os.access(place, os.W_OK | os.X_OK) else None


def tail_of(artefacts: Path | None, tail: Tail | None) -> str:
    """Which server `load` takes."""
    from sfumato.facade import SERVERS, SHIPPED

    adapted = ((artefacts or SHIPPED) / SERVERS["adapted"]).exists()
    return tail.value if tail else (Tail.ADAPTED if adapted else Tail.FROZEN).value


def load(
    artefacts: Path | None, weights: Path | None, tail: Tail | None, size: tuple[int, int] | None, device: Device
) -> "Protected":
    """Both sides of a fit of the face detector. Raises ArtefactError, WeightsError, RequestError."""
    from sfumato import facade
    from sfumato.core.errors import ArtefactError
    from sfumato.tasks.detection.task import FaceDetection

    task = FaceDetection(size=size)
    loaded = facade.load(artefacts, task=task, weights=weights, tail=tail and tail.value, device=device.value)
    if loaded.outside is None:
        wanted = f"{' or '.join(facade.SERVERS.values())} beside {facade.CLIENT}"
        raise ArtefactError(f"{artefacts or facade.SHIPPED}: no server artefact", wanted=wanted, do="sfumato fit")
    return loaded


def examples(*commands: str) -> str:
    """The end of a verb's help."""
    return "\n\n".join(("Example:" if len(commands) == 1 else "Examples:", *commands))


def plural(count: int, noun: str) -> str:
    """1 face, 2 faces."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(values: Sequence[object]) -> str:
    """a, b, c."""
    return ", ".join(str(value) for value in values)
