"""A whole audit of a tiny model on pictures of colours: what it finds, keeps, resumes and writes."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from sfumato.attack.base import Effort
from sfumato.attack.reconstruction import Reconstruction
from sfumato.auditing import prey as records
from sfumato.auditing import run
from sfumato.auditing.report import html
from sfumato.auditing.run import Audit, audit
from sfumato.auditing.verdict import Verdict
from sfumato.core.errors import DatasetError, ImageError, RequestError
from sfumato.core.restorer import Restorer
from sfumato.outside.model import Outside
from sfumato.trusted.protect import Protected
from tests.attack.prey import DIGEST, SIDE, pictures
from tests.attack.prey import protected as easy

PEOPLE, EACH = 40, 3


class Off:
    """A planted leak: no noise at all."""

    def normals(self, count: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(count, *shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("people")
    people = np.repeat(np.arange(PEOPLE), EACH)
    for number, (person, picture) in enumerate(zip(people, pictures(people), strict=True)):
        (place / f"p{person}").mkdir(exist_ok=True)
        cv2.imwrite(str(place / f"p{person}" / f"{number}.png"), picture)
    return place


@pytest.fixture(scope="module")
def protected() -> Protected:
    made = easy(c_ref=6.0)
    torch.manual_seed(1)
    tail = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)).eval()
    made.outside, made.reference = Outside(Restorer(made.obfuscator.shape), tail, DIGEST), tail
    return made


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    effort = Effort(steps=8, batch=8, tested=40, quiet=True)
    monkeypatch.setattr(records, "PICTURE", 32)
    for name, budget in run.BUDGETS.items():
        monkeypatch.setitem(run.BUDGETS, name, replace(budget, effort=effort, repeats=(2,), certified=2))


def audited(protected: Protected, folder: Path, work: Path, **more) -> Audit:  # type: ignore[no-untyped-def]
    return audit(protected, folder, alphas=(0.8,), work=work, size=SIDE, quiet=True, **more)


def test_an_audit_is_complete_resumes_and_can_be_read(
    protected: Protected, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = audited(protected, folder, tmp_path, budget="full")
    assert {o.attacker for o in result.against(0.8)} >= {
        "noise reuse", "learned decoder", "identity linkage", "averaging", "inversion",
    }  # fmt: skip
    assert {o.tap for o in result.outcomes} == {
        "clean head output", "sfumato", "plain noise", "blurred input", "pixelated input",
    }  # fmt: skip
    compared = result.compared(0.8)
    assert set(compared) == {"sfumato", "plain noise", "blurred input", "pixelated input"}
    assert all(set(figures) >= {"auc", "psnr"} for figures in compared.values())
    assert result.left_out == {"attributes": "the data comes with no attributes"}
    assert result.conditions["people"] == PEOPLE and result.conditions["records"] == PEOPLE * EACH
    assert result.verdict(0.8) is not Verdict.BROKEN
    saved = json.loads(json.dumps(result.as_dict()))
    assert saved["verdicts"]["0.8"]["verdict"] == result.verdict(0.8).name

    monkeypatch.setattr(Reconstruction, "attack", None)  # nothing of this may be done again
    again = audited(protected, folder, tmp_path, budget="full")
    kept, fresh = (
        [o.figures for o in audit.outcomes if o.attacker != "noise reuse"] for audit in (again, result)
    )  # the noise is looked at every time
    assert kept == fresh
    assert again.utility == result.utility  # noisy: measured again, every baseline would be attacked anew

    again.to_html(tmp_path / "audit.html")
    page = (tmp_path / "audit.html").read_text()
    assert "Against baselines at the same utility" in page
    assert str(result.verdict(0.8)) in page and "identity linkage" in page and page.count("<svg") == 3
    assert "left out" in page and not any(f'{word}="http' in page for word in ("src", "href", "xlink:href"))
    assert html(again, keep_pictures=True).count("data:image") > page.count("data:image")

    shown = again._repr_html_()
    assert f"<td>0.8</td><td>{again.verdict(0.8)}</td>" in shown and "data:image" not in shown
    for outcome in again.outcomes:
        assert all(f"<td>{name}</td><td>{value:.3f}</td>" in shown for name, value in outcome.figures.items())


def test_the_report_leaves_a_notebook_s_figures_alone() -> None:
    code = "import matplotlib; matplotlib.use('svg'); import sfumato.auditing.report; print(matplotlib.get_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "svg"


def test_a_budget_of_one_s_own(protected: Protected, folder: Path, tmp_path: Path) -> None:
    own = replace(
        run.QUICKLY, name="own", records=PEOPLE * EACH - 10, effort=Effort(4, 8, 20, quiet=True), repeats=(3,)
    )
    result = audited(protected, folder, tmp_path, budget=own)
    assert (result.conditions["budget"], result.conditions["records"]) == ("own", PEOPLE * EACH - 10)
    assert any("psnr of 3" in o.figures for o in result.outcomes)


def test_a_planted_leak_breaks_the_verdict(protected: Protected, folder: Path, tmp_path: Path) -> None:
    result = audited(protected.with_noise(Off()), folder, tmp_path)
    assert result.verdict(0.8) is Verdict.BROKEN
    assert result.above({}), "and fails a gate even without limits"


def test_a_gate(protected: Protected, folder: Path, tmp_path: Path) -> None:
    result = audited(protected, folder, tmp_path)
    assert result.above({"auc": -1.0})[0].startswith("alpha 0.8: auc") and "tar" in result.above({"tar": -1.0})[0]
    chance = [replace(o, figures={"auc": 0.5}, anchors={"auc": 0.5}, curve=[]) for o in result.outcomes]
    rising = [replace(o, curve=[0.5, 0.6, 0.7, 0.8]) for o in chance]
    inconclusive = replace(result, outcomes=rising).above({"auc": 2.0})
    assert inconclusive == [f"alpha 0.8: {Verdict.INCONCLUSIVE}"], "attackers that were still improving pass no gate"
    strong = [replace(o, figures={"auc": 1.0, "psnr": 30.0}) if o.tap == "clean head output" else o for o in chance]
    assert replace(result, outcomes=strong).above({"auc": 2.0}) == []
    with pytest.raises(RequestError, match="not audited"):
        result.verdict(0.7)


def test_outcomes_of_other_noise_are_not_reused(protected: Protected, folder: Path, tmp_path: Path) -> None:
    assert audited(protected, folder, tmp_path).verdict(0.8) is not Verdict.BROKEN
    assert audited(protected.with_noise(Off()), folder, tmp_path).verdict(0.8) is Verdict.BROKEN


def test_wrong_requests(protected: Protected, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="budget 'huge'"):
        audited(protected, folder, tmp_path, budget="huge")
    with pytest.raises(RequestError, match="only the trusted side"):
        audited(easy(), folder, tmp_path)
    with pytest.raises(DatasetError, match="wanted: at least 100"):
        audited(protected, folder / "p0", tmp_path)


def test_people_attributes_and_limits_of_a_folder(folder: Path, tmp_path: Path) -> None:
    found = records.source(folder)
    assert found.people is not None and len(np.unique(found.people)) == PEOPLE and found.attributes == {}
    fewer = records.source(folder, limit=101)
    assert len(fewer.paths) == 101 and fewer.digest != found.digest
    rows = [p.relative_to(folder).as_posix() for p in found.paths]
    try:
        (folder / records.ATTRIBUTES).write_text("file,warm\n" + "".join(f"{r},{i % 2}\n" for i, r in enumerate(rows)))
        assert records.source(folder).attributes["warm"].tolist()[:3] == ["0", "1", "0"]
        (folder / records.ATTRIBUTES).write_text("file,warm\nother.png,1\n")
        with pytest.raises(DatasetError, match="no row for 120 of 120"):
            records.source(folder)
    finally:
        (folder / records.ATTRIBUTES).unlink()


def test_an_error_does_not_name_the_record(protected: Protected, folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "people"
    shutil.copytree(folder, copied)
    spoiled = sorted(copied.rglob("*.png"))[5]
    spoiled.write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"image 6 of 120 \(by name\)") as caught:
        audited(protected, copied, tmp_path / "work")
    assert spoiled.name not in str(caught.value) and f"{spoiled.parent.name}/" not in str(caught.value)


def test_the_cache_of_head_outputs_is_of_this_head(protected: Protected, folder: Path, tmp_path: Path) -> None:
    found = records.source(folder)
    first = records.build(protected, found, tmp_path, size=SIDE, quiet=True)
    dark = records.build(
        protected, found, tmp_path, size=SIDE, transform=lambda image: image // 2, called="dark", quiet=True
    )
    again = records.build(protected, found, tmp_path, size=SIDE, quiet=True)
    assert np.array_equal(first.z, again.z) and not np.array_equal(first.z, dark.z)
    assert np.array_equal(first.pictures, dark.pictures), "the picture to recover is the clear one"
