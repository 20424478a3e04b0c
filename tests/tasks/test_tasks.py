"""Both tasks fill the protocol, and their losses and agreements mean what they say."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.core.errors import ImageError, RequestError
from sfumato.core.task import Task
from sfumato.facade import face_split
from sfumato.tasks.classification import Classification
from sfumato.tasks.detection.boxes import priors
from sfumato.tasks.detection.task import MEAN_BGR, FaceDetection

SIZE = (128, 128)
FACES = FaceDetection(size=SIZE)


def outputs(seed: int, records: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    anchors = len(priors(*SIZE))
    conf = torch.randn(records, anchors, 2, generator=generator)
    conf[..., 0] += 5
    conf[:, 7, 1] = 9.0
    return torch.randn(records, anchors, 4, generator=generator) * 0.1, conf


@pytest.mark.parametrize("task", [FACES, Classification()])
def test_tasks_fill_the_protocol(task: Task) -> None:
    assert isinstance(task, Task)
    picture = np.zeros((30, 40, 3), np.uint8)
    views = [len(task.views(picture, i)) for i in range(3)]
    assert len(set(views)) == 1
    assert task.preprocess(picture).dtype is torch.float32


def test_preprocessing_is_the_public_one() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    x = FACES.preprocess(picture)
    assert x.shape == (3, *SIZE)
    assert x[:, 5, 6].tolist() == pytest.approx([float(v) - m for v, m in zip(picture[5, 6], MEAN_BGR, strict=True)])
    assert FaceDetection(size=None).preprocess(picture[:50]).shape == (3, 50, 128)


def test_what_the_model_takes_is_a_picture_again() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (*SIZE, 3), np.uint8)
    x = FACES.preprocess(picture).numpy()
    assert np.array_equal(FACES.picture(x), picture)
    assert np.array_equal(FaceDetection(size=None).picture(x[:, :7]), picture[:7])
    wrong = [x + 0.5, x + 256, x - 256, x[:, :7], x[:2], x[None], x[:, :0]]
    wrong += [np.full_like(x, value) for value in (np.nan, np.inf)]
    for one in wrong:
        with pytest.raises(ImageError):
            FACES.picture(one)


def test_distance_is_zero_at_the_teacher_and_grows() -> None:
    teacher = outputs(0)
    assert FACES.distance(teacher, teacher).tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
    near = (teacher[0] + 0.1, teacher[1] + torch.tensor([0.0, 0.5]))
    far = (teacher[0] + 1.0, teacher[1] + torch.tensor([0.0, 3.0]))
    assert (FACES.distance(far, teacher) > FACES.distance(near, teacher)).all()
    assert (FACES.distance(near, teacher) > 0).all()


def test_an_anchor_counts_as_far_as_the_teacher_believes_in_it() -> None:
    loc, conf = torch.zeros(1, 2, 4), torch.tensor([[[0.0, -30.0], [0.0, math.log(0.1 / 0.9)]]])
    moved = loc.clone()
    moved[0, 0] = 5.0
    assert FACES.distance((moved, conf), (loc, conf)).item() == pytest.approx(0.0, abs=1e-5), "no box of background"
    moved[0, 1] = 5.0
    assert FACES.distance((moved, conf), (loc, conf)).item() == pytest.approx(0.1 * 4 * 4.5 / 1.1, rel=1e-4)
    # KL by hand between .1 and .5: of a detection that the score .5 would never show
    assert FACES.distance((loc, conf * torch.tensor([[[1.0], [0.0]]])), (loc, conf)).item() == pytest.approx(
        (0.1 * math.log(0.1 / 0.5) + 0.9 * math.log(0.9 / 0.5)) / 1.1, rel=1e-4
    )


def test_agreement_of_detectors() -> None:
    teacher = outputs(0)
    assert FACES.agreement(teacher, teacher) == pytest.approx(1.0)
    blind = (teacher[0], teacher[1] + torch.tensor([9.0, -9.0]))
    assert FACES.agreement(blind, teacher) == 0.0
    with pytest.raises(RequestError, match="finds no face"):
        FACES.agreement(teacher, blind)
    with pytest.raises(RequestError, match="input size"):
        FaceDetection(size=None).agreement(teacher, teacher)


def test_a_wrong_number_of_anchors_is_named() -> None:
    loc, conf = outputs(0)
    with pytest.raises(RequestError, match="anchors"):
        FACES.postprocess((loc[0, :-1], conf[0, :-1]), (10, 10))


def test_classification() -> None:
    task = Classification(mean=4.0, std=2.0, names=("no", "yes"))
    assert task.preprocess(np.full((3, 5), 8.0)).shape == (1, 3, 5)
    assert float(task.preprocess(np.full((3, 5), 8.0)).max()) == 2.0
    teacher, student = (torch.tensor([[0.0, 2.0], [2.0, 0.0]]),), (torch.tensor([[0.0, 1.0], [0.0, 1.0]]),)
    result = task.postprocess((teacher[0][0],), (3, 5))
    assert (result.label, result.name) == (1, "yes")
    assert result.probabilities.sum() == pytest.approx(1.0)
    assert task.agreement(student, teacher) == 0.5
    # KL(q || p) by hand for the second record: q = (.8808, .1192), p = (.2689, .7311)
    assert task.distance(student, teacher)[1].item() == pytest.approx(
        0.8808 * np.log(0.8808 / 0.2689) + 0.1192 * np.log(0.1192 / 0.7311), abs=1e-3
    )
    assert task.distance(teacher, teacher).tolist() == [0.0, 0.0]


def test_the_public_model_finds_the_astronaut(data_root: Path, astronaut: np.ndarray) -> None:
    cut, task = face_split(data_root / "weights" / "FaceBoxesProd.pth"), FaceDetection()
    with torch.no_grad():
        loc, conf = cut.tail(cut.head(task.preprocess(astronaut)[None]))
    found = task.postprocess((loc[0], conf[0]), astronaut.shape[:2]).above(0.5)
    assert len(found) == 1
    x1, y1, x2, y2 = found.boxes[0]
    assert 160 < x1 < 200 < 250 < x2 < 290
    assert 40 < y1 < 110 < 160 < y2 < 220
