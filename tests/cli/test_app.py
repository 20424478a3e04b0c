"""The frame of the command line: help, exit codes, errors as sentences, options of one meaning."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer

from sfumato import __version__
from sfumato.cli import common
from sfumato.core.errors import AlphaError, DatasetError, OutputError, RequestError, SfumatoError

if TYPE_CHECKING:
    from tests.conftest import Ran

VERBS = ("demo", "fit", "detect", "measure", "doctor")


def test_help_lists_the_verbs(cli: "Callable[..., Ran]") -> None:
    ran = cli("--help")
    assert ran.code == 0
    assert all(f" {verb} " in ran.out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_an_example(cli: "Callable[..., Ran]", verb: str) -> None:
    ran = cli(verb, "--help")
    assert ran.code == 0
    assert "Example" in ran.out
    assert f"sfumato {verb} --" in ran.out or f"sfumato {verb} photographs --" in ran.out


def test_version(cli: "Callable[..., Ran]") -> None:
    assert cli("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    "words",
    [("brew",), ("fit",), ("detect",), ("measure", "--datasett", "d"), ("measure", "--dataset", "d", "--tail", "x")],
)
def test_a_wrong_request_is_two(cli: "Callable[..., Ran]", words: tuple[str, ...]) -> None:
    ran = cli(*words)
    assert ran.code == 2
    assert "Traceback" not in ran.err


def test_help_is_quick_because_it_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from sfumato.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: print(*{m.partition('.')[0] for m in sys.modules}, file=sys.stderr)"
    )
    src = Path(common.__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, "measure", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(src)},
        check=True,
    )
    assert "Usage: sfumato measure" in done.stdout
    assert not {"torch", "numpy", "cv2", "PIL", "skimage", "matplotlib", "tqdm"} & set(done.stderr.split())


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (SfumatoError("it broke"), 1, "error: it broke"),
        (
            RequestError("a pear", wanted="an apple", do="--apple"),
            2,
            "error: a pear\n  wanted: an apple\n  do: --apple",
        ),
        (AlphaError("alpha = 2"), 2, "error: alpha = 2"),
        (DatasetError("no data"), 2, "error: no data"),
        (OutputError("no room"), 2, "error: no room"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 1, "error: out/x: No space left on device"),
        (MemoryError(), 1, "error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "error: out of memory"),
        (KeyboardInterrupt(), 130, "interrupted: type it again"),
    ],
)
def test_errors_leave_as_sentences(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, says: str
) -> None:
    def verb() -> None:
        raise error

    with pytest.raises(typer.Exit) as left:
        common.guarded(verb, resume="type it again")()
    assert left.value.exit_code == code
    out, err = capsys.readouterr()
    assert says in err
    assert not out


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    def verb() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        common.guarded(verb)()


def test_sizes() -> None:
    assert common.size_of("native") is None
    assert common.size_of("1024") == (1024, 1024)
    for wrong in ("big", "-1024", "0", "9999999", "10x10", "1024.0", "²", ""):
        with pytest.raises(RequestError, match="size"):
            common.size_of(wrong)


def test_lists_of_numbers() -> None:
    assert common.numbers(None, "--folds") is None
    assert common.numbers("1, 2,10", "--folds") == (1, 2, 10)
    for wrong in ("", "1,", "a", "-1", "1.5", "²"):
        with pytest.raises(RequestError, match="--folds"):
            common.numbers(wrong, "--folds")


def test_trying_a_place_leaves_nothing_and_harms_nothing(tmp_path: Path) -> None:
    there = tmp_path / "kept.json"
    there.write_text("kept")
    common.writable(there)
    common.writable(tmp_path / "new" / "file.json")
    common.writable(None)
    assert there.read_text() == "kept"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["kept.json"]
    with pytest.raises(OutputError):
        common.writable(there / "below-a-file.json")


def test_work_folder_follows_the_cache_and_may_be_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert common.work_folder("measure") == tmp_path / "sfumato" / "measure"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert common.work_folder("measure") == tmp_path / "home" / ".cache" / "sfumato" / "measure"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert common.work_folder("measure") is None


def test_words() -> None:
    assert common.plural(1, "face") == "1 face"
    assert common.plural(5171, "face") == "5,171 faces"
    assert common.examples("a") == "Example:\n\na"
    assert common.examples("a", "b") == "Examples:\n\na\n\nb"
