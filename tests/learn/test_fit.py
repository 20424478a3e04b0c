"""A small real model (digits), fitted, killed, resumed, frozen."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from sfumato.core import artefact
from sfumato.core.cut import Split, split
from sfumato.core.errors import ArtefactError, RequestError
from sfumato.facade import CLIENT, SERVERS, fit, load
from sfumato.learn.fit import Settings
from sfumato.tasks.classification import Classification

TASK = Classification(mean=8.0, std=8.0)
SHAPE = {"k": 16, "c_ref": 64.0, "context": 8}
QUICK = Settings(steps=60, batch=8, validations=4)


def digits() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    return x.reshape(-1, 8, 8), y


@pytest.fixture(scope="module")
def cut() -> Split:
    torch.manual_seed(0)
    x, y = digits()
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    inputs, labels = torch.stack([TASK.preprocess(record) for record in x]), torch.from_numpy(y)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(6):
        for rows in torch.randperm(1500, generator=torch.Generator().manual_seed(epoch)).split(50):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimiser.step()
    return split(model.eval(), at="2")


@pytest.fixture(scope="module")
def fitted(cut: Split, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fit")
    fit(cut, list(digits()[0][:400]), task=TASK, out=out, settings=QUICK, shape=SHAPE, device="cpu", quiet=True)
    return out


def accuracy(folder: Path, cut: Split, alpha: float, tail: str | None = None) -> float:
    x, y = digits()
    protected = load(folder, cut=cut, task=TASK, tail=tail)
    assert protected.outside is not None
    results = protected.postprocess(protected.outside(protected(list(x[1500:]), alpha=alpha)))
    return float(np.mean([r.label == label for r, label in zip(results, y[1500:], strict=True)]))


def test_a_fitted_classifier_still_classifies_and_less_as_alpha_rises(fitted: Path, cut: Split) -> None:
    low, high = accuracy(fitted, cut, 0.2), accuracy(fitted, cut, 0.97)
    assert low > 0.8
    assert high < low - 0.1


def test_a_frozen_server_keeps_the_client(fitted: Path, cut: Split) -> None:
    before = (fitted / CLIENT).read_bytes()
    frozen = Settings(tail="frozen", steps=20, batch=8, validations=2)
    fit(cut, list(digits()[0][:400]), task=TASK, out=fitted, settings=frozen, start=fitted, device="cpu", quiet=True)
    assert (fitted / CLIENT).read_bytes() == before
    header, state = artefact.read(fitted / SERVERS["frozen"], side="server")
    assert not any(name.startswith("tail.") for name in state)
    assert header.digest == artefact.read(fitted / CLIENT, side="client")[0].digest
    assert accuracy(fitted, cut, 0.2, tail="frozen") > 0.7


def test_the_model_itself_is_not_changed_by_a_fit(cut: Split, tmp_path: Path) -> None:
    before = cut.digest()
    fit(
        cut,
        list(digits()[0][:60]),
        task=TASK,
        out=tmp_path,
        settings=Settings(steps=4, batch=4, validations=2),
        shape=SHAPE,
        device="cpu",
        quiet=True,
    )
    assert cut.digest() == before
    assert all(p.requires_grad for p in cut.model.parameters())


def test_artefacts_of_another_model_are_refused(fitted: Path) -> None:
    other = split(
        nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()).eval(), at="2"
    )
    with pytest.raises(ArtefactError, match="of model"):
        load(fitted, cut=other, task=TASK)


def test_a_fit_stops_early_when_nothing_improves(cut: Split, tmp_path: Path) -> None:
    still = Settings(steps=40, batch=4, validations=20, patience=2, lr=1e-12, tail_lr=1e-12)
    fit(cut, list(digits()[0][:60]), task=TASK, out=tmp_path, settings=still, shape=SHAPE, device="cpu", quiet=True)
    assert artefact.read(tmp_path / CLIENT, side="client")[0].metrics["steps"] < 40


def test_the_average_that_ships_forgets_what_the_fit_began_from(fitted: Path, cut: Split, tmp_path: Path) -> None:
    records, still = list(digits()[0][:400]), Settings(steps=1, batch=8, validations=1, lr=1e-12, tail_lr=1e-12)
    fit(cut, records, task=TASK, out=tmp_path, settings=still, shape=SHAPE, device="cpu", quiet=True)
    began, saved = (torch.load(place / "work/adapted/checkpoint.pt", weights_only=True) for place in (tmp_path, fitted))
    name = "obfuscator.linear.weight"
    student, average = (saved[side][key] for side, key in (("student", name), ("average", f"module.{name}")))
    assert float((average - student).norm()) < 0.2 * float((student - began["student"][name]).norm())


def test_other_settings_do_not_resume_a_checkpoint(fitted: Path, cut: Split) -> None:
    with pytest.raises(RequestError, match="other settings"):
        fit(
            cut,
            list(digits()[0][:400]),
            task=TASK,
            out=fitted,
            settings=Settings(steps=61),
            shape=SHAPE,
            device="cpu",
            quiet=True,
        )


def test_a_fit_does_not_orphan_the_server_in_its_folder(fitted: Path, cut: Split, tmp_path: Path) -> None:
    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / SERVERS["adapted"]).write_bytes((fitted / SERVERS["adapted"]).read_bytes())
    with pytest.raises(RequestError, match="whose client this fit would replace"):
        fit(
            cut, list(digits()[0][:60]), task=TASK, out=lone, settings=Settings(tail="frozen"), device="cpu", quiet=True
        )


def test_no_records_is_a_clear_error(cut: Split, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no records"):
        fit(cut, [], task=TASK, out=tmp_path, device="cpu", quiet=True)


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from sklearn.datasets import load_digits
from torch import nn
from sfumato.core.cut import split
from sfumato.facade import fit
from sfumato.learn.fit import Settings
from sfumato.tasks.classification import Classification

torch.manual_seed(0)
layers = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)
model = nn.Sequential(*layers).eval()
records = list(load_digits(return_X_y=True)[0].reshape(-1, 8, 8)[:200])
fit(split(model, at="2"), records, task=Classification(mean=8.0, std=8.0), out=Path(sys.argv[1]), device="cpu",
    settings=Settings(steps=int(sys.argv[2]), batch=8, validations=20), shape={"k": 8, "c_ref": 32.0, "context": 4},
    quiet=True)
"""


def test_a_fit_killed_and_resumed_ends_with_the_same_tensors(tmp_path: Path) -> None:
    script = tmp_path / "fit.py"
    script.write_text(textwrap.dedent(SCRIPT))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps = "80"
    subprocess.run([sys.executable, script, whole, steps], check=True, timeout=250)
    job = subprocess.Popen([sys.executable, script, killed, steps])
    while not (killed / "work" / "adapted" / "checkpoint.pt").exists() and job.poll() is None:
        time.sleep(0.005)
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL, "the fit ended before it could be killed"
    assert not (killed / CLIENT).exists()
    subprocess.run([sys.executable, script, killed, steps], check=True, timeout=250)
    for name, side in ((CLIENT, "client"), (SERVERS["adapted"], "server")):
        one, two = (artefact.read(folder / name, side=side)[1] for folder in (whole, killed))
        assert all(torch.equal(one[key], two[key]) for key in one)
