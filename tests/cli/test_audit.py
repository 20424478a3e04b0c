"""`sfumato audit`: a report, a verdict a line, a gate, and clear answers to wrong requests."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import pytest

from sfumato.attack.base import Effort
from sfumato.auditing import prey, run
from sfumato.datasets import images

if TYPE_CHECKING:
    from tests.conftest import Ran, Tiny

Cli = Callable[..., "Ran"]


@pytest.fixture
def people(tiny: "Tiny", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty-five persons of four pictures, pieces of the sampler's; attackers that hardly try."""
    effort = Effort(steps=4, batch=4, tested=20, quiet=True)
    monkeypatch.setattr(run, "SIZE", 128)
    monkeypatch.setattr(prey, "PICTURE", 32)
    for name, budget in run.BUDGETS.items():
        monkeypatch.setitem(run.BUDGETS, name, replace(budget, effort=effort, repeats=(2,), certified=1))
    made, shown = tmp_path / "people", sorted((tiny.photographs / "sampler").iterdir())
    for person in range(25):
        (made / f"p{person:02d}").mkdir(parents=True)
        image = images.read(shown[person % len(shown)])
        for part in range(4):
            cv2.imwrite(str(made / f"p{person:02d}" / f"{part}.jpg"), image[part * 9 :, part * 7 :])
    return made


def test_a_report_a_verdict_and_json(cli: Cli, tiny: "Tiny", people: Path, tmp_path: Path) -> None:
    page, data = tmp_path / "audit.html", tmp_path / "audit.json"
    words = [
        "audit",
        tiny.folder,
        "--data",
        people,
        "--weights",
        tiny.weights,
        "--quiet",
        "--html",
        page,
        "--json",
        data,
    ]
    ran = cli(*words)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("alpha 0.8: ") and "alpha 0.95: " in ran.out and str(page) in ran.out
    assert "</html>" in page.read_text() and set(json.loads(data.read_text())["verdicts"]) == {"0.8", "0.95"}
    gated = cli(*words, "--alpha", "0.8", "--fail-above", "auc=-1")
    assert gated.code == 1 and "the limit is -1" in gated.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--budget", "vast"], "quick or full"),
        (["--fail-above", "tar"], "--fail-above tar=0.05"),
        (["--alpha", "1"], "0 <= alpha < 1"),
        (["--recogniser", "none.onnx"], "none.onnx: no such file"),
    ],
)
def test_wrong_requests(cli: Cli, tiny: "Tiny", people: Path, tmp_path: Path, more: list[str], said: str) -> None:
    page = tmp_path / "audit.html"
    ran = cli("audit", tiny.folder, "--data", people, "--weights", tiny.weights, "--quiet", "--html", page, *more)
    assert ran.code == 2 and said in ran.err and not page.exists()


def test_too_little_data(cli: Cli, tiny: "Tiny", people: Path, tmp_path: Path) -> None:
    few = cli("audit", tiny.folder, "--data", people / "p00", "--weights", tiny.weights, "--html", tmp_path / "a.html")
    assert few.code == 2 and "wanted: at least 100" in few.err
