"""`sfumato measure` and the script of TR-4928's job: what they print, write, refuse, and take up again."""

import csv
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import sfumato
from sfumato.measurement import TR_4928

if TYPE_CHECKING:
    from tests.conftest import Ran, Tiny

ROOT = Path(__file__).resolve().parents[2]
SRC = Path(sfumato.__file__).resolve().parents[1]
SCRIPT = ROOT / "deploy" / "run-accuracy-measurement.py"
MAIN = "from sfumato.cli.app import main; main()"
Cli = Callable[..., "Ran"]


@pytest.fixture
def measure(cli: Cli, tiny: "Tiny") -> Cli:
    def run(*words: object) -> "Ran":
        return cli("measure", "--dataset", tiny.dataset, *tiny.options, "--device", "cpu", *words)

    return run


def block(out: str) -> list[str]:
    """The lines of TR-4928's log, checked for their shape."""
    lines = out.splitlines()
    start = lines.index("==================== Results ====================")
    found = lines[start + 1 : start + 13]
    for number, line in enumerate(found[:10], start=1):
        name, _, value = line.partition(" Val AP: ")
        assert name == f"FDDB-fold-{number}"
        assert 0 <= float(value) <= 1
    mean = sum(float(line.rpartition(" ")[2]) for line in found[:10]) / 10
    assert found[10].startswith("FDDB Dataset Average AP: ")
    assert float(found[10].rpartition(" ")[2]) == pytest.approx(mean)
    assert found[11] == "mAP: " + found[10].rpartition(" ")[2]
    return found


def test_the_clean_run_prints_the_report_s_log(measure: Cli) -> None:
    ran = measure()
    assert ran.code == 0, ran.err
    block(ran.out)
    assert "Reading Predictions : 100%" in ran.err
    assert "embedded sampler, NOT FDDB; 20 images, 27 faces" in ran.out
    assert "score > 0.05, NMS at IoU 0.3, the same for every arm" in ran.out
    assert "tail: none" in ran.out


def test_noisy_alpha_and_both_are_the_same_run(measure: Cli) -> None:
    both = measure("--alpha", "0.8", "--noisy", "--quiet")
    assert both.err == ""
    assert "tail: adapted" in both.out
    assert "noise: seed 0" in both.out
    expected = block(both.out)
    assert block(measure("--noisy").out) == block(measure("--alpha", "0.8").out) == expected
    assert block(measure("--alpha", "0.8", "--tail", "frozen").out) != expected
    assert block(measure("--alpha", "0.8", "--seeds", "7").out) != expected
    assert block(measure().out) != expected


def test_the_script_takes_the_report_s_arguments(
    measure: Cli, tiny: "Tiny", monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = block(measure("--alpha", "0.8", "--noisy").out)
    monkeypatch.setenv("SFUMATO_ARTEFACTS", str(tiny.folder))
    monkeypatch.setenv("SFUMATO_WEIGHTS", str(tiny.weights))
    words = [str(SCRIPT), "--dataset", str(tiny.dataset), "--alpha", "0.8", "--noisy", "--size", "256"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert left.value.code == 0
    assert block(capsys.readouterr().out) == expected


def test_the_command_line_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = runpy.run_path(str(SCRIPT))["arguments"]
    monkeypatch.delenv("SFUMATO_WEIGHTS", raising=False)
    monkeypatch.setenv("SFUMATO_ARTEFACTS", "mine")
    assert arguments(["--dataset", "D"]) == ["measure", "--dataset", "D", "--artefacts", "mine"]
    assert arguments(["--artefacts", "given"]) == ["measure", "--artefacts", "given"]
    assert arguments(["--artefacts=given"]) == ["measure", "--artefacts=given"]


def test_a_sweep_is_the_report_s_table(measure: Cli, tmp_path: Path) -> None:
    ran = measure("--sweep", "--json", tmp_path / "new" / "all.json", "--csv", tmp_path / "all.csv")
    assert ran.code == 0, ran.err
    rows = [line.split() for line in ran.out.splitlines()]
    names = ["clean", "0.05", "0.1", "0.2", "0.4", "0.6", "0.8", "0.9", "0.95"]
    table = [row for row in rows if row and row[0] in names]
    assert [row[0] for row in table] == names
    for row, theirs in zip(table, TR_4928.values(), strict=True):
        assert f"{theirs:.4f}" in row
    assert table[6][-2:] == ["12.80", "1.7"]
    assert "+0.0496" in table[6]
    assert "NOT FDDB" in ran.out

    document: dict[str, Any] = json.loads((tmp_path / "new/all.json").read_text(), parse_constant=pytest.fail)
    assert document["facts"]["noise"] == "seed 0"
    assert len(document["facts"]["obfuscator"]) == 64
    assert [row["alpha"] for row in document["rows"]] == list(TR_4928)
    assert document["rows"][0]["bits_per_site"] is None
    with (tmp_path / "all.csv").open(encoding="utf-8") as text:
        lines = list(csv.DictReader(text))
    assert [line["alpha"] for line in lines] == ["", *names[1:]]
    for line, row in zip(lines, document["rows"], strict=True):
        assert float(line["ap"]) == row["ap"]
        assert float(line["fold_10"]) == row["folds"][9]
        assert line["drop"] == ("" if row["drop"] is None else str(row["drop"][0]))


def test_arms_apart_then_the_table_as_json_alone(measure: Cli, tmp_path: Path) -> None:
    work = ("--work", tmp_path / "work", "--quiet")
    assert measure("--sweep", "--alpha", "0.8", "--json", tmp_path / "all.json", "--quiet").code == 0
    assert measure(*work).code == 0
    assert measure("--alpha", "0.8", "--noisy", *work).code == 0
    ran = measure("--sweep", "--alpha", "0.8", "--json", "-", *work)
    assert ran.code == 0
    apart, at_once = json.loads(ran.out), json.loads((tmp_path / "all.json").read_text())
    assert apart["rows"] == at_once["rows"]
    assert apart["facts"] | {"seconds": 0} == at_once["facts"] | {"seconds": 0}
    assert measure("--fresh", "--noisy", *work).code == 2


def test_a_sweep_over_own_alphas_is_a_mean_over_seeds(measure: Cli, tmp_path: Path) -> None:
    ran = measure("--sweep", "--alpha", "0.3", "--seeds", "0,1", "--json", tmp_path / "all.json", "--quiet")
    assert ran.code == 0
    document = json.loads((tmp_path / "all.json").read_text())
    assert [(row["alpha"], row["seed"]) for row in document["rows"]] == [(None, None), (0.3, 0), (0.3, 1)]
    mean = math.fsum(row["ap"] for row in document["rows"][1:]) / 2
    (row,) = [line.split() for line in ran.out.splitlines() if line.split()[:1] == ["0.3"]]
    assert float(row[1]) == pytest.approx(mean, abs=6e-5)
    low, high = float(row[2].strip("[,")), float(row[3].strip("],"))
    assert low <= mean <= high
    assert "noise: seed 0, 1" in ran.out


def test_several_alphas_are_several_logs(measure: Cli) -> None:
    ran = measure("--alpha", "0.2", "--alpha", "0.9", "--alpha", "0.2", "--fresh", "--folds", "1,2", "--limit", "1")
    assert ran.code == 0, ran.err
    assert ran.out.count("=== Results ===") == 2
    assert "alpha 0.2, fresh noise" in ran.out
    assert "part of it, 2 of 20 images, folds 1, 2" in ran.out
    assert "FDDB-fold-3" not in ran.out


def half(tiny: "Tiny", tmp_path: Path) -> dict[str, Path]:
    """Sets with something amiss, by what the error must say."""
    sets = {name: shutil.copytree(tiny.dataset, tmp_path / name) for name in ("photo", "lists", "corrupt", "text")}
    sorted((sets["photo"] / "originalPics/sampler").iterdir())[0].unlink()
    shutil.rmtree(sets["lists"] / "FDDB-folds")
    for name, content in (("corrupt", b"\xff\xd8\xff\xe0 cut"), ("text", b"hello")):
        (sets[name] / "originalPics/sampler/img_0004.jpg").write_bytes(content)
    return {
        "1 of 20 images are missing": sets["photo"],
        "only originalPics": sets["lists"],
        "corrupt/originalPics/sampler/img_0004.jpg": sets["corrupt"],
        "text/originalPics/sampler/img_0004.jpg: not an image": sets["text"],
        "no such folder": tmp_path / "absent",
        "no FDDB in it": tmp_path,
    }


def test_data_with_something_amiss(cli: Cli, tiny: "Tiny", tmp_path: Path) -> None:
    for says, folder in half(tiny, tmp_path).items():
        ran = cli("measure", "--dataset", folder, *tiny.options, "--folds", "1,4", "--quiet")
        assert ran.code == 2, says
        assert says in ran.err
        assert ran.out == ""


@pytest.mark.parametrize(
    "words",
    [
        ("--alpha", "1"),
        ("--alpha=-0.1"),
        ("--alpha", "nan"),
        ("--alpha", "abc"),
        ("--alpha", "0.5", "--alpha", "inf"),
        ("--folds", "11"),
        ("--folds", "a"),
        ("--limit", "0"),
        ("--seeds", "-1"),
        ("--seeds", "1;2"),
        ("--size", "big"),
        ("--tail", "none"),
        ("--artefacts", "/nowhere"),
        ("--weights", "/nowhere"),
    ],
)
def test_wrong_requests_are_refused_before_the_work(measure: Cli, words: tuple[str, ...] | str) -> None:
    given = (words,) if isinstance(words, str) else words
    ran = measure(*given)
    assert ran.code == 2
    assert "%" not in ran.err
    assert "Traceback" not in ran.err


def test_a_result_without_a_place_is_refused_before_the_work(measure: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for option in ("--json", "--csv"):
        ran = measure(option, tmp_path / "file" / "result")
        assert ran.code == 2
        assert "cannot be written" in ran.err
        assert "%" not in ran.err


def test_without_a_cache_it_works_and_says_so(measure: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    ran = measure("--quiet", "--folds", "1")
    assert ran.code == 0
    assert "starts anew" in ran.err


def test_ctrl_c_and_the_same_command_goes_on(measure: Cli, tiny: "Tiny", tmp_path: Path) -> None:
    command = ["measure", "--dataset", str(tiny.dataset), *tiny.options, "--device", "cpu", "--sweep"]
    cache = tmp_path / "cache"  # the one of `cli`
    environment = {**os.environ, "PYTHONPATH": str(SRC), "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, *command, "--quiet"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as job:
        while job.poll() is None and not list(cache.rglob("fold-02.npz")):
            time.sleep(0.02)
        job.send_signal(signal.SIGINT)
        said = job.communicate()[1]
    assert job.returncode == 130, said
    assert "interrupted: the same command goes on" in said
    assert "Traceback" not in said
    arms = Counter(path.name for path in cache.rglob("fold-*.npz"))
    done = list(arms.values()).count(9)
    assert 0 < done < 10
    ran = measure("--sweep", "--json", tmp_path / "resumed.json")
    assert f"/{2 * (10 - done)} [" in ran.err
    assert not list(cache.rglob("fold-*.npz"))
    assert measure("--sweep", "--json", tmp_path / "whole.json").code == 0
    resumed, whole = (json.loads((tmp_path / name).read_text())["rows"] for name in ("resumed.json", "whole.json"))
    assert resumed == whole
