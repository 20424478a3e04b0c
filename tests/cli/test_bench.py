"""`sfumato bench`: tables and JSON that agree, wrong requests refused; no times."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest

from sfumato import benchmarking

if TYPE_CHECKING:
    from tests.conftest import Ran, Tiny

Cli = Callable[..., "Ran"]
VERBS = ("obfuscate", "pipeline", "wire", "fit")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small picture in place of the 1920 x 1080 one, and no GPU."""
    monkeypatch.setattr(benchmarking, "FULL_HD", (256, 256))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def fitted(tiny: "Tiny") -> tuple[object, ...]:
    return "--artefacts", tiny.folder, "--weights", tiny.weights


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert {"cpu", "cores", "threads", "system", "python", "torch", "numpy", "sfumato"} == set(document["machine"])
    return document


def test_help_shows_the_measurements_and_examples(cli: Cli) -> None:
    ran = cli("bench", "--help")
    assert ran.code == 0
    assert all(f" {verb} " in ran.out for verb in VERBS)
    for verb in VERBS:
        ran = cli("bench", verb, "--help")
        assert ran.code == 0
        assert f"sfumato bench {verb} --" in ran.out


def test_obfuscate(cli: Cli, tiny: "Tiny", tmp_path: Path) -> None:
    ran = cli("bench", "obfuscate", *fitted(tiny), "--runs", "2", "--threads", "1", "--json", tmp_path / "new/a.json")
    assert ran.code == 0, ran.err
    document = read(tmp_path / "new/a.json")
    (found,) = document["devices"]
    assert document["stream"] is None
    assert (found["device"], found["shape"], found["alpha"]) == ("cpu", [1, 128, 8, 8], 0.8)
    medians = {name: median(arm["seconds"]) for name, arm in found["arms"].items()}
    assert found["ratios"]["step/head"] == medians["step"] / medians["head"]
    assert f"step/randn {found['ratios']['step/randn']:.3f}" in ran.out
    assert f"the faster baseline is `{found['baseline']}`" in ran.out
    assert "2 runs each, in turns, after one to warm up" in ran.out
    assert "floor of the step" in ran.out
    assert "mean 5.072 ms" in ran.out
    assert document["machine"]["cpu"] in ran.out
    assert "1 thread of torch" in ran.out


def test_obfuscate_a_stream(cli: Cli, tiny: "Tiny", tmp_path: Path) -> None:
    words = ("--runs", "1", "--stream", "10", "--json", tmp_path / "a.json")
    ran = cli("bench", "obfuscate", *fitted(tiny), *words)
    assert ran.code == 0, ran.err
    found = read(tmp_path / "a.json")["stream"]
    assert found["growth"] == found["late"] - found["early"]
    assert "10 images of 320 x 180" in ran.out
    assert f"difference {found['growth']:+.1f} MB" in ran.out


def test_pipeline(cli: Cli, tiny: "Tiny", tmp_path: Path) -> None:
    words = ("--size", "256", "--data", tiny.photographs, "--limit", "2", "--pairs", "2", "--threads", "1")
    ran = cli("bench", "pipeline", *fitted(tiny), *words, "--json", tmp_path / "a.json")
    assert ran.code == 0, ran.err
    found = read(tmp_path / "a.json")
    assert found["ratio"] == median(o / c for o, c in zip(found["obfuscated"], found["clean"], strict=True))
    assert (found["images"], len(found["ratios"]), found["alpha"]) == (2, 2, 0.8)
    assert f"median over pairs {found['ratio']:.3f}" in ran.out
    assert "2 photographs, 2 pairs after one to warm up" in ran.out


def test_wire(cli: Cli, tiny: "Tiny", tmp_path: Path) -> None:
    words = ("--alpha", "0.4", "--alpha", "0.9", "--runs", "1", "--size", "256", "--json", tmp_path / "a.json")
    ran = cli("bench", "wire", *fitted(tiny), *words)
    assert ran.code == 0, ran.err
    rows = {row["name"]: row for row in read(tmp_path / "a.json")["encodings"]}
    assert list(rows) == ["release, alpha 0.4", "release, alpha 0.9", "FP32", "FP32 as JSON"]
    assert rows["FP32"]["bytes"] == 4 * 128 * 8 * 8
    assert all(f"{row['bytes']:,}" in ran.out for row in rows.values())
    assert all(name in ran.out for name in rows)


def test_fit(cli: Cli, tiny: "Tiny", tmp_path: Path) -> None:
    words = ("--limit", "12", "--steps", "1", "--batch", "2", "--size", "256", "--data", tiny.photographs)
    ran = cli("bench", "fit", "--weights", tiny.weights, *words, "--json", tmp_path / "a.json")
    assert ran.code == 0, ran.err
    found = read(tmp_path / "a.json")
    assert (found["records"], found["batch"], len(found["each"]["seconds"])) == (12, 2, 1)
    assert found["per_second"] == 1 / found["each"]["median"]
    assert f"{found['per_second']:.3f}" in ran.out


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("brew",),
        ("obfuscate", "--runs", "0"),
        ("obfuscate", "--alpha", "1"),
        ("obfuscate", "--stream", "9"),
        ("obfuscate", "--threads", "0"),
        ("obfuscate", "--artefacts", "/nowhere"),
        ("pipeline", "--alpha", "nan"),
        ("pipeline", "--data", "/nowhere"),
        ("pipeline", "--size", "big"),
        ("pipeline", "--pairs", "0"),
        ("wire", "--alpha=-0.1"),
        ("wire", "--weights", "/nowhere"),
        ("fit", "--steps", "0"),
        ("fit", "--data", "/nowhere"),
    ],
)
def test_wrong_requests_are_refused(cli: Cli, words: tuple[str, ...]) -> None:
    ran = cli("bench", *words)
    assert ran.code == 2
    assert "Traceback" not in ran.err


def test_a_result_without_a_place_is_refused_before_the_work(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for verb in VERBS:
        ran = cli("bench", verb, "--json", tmp_path / "file" / "result")
        assert ran.code == 2
        assert "cannot be written" in ran.err
        assert not ran.out


def test_a_photograph_that_cannot_be_read(cli: Cli, tiny: "Tiny", tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((64, 64, 3), np.uint8))
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8 cut")
    ran = cli("bench", "pipeline", *fitted(tiny), "--size", "256", "--data", tmp_path, "--pairs", "1")
    assert ran.code == 2
    assert "Traceback" not in ran.err
