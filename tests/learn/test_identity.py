"""The adversary of identity: its ridge, what it looks at, whom it finds, what a fit unlearns because of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from sfumato.core import artefact
from sfumato.core.cut import Split, split
from sfumato.core.errors import RequestError
from sfumato.core.obfuscator import Obfuscator, Shape
from sfumato.core.task import Image, Outputs, Task, WithSubjects
from sfumato.facade import CLIENT, fit
from sfumato.learn import cache, identity
from sfumato.learn.fit import Settings
from sfumato.learn.identity import GRID, Adversary, Linear, Subjects, features, find, windows
from sfumato.tasks.classification import Classification
from sfumato.tasks.detection.task import FaceDetection

CPU = torch.device("cpu")


@pytest.mark.parametrize("keep", [1.0, 0.8])
def test_the_ridge_from_moments_is_the_ridge_of_all_rows(keep: float) -> None:
    """Rows of old steps weigh keep^age; r is beside the variance, so it does not grow with the rows."""
    torch.manual_seed(0)
    x = torch.randn(6, 20, 5) + 3
    t = torch.randn(6, 20, 2) + x[..., :2]
    linear = Linear(5, 2)
    assert linear(x[0]).eq(0).all(), "it knows nothing yet"
    for rows, wanted in zip(x, t, strict=True):
        linear.see(rows, wanted, keep)
    linear.solve(0.3)
    weights = np.repeat(keep ** np.arange(5, -1, -1), 20)
    flat, targets = x.flatten(0, 1).numpy(), t.flatten(0, 1).numpy()
    slow = Ridge(alpha=0.3 * weights.sum()).fit(flat, targets, sample_weight=weights)
    expected = slow.predict(flat) - np.average(targets, axis=0, weights=weights)
    assert linear(x.flatten(0, 1)).numpy() == pytest.approx(expected, abs=1e-3)


def test_how_loud_it_answers_is_what_it_explains() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 4)
    t = x[:, :3] + torch.randn(500, 3)
    t = t - t.mean(0)
    linear = Linear(4, 3)
    linear.see(x, t, 1.0)
    linear.solve(1e-6)
    answers = linear(x)
    explained = 1 - (t - answers).square().sum() / t.square().sum()
    assert float(answers.square().sum() / t.square().sum()) == pytest.approx(float(explained), abs=1e-3)


def test_windows_look_where_the_subject_is() -> None:
    y, x = torch.meshgrid(torch.arange(8) + 0.5, torch.arange(16) + 0.5, indexing="ij")
    shown = torch.stack([x, y])[None].expand(2, -1, -1, -1)
    places = torch.tensor([[0.5, 0.5, 0.375, 0.75], [0.25, 0.5, 0.1875, 0.375]])
    seen = windows(shown, places)
    assert seen.mean((2, 3)).flatten().tolist() == pytest.approx([8, 4, 4, 4], abs=1e-4)
    step = seen[:, 0, 0].diff(dim=1), seen[:, 1, :, 0].diff(dim=1)
    for along in step:
        assert torch.allclose(along, torch.tensor([[6.0], [3.0]]) / GRID, atol=1e-4), "as wide as the subject"


def test_windows_have_a_gradient() -> None:
    shown = torch.zeros(1, 2, 8, 8, requires_grad=True)
    windows(shown, torch.tensor([[0.25, 0.5, 0.4, 0.4]])).sum().backward()
    assert shown.grad is not None
    assert float(shown.grad[..., :5].sum()) == pytest.approx(2 * GRID**2, rel=1e-4)
    assert float(shown.grad[..., 5:].abs().sum()) == 0


def test_features_are_blind_to_a_channels_scale_and_level() -> None:
    torch.manual_seed(0)
    seen = torch.randn(4, 3, GRID, GRID)
    seen[:, 2] = 0.0
    scaled = seen * torch.tensor([5.0, 0.1, 1.0])[:, None, None] - 2
    assert torch.allclose(features(seen), features(scaled), atol=1e-4)
    assert features(seen).view(4, 3, -1)[:, 2].eq(0).all(), "a channel without bits says nothing"


@dataclass(frozen=True)
class Shown(Classification):
    """A classifier of pictures that show someone in their left half, someone small and someone cut off by the edge."""

    def views(self, record: Image, index: int) -> list[Image]:
        return [record, np.ascontiguousarray(record[:, ::-1])]

    def subjects(self, outputs: Outputs, size: tuple[int, int]) -> np.ndarray:
        return np.array([[4.0, 8.0, 20.0, 24.0], [24.0, 24.0, 28.0, 28.0], [24.0, 0.0, 40.0, 16.0]], np.float32)


TASK = Shown(mean=128.0, std=64.0)
SHAPE = {"k": 4, "c_ref": 32.0, "context": 4, "block": 2}
QUICK = Settings(steps=16, batch=2, validations=4, identity=5.0)


def colours(pictures: Sequence[Image]) -> np.ndarray:
    """A recogniser that knows people by their mean colour."""
    return np.stack([picture.mean((0, 1)) for picture in pictures])


def greys(pictures: Sequence[Image]) -> np.ndarray:
    return np.stack([picture.mean((0, 1))[::-1] ** 2 for picture in pictures])


def pictures(count: int = 30) -> list[Image]:
    draw = np.random.default_rng(0)
    made = draw.integers(0, 40, (count, 32, 32, 3), np.uint8)
    made[:, 8:24, 4:20] += draw.integers(0, 200, (count, 1, 1, 3), np.uint8)
    return list(made)


@pytest.fixture(scope="module")
def cut() -> Split:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)
    return split(nn.Sequential(*layers).eval(), at="1")


def cached(cut: Split, folder: Path, task: Task = TASK) -> cache.Cache:
    return cache.build(cut.head, task, pictures(), folder, key="k", device=CPU, quiet=True)


class Answers:
    """A recogniser that counts, and fails at a call."""

    def __init__(self, fail_at: int = 10**9) -> None:
        self.calls, self.fail_at = 0, fail_at

    def __call__(self, pictures: Sequence[Image]) -> np.ndarray:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return colours(pictures)


def test_subjects_are_found_in_every_view_and_recognised(cut: Split, tmp_path: Path) -> None:
    held = cached(cut, tmp_path)
    found = find(cut.tail, TASK, colours, pictures(), held, tmp_path, device=CPU, quiet=True)
    assert found.rows.tolist() == list(range(60)), "neither the small one nor the one cut off"
    assert np.allclose(found.places, [12 / 32, 0.5, 0.5, 0.5])
    plain = np.stack([record[8:24, 4:20].mean((0, 1)) for record in pictures()])
    mirrored = np.stack([record[8:24, 12:28].mean((0, 1)) for record in pictures()])
    wanted = np.stack([plain, mirrored], 1).reshape(60, 3)
    assert np.allclose(found.targets, wanted - wanted.mean(0), atol=0.5)


def test_finding_goes_on_after_a_kill(cut: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_FLUSH_EVERY", 8)
    held = cached(cut, tmp_path)

    def looked(recognise: Answers) -> Subjects:
        return find(cut.tail, TASK, recognise, pictures(), held, tmp_path, device=CPU, quiet=True)

    with pytest.raises(KeyboardInterrupt):
        looked(Answers(fail_at=40))
    again, finished = Answers(), Answers()
    resumed = looked(again)
    assert again.calls == 1 + 2 * (30 - 16), "of nineteen records sixteen were kept; one call tells recognisers apart"
    assert looked(finished).digest == resumed.digest
    assert finished.calls == 1
    fresh = find(cut.tail, TASK, colours, pictures(), held, tmp_path / "fresh", device=CPU, quiet=True)
    assert fresh.digest == resumed.digest
    other = find(cut.tail, TASK, greys, pictures(), held, tmp_path, device=CPU, quiet=True)
    assert other.digest != resumed.digest, "another recogniser starts anew"


def test_a_task_without_subjects_is_refused(cut: Split, tmp_path: Path) -> None:
    plain = Classification(mean=128.0, std=64.0)
    assert isinstance(TASK, WithSubjects)
    assert isinstance(FaceDetection(), WithSubjects)
    assert not isinstance(plain, WithSubjects)
    with pytest.raises(RequestError, match="does not say where subjects are"):
        fit(cut, pictures(), task=plain, out=tmp_path, recogniser=colours, device="cpu", quiet=True)


def test_a_planted_identity_is_unlearned_and_the_rest_is_not() -> None:
    """Four channels name the subject. The tail wants all eight; the adversary lets the other four through."""
    torch.manual_seed(0)
    n, shape = 240, Shape(channels=8, k=8, c_ref=64.0, context=4)
    names, other = torch.randn(n, 4), torch.randn(n, 4, 6, 6)
    z = torch.cat([names[:, :, None, None] + 0.3 * torch.randn(n, 4, 6, 6), other], 1)
    held = cache.Cache(z.numpy().astype(np.float16), None, 4, "d", 1)
    places = np.tile(np.array([0.5, 0.5, 0.9, 0.9], np.float32), (n, 1))
    known = Subjects(np.arange(n), places, (names - names.mean(0)).numpy(), "s")
    obfuscator = Obfuscator(shape)
    with torch.no_grad():
        obfuscator.linear.weight.copy_(torch.linalg.qr(torch.randn(8, 8)).Q[:, :, None, None])
    adversary = Adversary(known, held, np.arange(n), shape.k)
    tail = nn.Conv2d(shape.k, 8, 1)
    optimiser = torch.optim.Adam([*obfuscator.parameters(), *tail.parameters()], 1e-2)

    def told() -> tuple[float, float]:
        """What a line fitted to two thirds of the subjects explains of the others' names, and of the rest of a site."""
        alpha, draw = torch.full((n,), 0.8), torch.Generator().manual_seed(1)
        with torch.no_grad():
            y = obfuscator(z, alpha, torch.randn(n, *shape.codes((6, 6)), generator=draw))
            shown = obfuscator.estimate(y, alpha, (6, 6))
        x, t = features(windows(shown, torch.from_numpy(places))).numpy(), known.targets
        sites, rest = (v.transpose(0, 1).flatten(1).T.numpy() for v in (shown, other))
        names_told = Ridge(alpha=160.0).fit(x[:160], t[:160]).score(x[160:], t[160:])
        return float(names_told), float(Ridge(alpha=1.0).fit(sites, rest).score(sites, rest))

    before = told()
    for step in range(150):
        draw = torch.Generator().manual_seed(step)
        share, alpha = adversary(obfuscator, step, draw)
        rows = torch.randint(n, (32,), generator=draw)
        y = obfuscator(z[rows], alpha, torch.randn(32, *shape.codes((6, 6)), generator=draw))
        missed = (tail(obfuscator.estimate(y, alpha, (6, 6))) - z[rows]).square().mean()
        optimiser.zero_grad()
        (missed + 3 * share.mean()).backward()
        optimiser.step()
    after = told()
    assert before[0] > 0.6, "the plant is there to be found"
    assert after[0] < 0.3, "and is not found after training"
    assert after[1] > before[1]


class Interrupted(Shown):
    """A task during whose n-th step someone presses Ctrl-C."""

    def __init__(self, at: int) -> None:
        super().__init__(mean=128.0, std=64.0)
        object.__setattr__(self, "left", at)

    def __repr__(self) -> str:
        return repr(TASK)

    def distance(self, student: Outputs, teacher: Outputs) -> Tensor:
        object.__setattr__(self, "left", self.left - 1)  # type: ignore[attr-defined]
        if self.left == 0:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return super().distance(student, teacher)


def fitted(cut: Split, out: Path, task: Task = TASK, **more: object) -> dict[str, Tensor]:
    wanted = {"settings": QUICK, "recogniser": colours} | more
    fit(cut, pictures(), task=task, out=out, shape=SHAPE, device="cpu", quiet=True, **wanted)  # type: ignore[arg-type]
    return artefact.read(out / CLIENT, side="client")[1]


def test_a_fit_with_a_recogniser_resumes_to_the_same_tensors(cut: Split, tmp_path: Path) -> None:
    whole = fitted(cut, tmp_path / "whole")
    for at in (7, 4):  # the start asks for the distance too: once a batch of its sample
        with pytest.raises(KeyboardInterrupt):
            fitted(cut, tmp_path / "halved", Interrupted(at + (24 if at == 7 else 0)))
        assert (tmp_path / "halved" / "work" / "adapted" / "checkpoint.pt").exists()
    resumed = fitted(cut, tmp_path / "halved")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_without_a_recogniser_nothing_of_it_is_fitted(cut: Split, tmp_path: Path) -> None:
    known, plain = fitted(cut, tmp_path / "known"), fitted(cut, tmp_path / "plain", recogniser=None)
    weightless = fitted(cut, tmp_path / "none", settings=replace(QUICK, identity=0.0))
    assert all(torch.equal(plain[name], weightless[name]) for name in plain)
    assert any(not torch.equal(plain[name], known[name]) for name in plain)
    headers = [artefact.read(tmp_path / name / CLIENT, side="client")[0].fit for name in ("known", "plain")]
    assert [facts["identity"] for facts in headers] == [5.0, 0.0]
    assert not (tmp_path / "plain" / "work" / "subjects.npz").exists()


def test_another_recogniser_does_not_resume_a_checkpoint(cut: Split, tmp_path: Path) -> None:
    fitted(cut, tmp_path)
    with pytest.raises(RequestError, match="other settings or other data"):
        fitted(cut, tmp_path, recogniser=greys)
