"""Every notebook runs from its first cell to its last, and what it shows is so."""

import ast
import subprocess
import time
from pathlib import Path
from typing import Any

import cv2
import nbformat
import numpy as np
import pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def run(name: str, where: Path, **parameters: object) -> dict[str, Any]:
    """The value of the cell tagged `figures`, with these values in the cell tagged `parameters`."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)  # type: ignore[no-untyped-call]
    tagged = {tag: cell for cell in notebook.cells for tag in cell.metadata.get("tags", [])}
    tagged["parameters"].source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(where)}}).execute()
    found: dict[str, Any] = ast.literal_eval(tagged["figures"].outputs[-1]["data"]["text/plain"])
    return found


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_outputs_are_stripped(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.timeout(900)
def test_face_detection(tmp_path: Path) -> None:
    figures = run("01-face-detection.ipynb", tmp_path, COUNT=10)
    assert figures["size"] == [512, 512] and figures["activation"] == [1, 128, 32, 32]
    (clean,), (face,) = figures["clean"], figures["faces"]
    assert min(clean["score"], face["score"]) > 0.5
    assert all(abs(clean[side] - face[side]) < 20 for side in ("x1", "y1", "x2", "y2")), "one face, in one place"
    assert figures["bits"] == pytest.approx(0.2 * 64 * 32 * 32)
    ap = figures["ap"]
    assert ap[None] > 0.8 and ap[0.8] > ap[None] - 0.15 and ap[0.95] > 0.5
    (low, many), (_, few) = figures["views"][0.05], figures["views"][0.95]
    assert low == 1 and few < figures["nbytes"] < many < 524_288, "fewer bytes than the activation in fp32"


@pytest.mark.timeout(900)
def test_face_detection_in_one_s_own_photograph(tmp_path: Path, astronaut: np.ndarray) -> None:
    cv2.imwrite(str(tmp_path / "mine.png"), cv2.resize(astronaut, (300, 260)))
    figures = run("01-face-detection.ipynb", tmp_path, COUNT=10, PHOTOGRAPH="mine.png", ALPHA=0.4)
    assert figures["size"] == [260, 300] and len(figures["faces"]) == 1
    assert figures["bits"] == pytest.approx(0.6 * 64 * 32 * 32)


@pytest.mark.timeout(900)
def test_your_own_model(tmp_path: Path) -> None:
    figures = run("02-your-own-model.ipynb", tmp_path, STEPS=100, RECORDS=120, ATTACK_STEPS=4)
    assert figures["clean"] > 0.9
    assert figures["right"][0.2] > 0.85 and figures["right"][0.8] > 0.6, "ten classes: chance is .1"
    assert figures["right"][0.95] < figures["right"][0.2]
    assert figures["bits"] == pytest.approx({a: (1 - a) * 16 * 64 for a in (0.2, 0.5, 0.8, 0.95)})
    (clean, none), (released, _) = figures["decoder"]["clean head output"], figures["decoder"]["sfumato"]
    assert clean > none + 3, "an attacker that works"
    assert released < clean - 2
    assert (tmp_path / "your-own-model" / "audit.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.timeout(900)
def test_choose_alpha(tmp_path: Path) -> None:
    figures = run("03-choose-alpha.ipynb", tmp_path, COUNT=20, ATTACKED=4, CERTIFIED=2, PROBES=1)
    ap, bits, psnr = figures["ap"], figures["bits_per_site"], figures["psnr"]
    assert ap[None] > 0.8 and ap[0.05] > ap[0.95]
    assert bits == pytest.approx({a: 64 * (1 - a) for a in bits}, rel=1e-4)
    assert psnr[0.05] > psnr[0.8] > figures["mean_picture"] - 1, "the more is withheld, the less is recovered"
    for alpha, (whole, face, repeated, rate) in figures["certificates"].items():
        assert whole == pytest.approx(bits[alpha] * 1024, rel=1e-4)
        assert face < whole < repeated and 0 < rate <= whole
    far, chosen = figures["far_drop"], figures["chosen"]
    assert all(alpha is None or far[alpha] <= lost for lost, alpha in chosen.items())
    assert all(far[a] > lost for lost, alpha in chosen.items() for a in far if a > (alpha or 0)), "the highest"


@pytest.mark.timeout(900)
def test_attack_it(tmp_path: Path) -> None:
    figures = run("04-attack-it.ipynb", tmp_path, COUNT=110, STEPS=12)
    assert figures["clean"] > figures["none"] + 3, "an attacker that works"
    assert figures["released"] < figures["clean"] - 2, "and is held off"
    assert figures["averaged"] > figures["released"]
    assert figures["nearest"] < figures["clean"]


FIT = """
import numpy as np, torch, sfumato
from torch import nn
from sfumato.learn.fit import Settings, Trainer
from sfumato.tasks.classification import Classification
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 3)).eval()
records = list(np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8))
taken, step = 0, Trainer._train_step
def counted(self):
    global taken
    taken += 1
    return step(self)
Trainer._train_step = counted
def fit():
    settings = Settings(steps=150, batch=4, validations=30, patience=1000)
    return sfumato.fit(sfumato.split(model, at="1"), records, task=Classification(std=255.0), out="fitted",
                       settings=settings, device="cpu")
"""


@pytest.mark.timeout(300)
def test_an_interrupted_cell_goes_on_where_it_was(tmp_path: Path) -> None:
    manager, kernel = start_new_kernel(cwd=str(tmp_path))

    def value(code: str) -> Any:
        reply = kernel.execute_interactive(code, user_expressions={"v": "taken"}, output_hook=print, timeout=120)
        return reply["content"]

    try:
        assert value(FIT)["status"] == "ok"
        kernel.execute("fit()")
        checkpoint = tmp_path / "fitted" / "work" / "adapted" / "checkpoint.pt"
        for _ in range(600):
            if checkpoint.exists():
                break
            time.sleep(0.1)
        manager.interrupt_kernel()
        reply = kernel.get_shell_msg(timeout=60)["content"]
        assert (reply["status"], reply["ename"]) == ("error", "KeyboardInterrupt")
        before = int(value("")["user_expressions"]["v"]["data"]["text/plain"])
        done = value("protected = fit()")
        assert done["status"] == "ok"
        whole = int(done["user_expressions"]["v"]["data"]["text/plain"])
    finally:
        kernel.stop_channels()
        manager.shutdown_kernel(now=True)
    assert 0 < before < 150 <= whole <= 150 + 6, "at most what came after the last checkpoint is done again"
    assert (tmp_path / "fitted" / "server.safetensors").exists()


def test_the_image_of_the_workspace_copies_what_is_there() -> None:
    root = NOTEBOOKS.parent
    lines = (root / "deploy" / "jupyter" / "Containerfile").read_text().splitlines()
    copied = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    assert {"src", "notebooks", "pyproject.toml"} <= set(copied)
    assert all((root / source).exists() for source in copied)
    subprocess.run(["bash", "-n", root / "deploy" / "jupyter" / "notebooks.sh"], check=True)
