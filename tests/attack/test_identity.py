from pathlib import Path

import cv2
import numpy as np
import pytest

from sfumato.attack.attributes import Probes
from sfumato.attack.base import Clean, Effort, Prey, Releases
from sfumato.attack.identity import Linkage
from sfumato.attack.recogniser import Recogniser, verification
from sfumato.core.errors import RequestError
from sfumato.datasets import images
from tests.attack.prey import EFFORT, prey, protected

LONG = Effort(steps=150, batch=16, tested=100, quiet=True)


def test_verification_by_hand() -> None:
    unit = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], float)
    figures = verification(unit, np.array([0, 0, 1, 1]))
    assert figures == {"auc": 1.0, "tar at far 1e-2": 1.0, "tar at far 1e-3": 1.0, "rank-1": 1.0}
    figures = verification(unit, np.array([0, 1, 0, 1]))
    assert figures["auc"] == pytest.approx(0.25) and figures["rank-1"] == 0 and figures["tar at far 1e-2"] == 0


def test_verification_of_chance() -> None:
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((600, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    figures = verification(vectors, np.arange(600) // 6)
    assert figures["auc"] == pytest.approx(0.5, abs=0.03) and figures["tar at far 1e-2"] == pytest.approx(
        0.01, abs=0.01
    )


@pytest.mark.parametrize("people", [[0, 1, 2], [0, 0, 0]])
def test_nothing_to_verify(people: list[int]) -> None:
    assert verification(np.eye(3), np.array(people)) == {}


def test_linkage_finds_people_it_never_saw_and_chance_where_nothing_is_sent() -> None:
    guarded = protected(c_ref=6.0)
    hunted = prey(guarded, count=400)
    clean = Linkage(width=32).attack(hunted, Clean(), LONG)
    hidden = Linkage(width=32).attack(hunted, Releases(guarded, 0.999), LONG)
    assert clean.figures["auc"] > 0.85
    assert hidden.figures["auc"] < 0.6
    assert len(clean.curve) > 3


@pytest.mark.parametrize(("middle", "scene"), [(True, False), (False, True)])
def test_linkage_tells_a_face_in_the_middle_from_the_scene_around_it(middle: bool, scene: bool) -> None:
    draw = np.random.default_rng(0)
    people = np.repeat(np.arange(60), 4)
    z = draw.standard_normal((240, 3, 8, 8)).astype(np.float16)
    known = draw.standard_normal((60, 3, 8, 8)).astype(np.float16)[people]
    inside = np.zeros((8, 8), bool)
    inside[2:6, 2:6] = True
    where = inside if middle else ~inside
    z[..., where] = known[..., where] + 0.1 * z[..., where]
    train, test = np.arange(168), np.arange(168, 240)
    hunted = Prey(z, np.zeros((240, 16, 16, 3), np.uint8), people, train, test)
    found = Linkage(width=8).attack(hunted, Clean(), Effort(steps=4, batch=8, tested=72, quiet=True)).figures
    assert found["auc"] > 0.75
    assert (found["auc without the middle"] > 0.75) == scene


def test_linkage_needs_people() -> None:
    hunted = prey(protected())
    unknown = Prey(hunted.z, hunted.pictures, None, hunted.train, hunted.test)
    assert "who is who" in str(Linkage().missing(unknown)) and Linkage().missing(hunted) is None


def test_probes_guess_what_is_there_to_guess() -> None:
    guarded = protected(c_ref=6.0)
    hunted = prey(guarded)
    clean = Probes().attack(hunted, Clean(), LONG)
    hidden = Probes().attack(hunted, Releases(guarded, 0.999), EFFORT)
    assert clean.figures["light"] > 0.85 and clean.anchors == {"light": 0.5}
    assert hidden.figures["light"] < 0.7
    assert "no attributes" in str(Probes().missing(Prey(hunted.z, hunted.pictures, None, hunted.train, hunted.test)))


def test_a_recogniser_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        Recogniser(tmp_path / "none.onnx")


def test_a_real_recogniser_knows_people_again(data_root: Path) -> None:
    model = data_root / "weights" / "MobileFaceNet.onnx"
    folders = (
        [] if not model.exists() else sorted(p for p in (data_root / "lfw").iterdir() if len(list(p.iterdir())) > 3)
    )
    if not folders:
        pytest.skip("no MobileFaceNet.onnx or LFW in the data folder (see docs/data-and-weights.md)")
    paths = [path for place in folders[:8] for path in sorted(place.iterdir())[:4]]
    shown = np.stack([cv2.resize(images.read(path), (128, 128), interpolation=cv2.INTER_AREA) for path in paths])
    unit = Recogniser(model).embed(shown)
    assert unit.shape == (32, 128) and np.allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-5)
    assert verification(unit, np.repeat(np.arange(8), 4))["auc"] > 0.9
