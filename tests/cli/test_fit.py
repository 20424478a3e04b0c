"""`sfumato fit`: photographs in, artefacts out; bad photographs, Ctrl-C, a full disk."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

import sfumato
from sfumato.core import artefact
from sfumato.core.errors import DatasetError
from sfumato.datasets import folder
from sfumato.datasets.folder import Photographs

if TYPE_CHECKING:
    from tests.conftest import Ran, Tiny

SRC = Path(sfumato.__file__).resolve().parents[1]
MAIN = "from sfumato.cli.app import main; main()"
Cli = Callable[..., "Ran"]


@pytest.fixture
def photos(tiny: "Tiny", tmp_path: Path) -> Path:
    """Twelve good photographs."""
    made = tmp_path / "photos"
    made.mkdir()
    for path in sorted((tiny.photographs / "sampler").iterdir())[:12]:
        shutil.copy(path, made)
    return made


def spoil(photos: Path) -> None:
    """Four files among the photographs that are none."""
    whole = (photos / "img_0001.jpg").read_bytes()
    (photos / "corrupt.jpg").write_bytes(whole[:3000])
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "text.jpg").write_text("hello")
    (photos / "vast.png").write_bytes(_claims_a_terapixel())


def _claims_a_terapixel() -> bytes:
    data = bytearray(cv2.imencode(".png", np.zeros((1, 1, 3), np.uint8))[1].tobytes())
    data[16:24] = (1 << 20).to_bytes(4, "big") * 2
    return bytes(data)


def words(tiny: "Tiny", photos: Path, out: Path, *more: str) -> list[str]:
    common = ["--weights", str(tiny.weights), "--size", "256", "--batch", "2", "--device", "cpu"]
    return ["fit", "--data", str(photos), "--out", str(out), *common, *more]


def digest(out: Path) -> str:
    return artefact.read(out / "client.safetensors", side="client")[0].digest


def test_a_fit_leaves_what_detect_and_doctor_take(cli: Cli, tiny: "Tiny", photos: Path, tmp_path: Path) -> None:
    spoil(photos)
    cv2.imwrite(str(photos / "pixel.png"), np.full((1, 1, 3), 9, np.uint8))
    out = tmp_path / "mine"
    ran = cli(*words(tiny, photos, out, "--steps", "3", "--decoder-steps", "2", "--half"))
    assert ran.code == 0, ran.err
    assert "4 of 17 images cannot be read and are left out" in ran.err
    header, _ = artefact.read(out / "server.safetensors", side="server")
    assert (header.tail, header.fit["records"], header.fit["steps"]) == ("adapted", 13, 3)
    assert (out / "card.md").is_file()
    used = ["--artefacts", out, "--weights", tiny.weights]
    assert cli("doctor", *used, "--device", "cpu").code == 0
    ran = cli("detect", photos / "img_0001.jpg", *used, "--size", "256", "--out", tmp_path / "found")
    assert ran.code == 0
    assert "decoder" not in ran.err

    before = digest(out)
    frozen = words(tiny, photos, out, "--steps", "2", "--tail", "frozen", "--start", str(out), "--quiet")
    ran = cli(*frozen)
    assert ran.code == 0, ran.err
    assert "%" not in ran.err
    assert digest(out) == before
    assert artefact.read(out / "server-frozen.safetensors", side="server")[0].tail == "frozen"


def test_photographs_are_a_sequence(photos: Path) -> None:
    spoil(photos)
    records = Photographs(photos, quiet=True)
    assert len(records) == 12
    assert len(records.skipped) == 4
    assert records[0].shape == records[-12].shape == (300, 450, 3)
    assert [image.shape for image in records[2:4]] == [(300, 450, 3)] * 2
    assert len(list(records)) == 12
    with pytest.raises(IndexError):
        records[12]
    assert "image 1 of 16 (by name)" in records.skipped[0].got
    assert "corrupt" not in records.skipped[0].got


def test_large_photographs_are_shrunk(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "wide.png"), np.zeros((10, 2 * folder.LONGEST, 3), np.uint8))
    assert Photographs(tmp_path, quiet=True)[0].shape == (5, folder.LONGEST, 3)


def test_nothing_but_bad_photographs(tmp_path: Path, cli: Cli, tiny: "Tiny") -> None:
    (tmp_path / "a.jpg").write_text("hello")
    with pytest.raises(DatasetError, match="none of 1 images"):
        Photographs(tmp_path, quiet=True)
    ran = cli(*words(tiny, tmp_path, tmp_path / "out"))
    assert ran.code == 2
    assert "none of 1 images" in ran.err


def test_what_is_refused(cli: Cli, tiny: "Tiny", photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy(photos / "img_0001.jpg", few)
    cases = {
        "no such folder": words(tiny, tmp_path / "none", tmp_path / "out"),
        "cannot be written": words(tiny, photos, tmp_path / "file" / "out"),
        "1 records": words(tiny, few, tmp_path / "out1", "--steps", "2"),
        "no such file": words(tiny, photos, tmp_path / "out2", "--steps", "2", "--start", str(tmp_path)),
        "--steps": words(tiny, photos, tmp_path / "out3", "--steps", "0"),
        "--privacy": words(tiny, photos, tmp_path / "out3", "--privacy", "-1"),
        "none.onnx: no such file": words(tiny, photos, tmp_path / "out5", "--recogniser", "none.onnx"),
        "--identity": words(tiny, photos, tmp_path / "out5", "--identity", "-1"),
        "cuda": words(tiny, photos, tmp_path / "out4", "--device", "gpu"),
    }
    for says, case in cases.items():
        ran = cli(*case)
        assert ran.code == 2, says
        assert says in ran.err
        assert "Traceback" not in ran.err


def test_a_recogniser_is_shown_faces_and_played_against(
    cli: Cli, tiny: "Tiny", photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []

    class Colours:
        def __init__(self, path: Path, crop: float) -> None:
            assert (path.name, crop) == ("colours.onnx", 1.0)

        def embed(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
            seen.extend(picture.shape for picture in pictures)
            return np.stack([picture.mean((0, 1)) for picture in pictures])

    monkeypatch.setattr("sfumato.attack.recogniser.Recogniser", Colours)
    # a detector of random weights is sure of nothing, and finds what is small
    monkeypatch.setattr("sfumato.tasks.detection.task.SURE", 0.0)
    monkeypatch.setattr("sfumato.learn.identity.SMALLEST", 0)
    out = tmp_path / "out"
    ran = cli(*words(tiny, photos, out, "--steps", "7", "--recogniser", "colours.onnx", "--identity", "2", "--quiet"))
    assert ran.code == 0, ran.err
    assert len(seen) > 12
    assert all(height == width and channels == 3 for height, width, channels in seen)
    header, _ = artefact.read(out / "client.safetensors", side="client")
    assert header.fit["identity"] == 2.0


@pytest.mark.parametrize("steps", [1, 9])
def test_few_steps_are_steps_too(cli: Cli, tiny: "Tiny", photos: Path, tmp_path: Path, steps: int) -> None:
    ran = cli(*words(tiny, photos, tmp_path / "out", "--steps", str(steps), "--decoder-steps", str(steps), "--quiet"))
    assert ran.code == 0, ran.err


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        bufsize=0,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )


def test_ctrl_c_and_the_same_command_goes_on_to_the_same_end(
    cli: Cli, tiny: "Tiny", photos: Path, tmp_path: Path
) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert cli(*words(tiny, photos, whole, "--steps", "12", "--quiet")).code == 0
    command = words(tiny, photos, halved, "--steps", "12")
    with start(command) as job:
        assert job.stderr is not None
        said = ""
        # the fit's own bar: the photographs are twelve too, and have theirs
        while not re.search(r"fit:[^\r]*\| [4-9]/12", said) and (more := job.stderr.read(1)):
            said += more
        job.send_signal(signal.SIGINT)
        said = job.stderr.read()
    assert job.returncode == 130
    assert "interrupted: the same command goes on" in said
    assert "Traceback" not in said
    assert not (halved / "client.safetensors").exists()
    assert (halved / "work/adapted/checkpoint.pt").exists()
    ran = cli(*command)
    assert ran.code == 0, ran.err
    assert "fit:   0%" not in ran.err
    assert digest(halved) == digest(whole)


# Of 12 photographs at 256 x 256 the cache of head outputs takes 590 kB, a checkpoint 13 MB.
@pytest.mark.parametrize("limit", [100_000, 2_000_000])
def test_a_full_disk_is_said(tiny: "Tiny", photos: Path, tmp_path: Path, limit: int) -> None:
    """Found while the cache is made, and while a checkpoint is written: torch tells of neither as an OSError."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-c", MAIN, *words(tiny, photos, tmp_path / "out", "--steps", "2", "--quiet")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
        preexec_fn=limited,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
