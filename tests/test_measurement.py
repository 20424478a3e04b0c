"""One run of the table: what it equals, what it repeats, what it takes up again after a stop."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from sfumato import facade
from sfumato.core.errors import DatasetError, ImageError, RequestError
from sfumato.datasets import fddb, images
from sfumato.datasets.fddb import Fddb
from sfumato.measurement import ALPHAS, TR_4928, Measurement, Seeded, measure
from sfumato.tasks.detection.boxes import KEEP, Detections
from sfumato.tasks.detection.precision import average_precision, fold_precision
from sfumato.tasks.detection.task import FaceDetection
from sfumato.trusted.protect import Protected
from tests.conftest import wire_bytes

if TYPE_CHECKING:
    from tests.conftest import Tiny

ARMS = (None, 0.4, 0.8)


@pytest.fixture(scope="module")
def task() -> FaceDetection:
    return FaceDetection(size=(256, 256))


@pytest.fixture(scope="module")
def protected(tiny: "Tiny", task: FaceDetection) -> Protected:
    return facade.load(tiny.folder, task=task, weights=tiny.weights)


@pytest.fixture(scope="module")
def frozen(tiny: "Tiny", task: FaceDetection) -> Protected:
    return facade.load(tiny.folder, task=task, weights=tiny.weights, tail="frozen")


@pytest.fixture
def data(tiny: "Tiny", tmp_path: Path) -> Fddb:
    """A set of this test's own, twenty photographs in ten folds."""
    return fddb.load(shutil.copytree(tiny.dataset, tmp_path / "set"))


@pytest.fixture(scope="module")
def whole(tiny: "Tiny", protected: Protected) -> Measurement:
    return measure(protected, fddb.load(tiny.dataset), alphas=ARMS, quiet=True)


def figures(result: Measurement) -> list[tuple[object, ...]]:
    """All of a run that noise moves; samples too, so that intervals and drops are the same as well."""
    return [
        (arm.alpha, arm.seed, arm.detected, arm.convention, arm.detected.samples.tobytes(), arm.bits_per_site)
        for arm in result.arms
    ]


def test_a_notebook_shows_every_arm(whole: Measurement) -> None:
    shown = whole._repr_html_()
    for arm in whole.arms:
        assert f"<td>{'clean' if arm.alpha is None else f'{arm.alpha:g}'}</td>" in shown
        assert f"<td>{arm.detected.mean:.4f} [{arm.detected.low:.4f}, {arm.detected.high:.4f}]</td>" in shown
    assert f"{whole.images} images, {whole.faces} faces; 95 % intervals" in shown


def test_one_photograph_a_fold_gives_no_interval(tiny: "Tiny", protected: Protected) -> None:
    shown = measure(protected, fddb.load(tiny.dataset), alphas=(None, 0.8), limit=1, quiet=True)._repr_html_()
    assert "gives no interval" in shown and "[" not in shown


def test_the_clean_arm_is_the_model_itself(whole: Measurement, tiny: "Tiny", data: Fddb, task: FaceDetection) -> None:
    model = facade.detector(tiny.weights)
    for fold, ap in zip(data.folds, whole.arms[0].detected.folds, strict=True):
        found = []
        for entry in fold:
            image = images.read(entry.path)
            with torch.inference_mode():
                loc, conf = model(task.preprocess(image)[None])
            found.append(task.postprocess((loc[0], conf[0]), image.shape[:2]))
        assert ap == pytest.approx(average_precision(found, [entry.boxes for entry in fold]), abs=1e-9)
    assert max(whole.arms[0].detected.folds) > 0


def by_hand(protected: Protected, data: Fddb, alpha: float, seed: int) -> list[list[Detections]]:
    """Release, outside, postprocess: one photograph at a time, by the steps a user takes."""
    assert protected.outside is not None
    folds = []
    for number, fold in enumerate(data.folds, start=1):
        found = []
        for index, entry in enumerate(fold):
            image = images.read(entry.path)
            noise = Seeded(seed, number, index, round(alpha * 10_000))
            release = protected.with_noise(noise)(image, alpha=alpha)
            found.append(protected.postprocess(protected.outside(release), image.shape[:2]))
        folds.append(found)
    return folds


def test_an_obfuscated_arm_is_release_and_outside_under_the_clean_arm_s_rule(
    whole: Measurement, protected: Protected, data: Fddb
) -> None:
    found = by_hand(protected, data, 0.8, 0)
    scores = np.concatenate([one.scores for fold in found for one in fold])
    assert KEEP < scores.min() < KEEP + 0.05
    truths = [[entry.boxes for entry in fold] for fold in data.folds]
    expected = fold_precision(found, truths)
    assert whole.arms[2].alpha == 0.8
    assert whole.arms[2].detected.folds == pytest.approx(expected.folds, abs=1e-9)


def test_figures_of_a_row(whole: Measurement, protected: Protected) -> None:
    assert (whole.images, whole.faces, whole.folds) == (20, 27, tuple(range(1, 11)))
    clean, low, high = whole.arms
    assert whole.clean is clean
    assert clean.bits_per_site == float("inf")
    assert clean.release_bytes == 128 * 8 * 8 * 4
    assert low.bits_per_site == pytest.approx(0.6 * protected.obfuscator.shape.c_ref, rel=1e-5)
    assert high.bits_per_site == pytest.approx(0.2 * protected.obfuscator.shape.c_ref, rel=1e-5)
    assert high.release_bytes == wire_bytes(protected, 0.8, 1)
    assert whole.drop(clean) is None
    drop = whole.drop(high)
    assert drop is not None
    assert drop[0] == pytest.approx(clean.detected.mean - high.detected.mean)
    assert drop[1] <= drop[0] <= drop[2]
    row = whole.as_dict()["rows"][2]
    assert (row["alpha"], row["seed"], row["tr_4928_ap"]) == (0.8, 0, TR_4928[0.8])


def test_the_report_s_table_is_whole() -> None:
    assert set(TR_4928) == {None, *ALPHAS}
    assert TR_4928[None] == max(TR_4928.values())


def test_a_seed_repeats_and_another_does_not(whole: Measurement, protected: Protected, data: Fddb) -> None:
    again = measure(protected, data, alphas=(0.8,), seeds=(0, 1, None), workers=1, quiet=True)
    assert [arm.seed for arm in again.arms] == [0, 1, None]
    assert again.arms[0].detected.samples.tobytes() == whole.arms[2].detected.samples.tobytes()
    assert len({arm.detected.samples.tobytes() for arm in again.arms}) == 3
    fresh = measure(protected, data, alphas=(0.8,), seeds=(None,), quiet=True)
    assert fresh.arms[0].detected.samples.tobytes() != again.arms[2].detected.samples.tobytes()


def test_folds_and_limit_take_a_part(whole: Measurement, protected: Protected, data: Fddb) -> None:
    part = measure(protected, data, alphas=ARMS, folds=(9, 2, 9), quiet=True)
    assert (part.folds, part.images) == ((2, 9), 4)
    for arm, all_of_it in zip(part.arms, whole.arms, strict=True):
        assert arm.detected.folds == (all_of_it.detected.folds[1], all_of_it.detected.folds[8])
    first = measure(protected, data, alphas=(None,), folds=(9,), limit=1, quiet=True)
    assert first.images == 1
    assert first.arms[0].convention == first.arms[0].detected  # one fold has no others to take a rule from


@pytest.mark.parametrize("part", [{"folds": (11,)}, {"folds": (0,)}, {"limit": 0}])
def test_parts_that_are_not_there(protected: Protected, data: Fddb, part: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=r"fold|limit"):
        measure(protected, data, quiet=True, **part)  # type: ignore[arg-type]


def test_a_fold_without_faces_has_no_precision(protected: Protected, data: Fddb) -> None:
    (data.root / "FDDB-folds/FDDB-fold-03-ellipseList.txt").write_text("sampler/img_0003\n0\n")
    with pytest.raises(DatasetError, match="no face in fold 3"):
        measure(protected, fddb.load(data.root), quiet=True)


def test_one_side_alone_measures_nothing(protected: Protected, data: Fddb) -> None:
    with pytest.raises(RequestError, match="only the trusted side"):
        measure(Protected(protected.head, protected.obfuscator, protected.task, protected.digest), data, quiet=True)


def stop_at_fold_six(protected: Protected, data: Fddb, work: Path) -> None:
    """A run that ends at a photograph of fold 6 it cannot read; the photograph is whole again afterwards."""
    photo = data.folds[5][1].path
    kept = photo.read_bytes()
    photo.write_bytes(kept[:500])
    with pytest.raises(ImageError, match="img_0016"):
        measure(protected, data, alphas=ARMS, work=work, quiet=True)
    photo.write_bytes(kept)


def test_a_run_that_was_stopped_goes_on_to_the_same_figures(
    whole: Measurement, protected: Protected, data: Fddb, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    stop_at_fold_six(protected, data, work)
    done = {arm.name: sorted(path.name for path in arm.iterdir()) for arm in next(work.iterdir()).iterdir()}
    names = ("clean", "alpha-0.4-seed-0", "alpha-0.8-seed-0")
    assert done == {name: [f"fold-{n:02d}.npz" for n in range(1, 6)] for name in names}
    for entry in data.folds[0]:
        entry.path.write_bytes(b"what is done is not read again")
    # ... but for one photograph, which tells the size of a release
    shutil.copy(data.folds[1][0].path, data.folds[0][0].path)
    result = measure(protected, data, alphas=ARMS, work=work, quiet=True)
    assert figures(result) == figures(whole)
    assert not list(work.iterdir())


def test_arms_measured_apart_add_up_to_the_run(
    whole: Measurement, protected: Protected, data: Fddb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    for alpha in ARMS:
        measure(protected, data, alphas=(alpha,), work=work, keep=True, quiet=True)
    capsys.readouterr()
    result = measure(protected, data, alphas=ARMS, work=work, keep=True)
    assert figures(result) == figures(whole)
    assert [result.drop(arm) for arm in result.arms] == [whole.drop(arm) for arm in whole.arms]
    assert "0it" in capsys.readouterr().err  # nothing was left to detect


def test_what_is_kept_of_a_photograph_goes_with_it(protected: Protected, data: Fddb, tmp_path: Path) -> None:
    work = tmp_path / "work"
    measure(protected, data, alphas=(None,), work=work, keep=True, quiet=True)
    shutil.copy(data.folds[1][0].path, data.folds[0][0].path)
    again = measure(protected, data, alphas=(None,), work=work, keep=True, quiet=True)
    assert figures(again) == figures(measure(protected, data, alphas=(None,), quiet=True))


def test_fresh_noise_is_not_kept(protected: Protected, data: Fddb, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="a seed"):
        measure(protected, data, alphas=(0.8,), seeds=(None,), work=tmp_path, keep=True, quiet=True)


def test_what_was_kept_serves_no_other_run(
    whole: Measurement, protected: Protected, frozen: Protected, data: Fddb, tiny: "Tiny", tmp_path: Path
) -> None:
    """Another server of the same client, another size, another set of the same names: each begins anew."""
    work = tmp_path / "work"
    stop_at_fold_six(protected, data, work)
    other = measure(frozen, data, alphas=ARMS, work=work, quiet=True)
    assert figures(other) == figures(measure(frozen, data, alphas=ARMS, quiet=True))
    assert figures(other)[0] == figures(whole)[0]
    assert figures(other)[2] != figures(whole)[2]
    small = facade.load(tiny.folder, task=FaceDetection(size=(192, 192)), weights=tiny.weights)
    assert figures(measure(small, data, alphas=ARMS, work=work, quiet=True)) != figures(whole)
    elsewhere = fddb.load(shutil.copytree(data.root, tmp_path / "elsewhere"))
    shutil.copy(elsewhere.folds[1][0].path, elsewhere.folds[0][0].path)
    assert figures(measure(protected, elsewhere, alphas=ARMS, work=work, quiet=True)) != figures(whole)


def test_progress_counts_what_is_left(
    protected: Protected, data: Fddb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at_fold_six(protected, data, tmp_path / "work")
    capsys.readouterr()
    measure(protected, data, alphas=ARMS, work=tmp_path / "work")
    said = capsys.readouterr().err
    assert "10/10" in said
    assert "Reading Predictions : 100%" in said
    assert "predicting ... : 100%" in said
