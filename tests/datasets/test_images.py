"""Reading images: upright, bounded, whole, and quiet about what is wrong."""

import io
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from sfumato.core.errors import DatasetError, ImageError
from sfumato.datasets import images

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
SMOOTH = cv2.resize(PICTURE[:4, :6], (60, 40), interpolation=cv2.INTER_CUBIC)


def encoded(suffix: str, image: np.ndarray = SMOOTH) -> bytes:
    done, data = cv2.imencode(suffix, image)
    assert done
    return data.tobytes()


def written(folder: Path, data: bytes, name: str = "a.jpg") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".ppm"])
def test_lossless_formats_come_back_to_the_byte(tmp_path: Path, suffix: str) -> None:
    image = images.read(written(tmp_path, encoded(suffix, PICTURE), f"a{suffix}"))
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image, PICTURE)


@pytest.mark.parametrize("suffix", sorted(images.SUFFIXES))
def test_every_suffix_that_is_listed_is_read(tmp_path: Path, suffix: str) -> None:
    grey_only = suffix == ".pgm"
    if suffix == ".pbm":
        data = b"P4\n8 1\n\xaa"
    else:
        data = encoded(suffix, cv2.cvtColor(SMOOTH, cv2.COLOR_BGR2GRAY) if grey_only else SMOOTH)
    image = images.read(written(tmp_path, data, f"a{suffix}"))
    assert image.shape == ((1, 8, 3) if suffix == ".pbm" else SMOOTH.shape)


def test_the_content_counts_not_the_suffix(tmp_path: Path) -> None:
    np.testing.assert_array_equal(images.read(written(tmp_path, encoded(".png", PICTURE), "a.jpg")), PICTURE)


def test_grey_alpha_and_16_bits_all_become_bgr_bytes(tmp_path: Path) -> None:
    grey = PICTURE[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    opaque = np.dstack([PICTURE, np.full(grey.shape, 255, np.uint8)])
    deep = PICTURE.astype(np.uint16) * 257
    np.testing.assert_array_equal(images.read(written(tmp_path, encoded(".png", grey))), expected)
    np.testing.assert_array_equal(images.read(written(tmp_path, encoded(".png", opaque))), PICTURE)
    np.testing.assert_array_equal(images.read(written(tmp_path, encoded(".png", deep))), PICTURE)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path: Path, orientation: int, kind: str) -> None:
    if f".{kind.lower()}" not in images.SUFFIXES or kind not in images.FORMATS:
        pytest.skip(f"this OpenCV or this Pillow lacks {kind}")
    raw = Image.fromarray(np.ascontiguousarray(SMOOTH[..., ::-1]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned"
    raw.save(path, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {"quality": 100}))
    with Image.open(path) as again:
        upright = np.asarray(ImageOps.exif_transpose(again).convert("RGB"))[..., ::-1]
    image = images.read(path)
    assert image.shape == ((60, 40, 3) if orientation >= 5 else (40, 60, 3))
    assert np.abs(image.astype(int) - upright).max() <= 8  # two decoders may round differently


def test_exif_that_does_not_parse_costs_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "odd.jpg"
    Image.fromarray(SMOOTH).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03")
    assert images.read(path).shape == SMOOTH.shape


PNG, JPEG = encoded(".png", PICTURE), encoded(".jpg", PICTURE)
BROKEN = {
    "empty": b"",
    "text": b"dear diary, this is not a photograph",
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00.",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    "half a JPEG": JPEG[: len(JPEG) // 2],
    "a JPEG without its end": JPEG[:-2],
    "a JPEG cut in its header": JPEG[:100],
    "half a PNG": PNG[: len(PNG) // 2],
    "a PNG cut in its header": PNG[:20],
    "a PNG with a wrong checksum": PNG[:200] + bytes([PNG[200] ^ 1]) + PNG[201:],
    "half a BMP": encoded(".bmp")[:500],
    "half a TIFF": encoded(".tiff", PICTURE)[:500],
    "half a WebP": encoded(".webp", PICTURE)[:500],
}


WHY = {
    "empty": "an empty file",
    **dict.fromkeys(("text", "a pickle", "PostScript", "a PNG with a wrong checksum"), "not an image"),
    **dict.fromkeys(("half a JPEG", "a JPEG without its end"), "a JPEG that is cut short"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_whole_image_is_refused_by_its_name_and_quietly(
    tmp_path: Path, what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, BROKEN[what])
    with pytest.raises(ImageError) as refused:
        images.read(path)
    assert refused.value.got.startswith(f"{path}: {WHY.get(what, '')}")
    assert "diary" not in str(refused.value)
    assert refused.value.exit_code == 2
    assert capfd.readouterr() == ("", "")


def test_a_log_level_that_the_user_chose_is_kept(tmp_path: Path) -> None:
    before = images.LOG.getLogLevel()
    assert before != images.SILENT
    images.read(written(tmp_path, PNG))
    assert images.LOG.getLogLevel() == before


def test_bytes_after_the_end_of_a_jpeg_do_no_harm(tmp_path: Path) -> None:
    whole = images.read(written(tmp_path, JPEG))
    np.testing.assert_array_equal(images.read(written(tmp_path, JPEG + b"\xff\xda a film, as phones append it")), whole)


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_jpeg() -> None:
    inner = b"Exif\0\0" + encoded(".jpg", SMOOTH[:8, :8])
    thumbnail = b"\xff\xe1" + struct.pack(">H", len(inner) + 2) + inner
    whole = JPEG[:2] + thumbnail + b"\xff" + JPEG[2:]  # any marker may be preceded by FF fill bytes
    assert images._jpeg_ends(whole)
    assert not images._jpeg_ends(whole[:-2])
    assert not images._jpeg_ends(whole[: len(thumbnail) + 100])


def test_missing_folder_and_pipe_are_refused_without_waiting(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        images.read(tmp_path / "none.jpg")
    with pytest.raises(ImageError, match="not a file"):
        images.read(tmp_path)
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="not a file"):
        images.read(tmp_path / "pipe.jpg")


def test_errors_say_what_they_are_told_to_call_it(tmp_path: Path) -> None:
    path = written(tmp_path, b"text", "secret-name.jpg")
    with pytest.raises(ImageError, match=r"^image 3 of 7: not an image") as refused:
        images.read(path, called="image 3 of 7")
    assert "secret-name" not in str(refused.value)


def test_one_pixel_is_an_image(tmp_path: Path) -> None:
    pixel = np.array([[[10, 20, 30]]], np.uint8)
    np.testing.assert_array_equal(images.read(written(tmp_path, encoded(".png", pixel))), pixel)


def test_sixty_megapixels_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("1", (10_000, 6_000), 1).save(path)
    image = images.read(path)
    assert image.shape == (6_000, 10_000, 3)
    assert image[0, 0].tolist() == image[-1, -1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("side", [10_001, 12_000, 30_000])
def test_a_claim_of_too_many_pixels_is_refused_from_the_header_alone(tmp_path: Path, side: int) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    end = b"IEND"
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, end)
    )
    with pytest.raises(ImageError, match="more than 100 megapixels"):
        images.read(written(tmp_path, data))


def test_a_real_image_just_above_the_bound_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    Image.new("1", (10_000, 10_001)).save(path)
    with pytest.raises(ImageError, match="more than 100 megapixels"):
        images.read(path)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "BMP"]), data=st.data())
def test_damage_of_any_kind_gives_an_image_or_an_image_error(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    Image.fromarray(SMOOTH).save(buffer, kind)
    damaged = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = images.read(written(tmp_path, bytes(damaged[: data.draw(st.integers(1, len(damaged)))])))
    except ImageError:
        return
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3


def test_paths_are_nested_sorted_and_only_images(tmp_path: Path) -> None:
    for name in ("b/2.jpg", "b/10.JPG", "a.png", "b.webp", "notes.txt", ".hidden/x.jpg", "._a.png", "c/d/e.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    listed = [p.relative_to(tmp_path).as_posix() for p in images.paths(tmp_path)]
    assert listed == ["a.png", "b.webp", "b/10.JPG", "b/2.jpg", "c/d/e.tif"]


def test_paths_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        images.paths(tmp_path / "none")
    with pytest.raises(DatasetError, match="a file"):
        images.paths(written(tmp_path, PNG))
    assert images.paths(tmp_path / "..") is not None


def test_threads_leave_the_log_and_the_warnings_as_they_were(tmp_path: Path) -> None:
    tall = cv2.resize(PICTURE, (300, 400))
    files = [written(tmp_path, encoded(s, tall), f"a{s}") for s in (".png", ".jpg", ".tiff")] * 60
    level, filters = images.LOG.getLogLevel(), list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        shapes = set(pool.map(lambda path: images.read(path).shape, files))
    assert shapes == {(400, 300, 3)}
    assert images.LOG.getLogLevel() == level
    assert list(warnings.filters) == filters


def test_bytes_are_read_as_files_are_within_bounds_of_the_callers() -> None:
    np.testing.assert_array_equal(images.decode(encoded(".png", PICTURE), "it"), PICTURE)
    np.testing.assert_array_equal(images.decode(encoded(".png", PICTURE), "it", pixels=40 * 60), PICTURE)
    with pytest.raises(ImageError, match="it: an image of more than"):
        images.decode(encoded(".png", PICTURE), "it", pixels=2399)
    with pytest.raises(ImageError, match="it: not an image"):
        images.decode(encoded(".bmp", PICTURE), "it", formats=("PNG", "JPEG"))
