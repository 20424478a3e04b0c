"""What a notebook shows of plans, releases, results and errors: the figures, escaped, and nothing of records."""

import io
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from torch import nn

from sfumato.core.cut import split
from sfumato.core.display import facts, table
from sfumato.core.release import Release
from sfumato.tasks.classification import Classified
from sfumato.tasks.detection.boxes import Detections


def test_cells_are_escaped() -> None:
    shown = table(("<a>",), [("<script>",)], title="x & y") + facts("", {"b": "<i>"})
    assert "<script>" not in shown and "<i>" not in shown
    assert "&lt;script&gt;" in shown and "x &amp; y" in shown


def test_a_plan_says_what_crosses_and_who_computes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    cut = split(model, at="1", example=torch.zeros(1, 3, 8, 8))
    assert cut.plan is not None
    shown = cut._repr_html_()
    assert shown == cut.plan._repr_html_()
    assert "[1, 4, 6, 6], 576 bytes" in shown
    assert "112 parameters, 3,888 multiply-adds" in shown
    assert "cut after 1" in split(model, at="1")._repr_html_()


def test_a_release_says_its_bits_and_no_code() -> None:
    codes = torch.full((2, 8, 2, 2), 77, dtype=torch.int8)
    release = Release(codes, torch.tensor([0.5, 0.8]), "ab" * 32, torch.tensor([640.0, 256.0]), block=2)
    shown = release._repr_html_()
    assert f"{release.nbytes:,} bytes leave" in shown and "[2, 8, 2, 2]" in shown
    for cell in ("0.5", "640", "40.00", "0.8", "256", "16.00"):
        assert f"<td>{cell}</td>" in shown
    assert "77" not in shown


def test_results_show_their_figures() -> None:
    boxes = np.arange(100, dtype=np.float32).reshape(25, 4)
    shown = Detections(boxes, np.linspace(0.9, 0.1, 25, dtype=np.float32))._repr_html_()
    assert "25 found, the best 20 shown" in shown and shown.count("<tr>") == 21
    assert "<td>0.9</td>" in shown
    shown = Classified(1, "yes", np.array([0.25, 0.75]))._repr_html_()
    assert shown.index("0.750") < shown.index("0.250") and "yes" in shown


@pytest.fixture
def shell() -> Any:
    made: Any = InteractiveShell()  # type: ignore[no-untyped-call]
    made.run_cell("import sfumato")
    return made


def said(shell: Any, cell: str) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        result = shell.run_cell(cell)
    assert not result.success
    return out.getvalue()


def test_an_error_is_the_line_that_called_and_the_message(shell: Any) -> None:
    shown = said(shell, "x = 1\nsfumato.load('nowhere-at-all')\n")
    assert shown.strip().splitlines() == [
        "line 2: sfumato.load('nowhere-at-all')",
        "ArtefactError: nowhere-at-all: no such folder",
        "  wanted: a folder with client.safetensors",
        "  do: sfumato fit --out FOLDER",
    ]


def test_an_error_the_caller_raises_shows_his_line_and_others_stay_as_they_are(shell: Any) -> None:
    shell.run_cell("from sfumato.core.errors import AlphaError")
    assert said(shell, "raise AlphaError('alpha 2')").splitlines()[0] == "line 1: raise AlphaError('alpha 2')"
    assert "Traceback" in said(shell, "1 / 0")
