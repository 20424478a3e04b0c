"""`sfumato demo` on a command line: a page, its report, a table, and exit codes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def ran(cli: Callable[..., Any], tiny: Any, tmp_path: Path) -> Callable[..., Any]:
    return lambda *words: cli("demo", "--out", tmp_path / "demo", "--images", 10, *tiny.options, *words)


def test_it_prints_the_table_and_where_the_page_is(ran: Callable[..., Any], tmp_path: Path) -> None:
    code, out, err = ran("--quiet")
    assert (code, err) == (0, "")
    page = tmp_path / "demo" / "index.html"
    assert page.resolve().as_uri() in out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    rows = json.loads((tmp_path / "demo" / "demo.json").read_text(encoding="utf-8"))["table"]
    assert len(rows) == 9
    for row in rows:
        name = "clean" if row["alpha"] is None else f"{row['alpha']:g}"
        [line] = [line.split() for line in out.splitlines() if line.split()[:1] == [name]]
        assert line[1] == f"{row['ap']:.4f}"
        assert f"{row['release_bytes'] / 1000:.1f}" in line
    assert "NOT FDDB; 10 images" in out
    assert "not evidence" in out


def test_json_is_the_report(ran: Callable[..., Any], tmp_path: Path, tiny: Any) -> None:
    code, out, _ = ran("--json", "--seed", 2)
    report = json.loads(out)
    assert code == 0
    assert report == json.loads((tmp_path / "demo" / "demo.json").read_text(encoding="utf-8"))
    assert report["command"].endswith(
        f"--images 10 --seed 2 --artefacts {tiny.folder} --weights {tiny.weights} --size {tiny.size}"
    )


def test_wrong_requests_end_with_2_and_a_sentence(ran: Callable[..., Any], tmp_path: Path) -> None:
    for words, said in (
        (("--images", 9), "--images"),
        (("--seed", -1), "--seed"),
        (("--size", "huge"), "error: size huge"),
        (("--artefacts", tmp_path / "nowhere"), "error: "),
        (("--weights", tmp_path / "nowhere.pth"), "no such file"),
    ):
        code, out, err = ran(*words)
        assert (code, out) == (2, "")
        assert said in err
        assert "Traceback" not in err


def test_no_place_for_the_page_is_said_before_the_work(ran: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("-", encoding="utf-8")
    code, out, err = ran()
    assert (code, out) == (2, "")
    assert "cannot be written" in err


def test_help_has_an_example(cli: Callable[..., Any]) -> None:
    code, out, _ = cli("demo", "--help")
    assert code == 0
    assert "sfumato demo --out demo" in out
