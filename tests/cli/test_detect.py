"""`sfumato detect`: results, what is refused, what is passed over, what is done again."""

import csv
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
import torch

import sfumato
from sfumato.detecting import PANEL, _unique, sources
from sfumato.facade import SHIPPED, load
from tests.conftest import wire_bytes

if TYPE_CHECKING:
    from tests.conftest import Ran, Tiny

SRC = Path(sfumato.__file__).resolve().parents[1]
Cli = Callable[..., "Ran"]


@pytest.fixture
def photos(tiny: "Tiny", tmp_path: Path) -> Path:
    """Three photographs, one in a folder of its own."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("a.jpg", "b.jpg", "more/a.jpg"), start=1):
        shutil.copy(tiny.photographs / "sampler" / f"img_{number:04d}.jpg", folder / name)
    return folder


@pytest.fixture
def detect(cli: Cli, tiny: "Tiny", tmp_path: Path) -> Cli:
    """The verb with the tiny artefacts, into tmp_path/out, at a score so low that random weights find something."""

    def run(*words: object) -> "Ran":
        return cli("detect", *words, "--out", tmp_path / "out", *tiny.options, "--score", "0.1", "--device", "cpu")

    return run


def results(out: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((out / "detections.json").read_text())
    return document


def size_of(path: Path) -> tuple[int, int]:
    image = cv2.imread(str(path))
    assert image is not None
    return image.shape[0], image.shape[1]


def test_a_folder_gives_pictures_json_and_csv(detect: Cli, tiny: "Tiny", photos: Path, tmp_path: Path) -> None:
    ran = detect(photos, "--alpha", "0.8")
    assert ran.code == 0, ran.err
    out = tmp_path / "out"
    found = results(out)
    assert [row["image"] for row in found["images"]] == ["a", "b", "more/a"]
    assert found["failed"] == []
    assert found["run"]["alpha"] == 0.8
    faces = sum(len(row["faces"]) for row in found["images"])
    assert faces > 0
    assert f"3 images: {faces:,} face" in ran.out
    for row in found["images"]:
        assert row["bits_per_site"] == pytest.approx(12.8, abs=0.01)
        assert row["release_bytes"] == wire_bytes(load(tiny.folder, weights=tiny.weights), 0.8, 1)
        assert size_of(out / "annotated" / f"{row['image']}.jpg") == (row["height"], row["width"])
        assert size_of(out / "side-by-side" / f"{row['image']}.jpg")[1] > 3 * PANEL[1]
    with (out / "detections.csv").open(encoding="utf-8") as text:
        lines = list(csv.DictReader(text))
    assert len(lines) == faces
    assert {line["image"] for line in lines} <= {"a", "b", "more/a"}
    assert all(line["alpha"] == "0.8" and float(line["score"]) >= 0.1 for line in lines)


def test_without_a_decoder_two_panels_and_how_to_train_one(
    cli: Cli, tiny: "Tiny", photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "artefacts"
    ignored = shutil.ignore_patterns("work", "decoder.safetensors")
    shutil.copytree(tiny.folder, folder, ignore=ignored)
    words = ("--artefacts", folder, "--weights", tiny.weights, "--size", "256", "--out", tmp_path / "out")
    ran = cli("detect", photos / "a.jpg", *words)
    assert ran.code == 0
    assert "--decoder-steps" in ran.err
    assert 2 * PANEL[1] < size_of(tmp_path / "out/side-by-side/a.jpg")[1] < 3 * PANEL[1]


def test_clean_obfuscates_nothing(detect: Cli, photos: Path, tmp_path: Path) -> None:
    assert detect(photos / "a.jpg", "--clean").code == 0
    (row,) = results(tmp_path / "out")["images"]
    assert row["faces"] == row["clean_faces"]
    assert "release_bytes" not in row
    assert not (tmp_path / "out/side-by-side").exists()


def test_one_bad_image_among_many_is_told_at_the_end(detect: Cli, photos: Path, tmp_path: Path) -> None:
    (photos / "aa.jpg").write_bytes(b"not a picture")
    (photos / "zz.jpg").write_bytes(b"")
    ran = detect(photos)
    assert ran.code == 1
    assert "2 of 5 images cannot be read" in ran.err
    assert "image 2 of 5 (by name)" in ran.err
    found = results(tmp_path / "out")
    assert [row["image"] for row in found["images"]] == ["a", "b", "more/a"]
    assert [row["image"] for row in found["failed"]] == ["aa", "zz"]


def bad(folder: Path, photo: Path) -> Iterator[tuple[str, Path]]:
    contents = {"empty": b"", "text": b"hello\n", "corrupt": photo.read_bytes()[:2000], "noise": os.urandom(4000)}
    for name, content in contents.items():
        path = folder / f"{name}.jpg"
        path.write_bytes(content)
        yield name, path
    yield "missing", folder / "missing.jpg"


def test_a_single_bad_image_is_a_wrong_request(detect: Cli, photos: Path, tmp_path: Path) -> None:
    for name, path in bad(tmp_path, photos / "a.jpg"):
        ran = detect(path)
        assert ran.code == 2, name
        assert ran.err.startswith("error: ")
        assert str(path) in ran.err
        assert "wanted" in ran.err
        assert "Traceback" not in ran.err
    assert not (tmp_path / "out" / "detections.json").exists()


@pytest.mark.parametrize("size", ["256", "native"])
def test_one_pixel(cli: Cli, tiny: "Tiny", tmp_path: Path, size: str) -> None:
    cv2.imwrite(str(tmp_path / "pixel.png"), np.full((1, 1, 3), 77, np.uint8))
    words = [*tiny.options[:-1], size, "--out", tmp_path / "out"]
    assert cli("detect", tmp_path / "pixel.png", *words).code == 0
    (row,) = results(tmp_path / "out")["images"]
    assert (row["height"], row["width"]) == (1, 1)


def test_sixty_megapixels(detect: Cli, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "large.jpg"), np.full((6000, 10_000, 3), 128, np.uint8))
    assert detect(tmp_path / "large.jpg").code == 0
    assert size_of(tmp_path / "out/annotated/large.jpg") == (6000, 10_000)
    assert size_of(tmp_path / "out/side-by-side/large.jpg")[0] < 600


def test_a_very_long_image_still_fits_a_jpeg(detect: Cli, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "long.png"), np.full((2, 70_000, 3), 128, np.uint8))
    assert detect(tmp_path / "long.png").code == 0
    assert size_of(tmp_path / "out/annotated/long.jpg")[1] < 66_000


def test_native_size(cli: Cli, tiny: "Tiny", photos: Path, tmp_path: Path) -> None:
    words = [*tiny.options[:-1], "native", "--out", tmp_path / "out"]
    assert cli("detect", photos / "a.jpg", *words).code == 0
    (row,) = results(tmp_path / "out")["images"]
    # a 300 x 450 photograph has 10 x 15 sites, in blocks of 8
    assert row["release_bytes"] == wire_bytes(load(tiny.folder, weights=tiny.weights), 0.8, 4)


@pytest.mark.parametrize("alpha", ["1", "-0.1", "nan", "inf", "abc"])
def test_wrong_alpha(detect: Cli, photos: Path, tmp_path: Path, alpha: str) -> None:
    ran = detect(photos, f"--alpha={alpha}")
    assert ran.code == 2
    assert "alpha" in ran.err
    assert "Traceback" not in ran.err
    assert not list((tmp_path / "out").rglob("*.jpg"))


def test_wrong_weights(cli: Cli, tiny: "Tiny", photos: Path, tmp_path: Path) -> None:
    text, other, changed = tmp_path / "text.pth", tmp_path / "other.pth", tmp_path / "changed.pth"
    text.write_text("these are no weights")
    torch.save(torch.nn.Linear(2, 2).state_dict(), other)
    state = torch.load(tiny.weights, weights_only=True)
    state["conv1.conv.weight"][0, 0, 0, 0] += 1
    torch.save(state, changed)
    for path, says in (
        (text, "refused"),
        (other, "not FaceBoxes"),
        (changed, "model"),
        (tmp_path / "no.pth", "no such"),
    ):
        words = ("--artefacts", tiny.folder, "--weights", path, "--out", tmp_path / "out")
        ran = cli("detect", photos, *words)
        assert ran.code == 2, path
        assert says in ran.err
        assert "Traceback" not in ran.err


def test_a_wrong_score_or_size_or_folder(detect: Cli, cli: Cli, tiny: "Tiny", photos: Path, tmp_path: Path) -> None:
    words = ["--artefacts", tiny.folder, "--weights", tiny.weights]
    assert "score" in cli("detect", photos, *words, "--score", "2", "--out", tmp_path / "out").err
    assert "size" in cli("detect", photos, *words, "--size", "huge", "--out", tmp_path / "out").err
    (tmp_path / "nothing").mkdir()
    ran = detect(tmp_path / "nothing")
    assert ran.code == 2
    assert "no image" in ran.err


@pytest.mark.parametrize("place", ["file/below", "/proc/out"])
def test_an_output_that_cannot_be_written(cli: Cli, tiny: "Tiny", photos: Path, tmp_path: Path, place: str) -> None:
    """Root may write anywhere but below a file and into /proc."""
    if place.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("no /proc here")
    (tmp_path / "file").write_text("")
    ran = cli("detect", photos, "--out", tmp_path / place, *tiny.options)
    assert ran.code == 2
    assert "cannot be written" in ran.err


def limited() -> None:
    """A disk with room for small files only."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))


def test_a_full_disk_is_said(tiny: "Tiny", photos: Path, tmp_path: Path) -> None:
    code = "from sfumato.cli.app import main; main()"
    words = ["detect", str(photos), "--out", str(tmp_path / "out"), *tiny.options]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC)},
        preexec_fn=limited,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob(".sfumato-*"))


def test_inputs_stay_as_they_are(cli: Cli, tiny: "Tiny", photos: Path) -> None:
    def digest() -> list[str]:
        return [hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(photos.rglob("*.jpg"))]

    before = digest()
    for given in (photos, photos / "a.jpg", photos / "more"):
        ran = cli("detect", given, "--out", photos, *tiny.options)
        assert ran.code == 2
        assert "output folder" in ran.err
    assert digest() == before
    assert len(list(photos.rglob("*"))) == 4


def test_results_below_the_input_are_no_input(tiny: "Tiny", cli: Cli, photos: Path) -> None:
    for _ in range(2):
        ran = cli("detect", photos, "--out", photos / "out", *tiny.options)
        assert ran.code == 0
        assert ran.out.startswith("3 images")


def test_a_second_run_goes_on_and_force_begins_anew(detect: Cli, photos: Path, tiny: "Tiny", tmp_path: Path) -> None:
    assert "done before" not in detect(photos).out
    first = results(tmp_path / "out")
    assert "(3 of them done before)" in detect(photos).out
    assert results(tmp_path / "out") == first
    assert "done before" not in detect(photos, "--force").out
    assert "done before" not in detect(photos, "--alpha", "0.5").out
    detect(photos)
    shutil.copy(tiny.photographs / "sampler" / "img_0009.jpg", photos / "b.jpg")
    (tmp_path / "out/annotated/a.jpg").unlink()
    assert "(1 of them done before)" in detect(photos).out
    (tmp_path / "out/detections.json").write_text('{"run": 3')
    assert "done before" not in detect(photos).out


def test_names_stay_apart(tmp_path: Path, astronaut: np.ndarray) -> None:
    assert _unique(["a.jpg", "a.png", "A.jpg", "a.png", "b"]) == ["a", "a.png", "A.jpg", "a.png-2", "b"]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        cv2.imwrite(str(tmp_path / folder / "x.png"), astronaut)
    found = sources([tmp_path / "one", tmp_path / "two" / "x.png"], tmp_path / "out")
    assert [source.name for source in found] == ["x", "x.png"]


def test_the_shipped_detector_finds_the_astronaut(cli: Cli, tmp_path: Path, astronaut: np.ndarray) -> None:
    if not (SHIPPED / "client.safetensors").exists():
        pytest.skip("no artefacts ship with this checkout")
    cv2.imwrite(str(tmp_path / "astronaut.png"), astronaut)
    ran = cli("detect", tmp_path / "astronaut.png", "--out", tmp_path / "out", "--alpha", "0.8")
    assert ran.code == 0, ran.err
    (row,) = results(tmp_path / "out")["images"]
    assert len(row["faces"]) == len(row["clean_faces"]) == 1
    (face,) = row["faces"]
    assert 150 < (face["x1"] + face["x2"]) / 2 < 290
    assert row["release_bytes"] <= 70_000
