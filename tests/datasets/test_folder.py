"""A folder as records: order, repetition, and errors that do not name a record."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from sfumato.core.errors import DatasetError, ImageError
from sfumato.datasets.folder import Folder


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for number, name in enumerate(("z.png", "people/b.png", "a.png")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(cv2.imencode(".png", np.full((4, 5, 3), number, np.uint8))[1].tobytes())
    return tmp_path


def test_records_come_by_name_and_as_often_as_asked(three: Path) -> None:
    folder = Folder(three)
    assert len(folder) == 3
    for _ in range(2):
        assert [(name, int(image[0, 0, 0])) for name, image in folder] == [
            ("a.png", 2),
            ("people/b.png", 1),
            ("z.png", 0),
        ]


def test_a_broken_record_is_named_by_its_place(three: Path) -> None:
    (three / "people" / "b.png").write_bytes(b"not a picture")
    records = iter(Folder(str(three)))
    assert next(records)[0] == "a.png"
    with pytest.raises(ImageError, match="image 2 of 3") as refused:
        next(records)
    assert str(three) in str(refused.value)
    assert "people" not in str(refused.value)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing here", encoding="utf-8")
    with pytest.raises(DatasetError, match="no image in it"):
        Folder(tmp_path)
    with pytest.raises(DatasetError, match="no such folder"):
        Folder(tmp_path / "none")
