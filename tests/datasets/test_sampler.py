"""The composed set: FDDB's layout, faces where the lists say, the same bytes for a seed, nobody's folder spoilt."""

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from sfumato.core.errors import OutputError, RequestError
from sfumato.datasets import fddb, images, sampler


def digests(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_default_set_is_fddb_in_small(sampler_folder: Path) -> None:
    data = fddb.load(sampler_folder)
    assert [len(fold) for fold in data.folds] == [6] * 10
    assert all(sum(len(entry.boxes) for entry in fold) >= 6 for fold in data.folds)
    assert {len(entry.boxes) for entry in data} == {1, 2, 3}
    for entry in data:
        image = images.read(entry.path)
        assert image.shape == (sampler.HEIGHT, sampler.WIDTH, 3)
        assert image.std() > 15
        assert (entry.boxes[:, :2] > -8).all()
        assert (entry.boxes[:, 2:] < (sampler.WIDTH + 8, sampler.HEIGHT + 8)).all()
    heights = np.concatenate([entry.boxes[:, 3] - entry.boxes[:, 1] for entry in data])
    assert heights.min() > 24
    assert (heights < 45).any()
    assert (heights > 150).any()
    names = (sampler_folder / "FDDB-folds" / "FDDB-fold-01.txt").read_text(encoding="ascii").split()
    assert names == [entry.name for entry in data.folds[0]]


def test_the_note_says_what_it_is_and_from_where(sampler_folder: Path) -> None:
    note = (sampler_folder / "SAMPLER.md").read_text(encoding="utf-8")
    for word in ("60 composed images", "seed 0", "Not FDDB", "scikit-image", "scikit-learn", "Matplotlib", "CC BY 2.0"):
        assert word in note


def test_a_seed_fixes_every_byte_and_another_seed_none(tmp_path: Path) -> None:
    first = digests(sampler.compose(tmp_path / "a", images=12, seed=3))
    again = digests(sampler.compose(tmp_path / "deeper" / "b", images=12, seed=3))
    other = digests(sampler.compose(tmp_path / "c", images=12, seed=4))
    assert first == again
    pictures = [name for name in first if name.endswith(".jpg")]
    assert len(pictures) == 12
    assert all(first[name] != other[name] for name in pictures)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_set_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    root = sampler.compose(tmp_path / "a", images=10)
    stamp = (root / "SAMPLER.md").stat().st_mtime_ns
    assert sampler.compose(tmp_path / "a", images=10) == root
    assert (root / "SAMPLER.md").stat().st_mtime_ns == stamp
    with pytest.raises(OutputError, match="holds something else"):
        sampler.compose(root, images=10, seed=1)


def test_a_folder_with_anything_in_it_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(OutputError, match="holds something else"):
        sampler.compose(tmp_path, images=10)
    with pytest.raises(OutputError, match="holds something else"):
        sampler.compose(tmp_path / "thesis.txt", images=10)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("-", encoding="utf-8")
    with pytest.raises(OutputError, match="cannot be written"):
        sampler.compose(tmp_path / "file" / "below", images=10)


def test_ten_folds_need_ten_images(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="9 images for 10 folds"):
        sampler.compose(tmp_path / "a", images=9)


def white_face(size: tuple[int, int], face: tuple[float, ...]) -> np.ndarray:
    """A black picture [h, w, 3] with the face as a white ellipse."""
    major, minor, angle, cx, cy = face
    image = np.zeros((*size, 3), np.uint8)
    cv2.ellipse(image, ((cx, cy), (2 * major, 2 * minor), np.degrees(angle)), (255, 255, 255), -1)
    return image


def test_ellipses_follow_their_faces_through_every_kind_of_picture() -> None:
    black = (np.zeros((420, 640, 3), np.uint8),)
    people = tuple(
        sampler._person(white_face(size, face), outline, face)
        for size, outline, face in (
            ((512, 512), sampler.ASTRONAUT, sampler.ASTRONAUT_FACE),
            ((600, 512), sampler.HOPPER, sampler.HOPPER_FACE),
        )
    )
    subset = white_face((25, 25), sampler.SUBSET_FACE)[None, ..., 0] / 255.0
    sources = sampler.Sources(people, subset, black, black)
    for seed in range(40):
        image, faces = sampler.picture(sources, np.random.default_rng(seed))
        bright = image.mean(axis=2) > 128
        assert len(faces) >= 1
        inside = sampler._faces_mask(faces * [0.88, 0.88, 1, 1, 1]) > 0
        assert bright[inside].mean() > 0.97
        for face in faces:  # just beside it, and but for the prints' white border above and below, it is dark
            on_print = np.isclose(face[0] / face[1], sampler.SUBSET_FACE[0] / sampler.SUBSET_FACE[1])
            for far, near in (((0.8, 1.22), (1.0, 1.07)), ((1.22, 0.8), (1.07, 1.0)))[: 1 if on_print else 2]:
                outer, inner = (sampler._faces_mask(face[None] * [*f, 1, 1, 1]) > 0 for f in (far, near))
                assert bright[outer & ~inner].mean() < 0.25


def test_ellipses_under_a_turn_by_hand() -> None:
    # Turned by 90 degrees and doubled about the origin: (x, y) -> (-2 y, 2 x); a lying ellipse stands, twice as large.
    move = np.array([[0.0, -2.0, 0.0], [2.0, 0.0, 0.0]])
    moved = sampler._moved(np.array([[3.0, 2.0, 0.0, 10.0, 20.0]]), move)
    np.testing.assert_allclose(moved, [[6, 4, np.pi / 2, -40, 20]], atol=1e-12)
    mirror = np.array([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    moved = sampler._moved(np.array([[3.0, 2.0, 0.3, 10.0, 20.0], [3.0, 2.0, 1.5, 1.0, 1.0]]), mirror)
    np.testing.assert_allclose(moved, [[3, 2, -0.3, -10, 20], [3, 2, -1.5, -1, 1]], atol=1e-12)
