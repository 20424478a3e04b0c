"""Every notebook runs from its first cell to its last, and what it shows is so."""

import ast
from pathlib import Path
from typing import Any

import nbformat
import pytest
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
def test_attack_it(tmp_path: Path) -> None:
    figures = run("04-attack-it.ipynb", tmp_path, COUNT=110, STEPS=12)
    assert figures["clean"] > figures["none"] + 3, "an attacker that works"
    assert figures["released"] < figures["clean"] - 2, "and is held off"
    assert figures["averaged"] > figures["released"]
    assert figures["nearest"] < figures["clean"]
