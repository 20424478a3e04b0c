"""The slider's work for each move, what it shows and says, and what is left where there is no ipywidgets."""

import json
import sys
from base64 import b64decode
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import nbformat
import numpy as np
import pytest
import torch

from sfumato import demo, facade
from sfumato.attack.decoder import Decoder
from sfumato.core.errors import AlphaError, RequestError
from sfumato.datasets import fddb
from sfumato.measurement import measure
from sfumato.notebook import Explorer, explore, show
from sfumato.tasks.detection.task import FaceDetection
from sfumato.trusted.protect import Protected


class Counted:
    """Calls through to a module, counting."""

    def __init__(self, name: str, inner: Any, calls: Counter[str]) -> None:
        self.name, self.inner, self.calls = name, inner, calls

    def __call__(self, *args: Any) -> Any:
        self.calls[self.name] += 1
        return self.inner(*args)

    def reconstruct(self, *args: Any) -> Any:
        self.calls[self.name] += 1
        return self.inner.reconstruct(*args)


@pytest.fixture(scope="module")
def pair(tiny: Any) -> tuple[Protected, Decoder]:
    protected = facade.load(tiny.folder, weights=tiny.weights, task=FaceDetection(size=(tiny.size, tiny.size)))
    decoder = demo.decoder_of(tiny.folder, protected)
    assert decoder is not None
    return protected, decoder


@pytest.fixture
def explorer(pair: tuple[Protected, Decoder], astronaut: np.ndarray) -> Explorer:
    protected, decoder = pair
    return explore(protected, astronaut, decoder=decoder)


def decoded(jpeg: bytes) -> np.ndarray:
    picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    return np.asarray(picture)


def test_a_move_runs_no_head_and_one_of_each_other_part(tiny: Any, astronaut: np.ndarray) -> None:
    calls: Counter[str] = Counter()
    protected = facade.load(tiny.folder, weights=tiny.weights, task=FaceDetection(size=(tiny.size, tiny.size)))
    decoder = Counted("decoder", demo.decoder_of(tiny.folder, protected), calls)
    for part in ("head", "outside", "reference"):
        setattr(protected, part, Counted(part, getattr(protected, part), calls))
    one: Any = decoder
    moved = explore(protected, astronaut, decoder=one)
    slider = moved.widget.children[0]
    assert calls == {"head": 1, "reference": 1, "outside": 1, "decoder": 1}
    slider.value = 0.4
    assert calls == {"head": 1, "reference": 1, "outside": 2, "decoder": 2}
    slider.value = 0.8
    assert calls == {"head": 1, "reference": 1, "outside": 2, "decoder": 2}, "seen before: no work"


def test_the_slider_changes_picture_and_figures(explorer: Explorer) -> None:
    slider, picture, below = explorer.widget.children
    before = picture.value, below.value
    slider.value = 0.25
    assert picture.value == explorer.at(0.25).picture.jpeg != before[0]
    assert below.value != before[1]
    assert (slider.min, slider.max, slider.step) == (0.05, 0.95, 0.05)


def test_it_says_what_the_release_is(explorer: Explorer) -> None:
    view = explorer.at(0.8)
    bits, leaves = float(view.release.bits[0]), view.release.nbytes
    sites = view.release.sites[0] * view.release.sites[1]
    assert (
        view.says[0]
        == f"alpha 0.8: at most {bits / sites:.1f} bits a site, {bits:,.0f} bits in all; {leaves:,} bytes leave"
    )
    assert view.says[1].startswith(f"{len(view.found)} found, ")
    assert not any("AP" in line for line in view.says), "no figure that nobody measured"
    assert decoded(view.picture.jpeg).shape[1] > 3 * 480


def test_ap_comes_from_the_table_and_between_two_alphas_both_are_said(
    pair: tuple[Protected, Decoder], tiny: Any, astronaut: np.ndarray, tmp_path: Path
) -> None:
    protected, decoder = pair
    table = measure(protected, fddb.load(tiny.dataset), alphas=(None, 0.4, 0.8), limit=1, quiet=True)
    clean, low, high = (arm.detected.mean for arm in table.arms)
    made = explore(protected, astronaut, decoder=decoder, table=table)
    start = f"AP measured on {table.images} photographs with {table.faces} faces: "
    assert f"{start}{high:.4f} at alpha 0.8, {clean:.4f} clean" in made.at(0.8).says
    assert f"{start}{low:.4f} at alpha 0.4, {high:.4f} at alpha 0.8, {clean:.4f} clean" in made.at(0.5).says
    assert f"{start}{high:.4f} at alpha 0.8, {clean:.4f} clean" in made.at(0.9).says
    place = tmp_path / "table.json"
    place.write_text(json.dumps({"facts": {"obfuscator": protected.digest}, **table.as_dict()}))
    assert explore(protected, astronaut, decoder=decoder, table=place).at(0.5).says[2] == made.at(0.5).says[2]
    place.write_text(json.dumps({"facts": {"obfuscator": "f" * 64}, **table.as_dict()}))
    with pytest.raises(RequestError, match="a table of obfuscator ffffffffffff"):
        explore(protected, astronaut, decoder=decoder, table=place)
    for wrong in ("", "[]", "{}"):
        place.write_text(wrong)
        with pytest.raises(RequestError, match="no table of a measurement"):
            explore(protected, astronaut, decoder=decoder, table=place)


def test_without_the_attacker_it_says_so(pair: tuple[Protected, Decoder], astronaut: np.ndarray) -> None:
    made = explore(pair[0], astronaut)  # the decoder that ships is of another obfuscator
    assert made.decoder is None
    assert "no decoder was trained against this obfuscator" in made.at(0.8).says[-1]
    assert decoded(made.at(0.8).picture.jpeg).shape[1] < 3 * 480


def test_with_and_without_widgets_there_is_a_static_picture(
    explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = explorer._repr_mimebundle_()
    assert live["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.widget.model_id
    assert b64decode(live["image/jpeg"]) == explorer.at(0.8).picture.jpeg
    assert live["image/jpeg"] in live["text/html"] and "bits a site" in live["text/html"]
    assert live["text/plain"].splitlines() == list(explorer.at(0.8).says)
    explorer._widget = None
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert explorer._repr_mimebundle_() == {k: v for k, v in live.items() if "widget" not in k}
    with pytest.raises(RequestError, match=r"pip install sfumato\[notebook\]"):
        explorer.widget  # noqa: B018


def test_a_saved_notebook_shows_the_picture_where_no_widget_runs(explorer: Explorer) -> None:
    """What nbviewer does with a notebook that JupyterLab saved: it has the output, and not the widget's state."""
    export = pytest.importorskip("nbconvert", reason="nbconvert is not installed: pip install -e .[dev]")
    data = explorer._repr_mimebundle_()
    output = nbformat.v4.new_output("execute_result", data, execution_count=1)  # type: ignore[no-untyped-call]
    cell = nbformat.v4.new_code_cell("explorer", outputs=[output])  # type: ignore[no-untyped-call]
    notebook = nbformat.v4.new_notebook(cells=[cell])  # type: ignore[no-untyped-call]
    page, _ = export.HTMLExporter().from_notebook_node(notebook)
    assert data["image/jpeg"] in page
    assert str(data["application/vnd.jupyter.widget-view+json"]["model_id"]) not in page


def test_wrong_requests(pair: tuple[Protected, Decoder], astronaut: np.ndarray) -> None:
    with pytest.raises(AlphaError):
        explore(*pair[:1], astronaut, alpha=1.0)
    with pytest.raises(RequestError, match="2 photographs of 2 sizes"):
        show({"a": astronaut, "b": astronaut[:9]})
    with pytest.raises(RequestError, match="one photograph or more"):
        show({})


def test_photographs_side_by_side(astronaut: np.ndarray) -> None:
    shown = show({"a": astronaut, "b": astronaut})
    one = decoded(show({"a": astronaut})._repr_jpeg_())
    assert decoded(shown._repr_jpeg_()).shape == (one.shape[0], 2 * one.shape[1], 3)
    middle = one[40:-8, 8:-8].astype(float).mean((0, 1))
    assert np.abs(middle - astronaut.astype(float).mean((0, 1))).max() < 6


def test_a_task_without_boxes_is_refused(pair: tuple[Protected, Decoder], astronaut: np.ndarray) -> None:
    from copy import copy

    from sfumato.tasks.classification import Classification

    other = copy(pair[0])
    other.task = Classification()
    other.reference = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    with pytest.raises(RequestError, match="a task that finds boxes"):
        explore(other, cv2.resize(astronaut, (256, 256)))
