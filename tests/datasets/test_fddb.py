"""FDDB's layout: the ellipses' boxes, the whole set, and a set that is not whole."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.core.errors import DatasetError
from sfumato.datasets import fddb


def make(root: Path, entries: str = "2002/a/img_1\n1\n3 2 0 10 20  1\n", folds: int = 10) -> Path:
    """A set whose first fold lists `entries` and has the picture of img_1; the other folds are empty."""
    (root / "originalPics" / "2002" / "a").mkdir(parents=True)
    (root / "FDDB-folds").mkdir()
    (root / "originalPics" / "2002" / "a" / "img_1.jpg").write_bytes(b"-")
    for number in range(1, folds + 1):
        path = root / "FDDB-folds" / f"FDDB-fold-{number:02d}-ellipseList.txt"
        path.write_bytes(entries.encode("utf-8") if number == 1 else b"")
    return root


def test_boxes_of_ellipses_by_hand() -> None:
    # Half axes 3 and 2 at (10, 20). Lying (angle 0): 3 across, 2 down. Standing (90 degrees): the other way round.
    # At 45 degrees both half sides are sqrt((9 + 4) / 2) = 2.5495.
    given_ = np.array([[3, 2, 0, 10, 20], [3, 2, math.pi / 2, 10, 20], [3, 2, -math.pi / 4, 10, 20]])
    r = math.sqrt(6.5)
    expected: list[list[float]] = [[7, 18, 13, 22], [8, 17, 12, 23], [10 - r, 20 - r, 10 + r, 20 + r]]
    np.testing.assert_allclose(fddb.boxes(given_), expected, atol=1e-12)


@settings(deadline=None, derandomize=True)
@given(st.tuples(*[st.floats(1, 200)] * 2, st.floats(-math.pi, math.pi), *[st.floats(-50, 500)] * 2))
def test_the_box_is_tight_round_points_on_the_ellipse(ellipse: tuple[float, ...]) -> None:
    major, minor, angle, cx, cy = ellipse
    t = np.linspace(0, 2 * math.pi, 20_001)
    x = cx + major * np.cos(t) * math.cos(angle) - minor * np.sin(t) * math.sin(angle)
    y = cy + major * np.cos(t) * math.sin(angle) + minor * np.sin(t) * math.cos(angle)
    box = fddb.boxes(np.array([ellipse]))[0]
    np.testing.assert_allclose(box, [x.min(), y.min(), x.max(), y.max()], atol=1e-4)


@pytest.mark.parametrize("inside", ["", "fddb", "FDDB"])
def test_a_set_loads_from_its_folder_whatever_it_is_called_or_from_the_one_above(tmp_path: Path, inside: str) -> None:
    root = make(tmp_path / inside if inside else tmp_path / "my data")
    data = fddb.load(tmp_path if inside else str(root))
    assert data.root == root
    assert (data.images, data.faces, len(data.folds)) == (1, 1, 10)
    (entry,) = data
    assert entry.name == "2002/a/img_1"
    assert entry.path == root / "originalPics/2002/a/img_1.jpg"
    np.testing.assert_allclose(entry.boxes, [[7, 18, 13, 22]])
    assert entry.boxes.dtype == np.float64


def test_line_ends_blank_lines_and_faceless_entries_are_fine(tmp_path: Path) -> None:
    text = "2002/a/img_1 \r\n0\r\n\r\n2002/a/img_1\r\n2\r\n3 2 0 10 20 1\r\n3 2 0 30 20  1 \r\n\r\n"
    data = fddb.load(make(tmp_path, text))
    assert [len(entry.boxes) for entry in data] == [0, 2]
    assert [entry.boxes.shape for entry in data] == [(0, 4), (2, 4)]


def test_half_a_set_says_how_much_is_missing_and_what_first(tmp_path: Path) -> None:
    entries = "".join(f"2002/a/img_{n}\n1\n3 2 0 10 20  1\n" for n in (1, 2, 3))
    with pytest.raises(DatasetError, match=r"2 of 3 images are missing .* the first 2002/a/img_2.jpg"):
        fddb.load(make(tmp_path / "images", entries))
    with pytest.raises(DatasetError, match=r"3 of 10 fold lists are missing .* FDDB-fold-08-ellipseList.txt"):
        fddb.load(make(tmp_path / "folds", folds=7))


def test_a_folder_that_is_not_fddb_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        fddb.load(tmp_path / "none")
    with pytest.raises(DatasetError, match="no FDDB in it"):
        fddb.load(tmp_path)
    (tmp_path / "originalPics").mkdir()
    with pytest.raises(DatasetError, match="only originalPics of originalPics and FDDB-folds"):
        fddb.load(tmp_path)


@pytest.mark.parametrize(
    "entries",
    [
        "2002/a/img_1\n",
        "2002/a/img_1\nmany\n",
        "2002/a/img_1\n-1\n",
        "2002/a/img_1\n2\n3 2 0 10 20 1\n",
        "2002/a/img_1\n1\n3 2 0 10\n",
        "2002/a/img_1\n1\n3 2 nan 10 20 1\n",
        "2002/a/img_1\n1\n3 0 0 10 20 1\n",
        "../../etc/passwd\n1\n3 2 0 10 20 1\n",
        "/etc/passwd\n1\n3 2 0 10 20 1\n",
    ],
)
def test_a_list_that_does_not_parse_is_refused_by_file_and_line(tmp_path: Path, entries: str) -> None:
    good = "2002/a/img_1\n1\n3 2 0 10 20 1\n"
    with pytest.raises(
        DatasetError, match=r"FDDB-fold-01-ellipseList.txt: the entry at line 4 does not parse"
    ) as refused:
        fddb.load(make(tmp_path, good + entries))
    assert "passwd" not in str(refused.value)


def test_a_list_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot be read as text"):
        fddb.load(make(tmp_path, "\N{SNOWMAN}\n"))


def test_the_real_set_is_whole(data_root: Path) -> None:
    if not (data_root / "fddb").is_dir():
        pytest.skip("no FDDB there")
    data = fddb.load(data_root)
    assert (data.images, data.faces) == (fddb.IMAGES, fddb.FACES) == (2845, 5171)
    assert len(data.folds) == 10
    assert len({entry.name for entry in data}) == 2845
    # The set's first face: half axes 123.58 and 85.55 at 1.2658 rad (72.5 degrees, nearly upright), at (269.7, 161.8):
    # hx = sqrt(37.06^2 + 81.61^2) = 89.63, hy = sqrt(117.90^2 + 25.68^2) = 120.66.
    first = data.folds[0][0]
    assert first.name == "2002/08/11/big/img_591"
    np.testing.assert_allclose(first.boxes, [[180.06, 41.12, 359.32, 282.44]], atol=0.02)
    sides = np.concatenate([entry.boxes[:, 2:] - entry.boxes[:, :2] for entry in data])
    assert (sides > 0).all()
    assert (sides.min(axis=1) < 10).sum() <= 5  # the lists hold a few specks, one of them two pixels wide
    assert np.median(sides[:, 1] / sides[:, 0]) == pytest.approx(1.35, abs=0.15)  # faces are taller than wide
