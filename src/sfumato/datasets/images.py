"""An image file -> [H, W, 3] uint8, BGR, upright: the EXIF orientation is applied, all metadata is dropped.

The header is read first (Pillow, no pixels), so a file that claims too many pixels is refused before memory is spent
on it. OpenCV decodes; which formats it turns upright differs by version, so the turning is done here. Errors name the
file as the caller wrote it, or as `called` says, and nothing of what is in it.
"""

import io
import os
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn

import cv2
import numpy as np
from PIL import Image

from sfumato.core.errors import DatasetError, ImageError

MAX_PIXELS = 100_000_000
MAX_BYTES = 1 << 30  # MAX_PIXELS uncompressed at 16 bits a channel with alpha is 0.8 GB
# What OpenCV decodes AND Pillow can measure; no other parser of Pillow's is reachable from a user's file.
# Those that Pillow always has loaded come first; AVIF came with Pillow 11.3.
AVIF = ("AVIF",) if find_spec("PIL.AvifImagePlugin") else ()
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "DIB", "JPEG2000", "SUN", "TIFF", "WEBP", *AVIF)
KINDS = ("avif", "bmp", "dib", "gif", "jp2", "jpe", "jpeg", "jpg", "pbm", "pgm", "png", "pnm", "ppm", "ras", "sr")
# Some builds of OpenCV lack a format (4.10 has no GIF and no AVIF); what one can write it can read.
SUFFIXES = frozenset(f".{kind}" for kind in (*KINDS, "tif", "tiff", "webp") if cv2.haveImageWriter(f"a.{kind}"))
LOG: Any = getattr(cv2.utils, "logging", cv2)  # the same two functions in OpenCV 5 and in OpenCV 4
SILENT = 0
# EXIF 2.3, section 4.6.4, Orientation: where the stored rows and columns belong -> how to turn [H, W, 3] upright.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}


def read(path: str | os.PathLike[str], *, called: str | None = None) -> np.ndarray:
    """The image in a file, [H, W, 3] uint8 BGR as it should be looked at.

    `called` is what errors say instead of the path. Raises ImageError for a file that is missing, empty, not an
    image, cut short, or of more than MAX_PIXELS.
    """
    name = called or os.fspath(path)
    return decode(_contents(Path(path), name), name)


def decode(data: bytes, name: str, *, formats: Sequence[str] = FORMATS, pixels: int = MAX_PIXELS) -> np.ndarray:
    """`read` for the bytes of a file that errors call `name`; of these formats, and of so many pixels at most."""
    orientation = _header(data, name, formats, pixels)
    if data.startswith(b"\xff\xd8") and not _jpeg_ends(data):
        _refuse(f"{name}: a JPEG that is cut short")
    image = _decode(data)
    if image is None or image.ndim != 3:
        _refuse(f"{name}: an image that is damaged or cut short")
    return np.ascontiguousarray(UPRIGHT.get(orientation, UPRIGHT[1])(image))


def paths(folder: str | os.PathLike[str]) -> list[Path]:
    """Every image file below a folder, sorted by its path inside it; hidden files and folders are left out."""
    root = Path(folder)
    if not root.is_dir():
        got = "a file" if root.exists() else "no such folder"
        raise DatasetError(f"{os.fspath(folder)}: {got}", wanted="a folder of images")

    def unreadable(error: OSError) -> None:
        raise DatasetError(f"{os.fspath(folder)}: part of it cannot be read ({error.strerror})") from None

    found = []
    for here, inside, files in os.walk(root, onerror=unreadable):
        inside[:] = [name for name in inside if not name.startswith(".")]
        found += [Path(here, f) for f in files if not f.startswith(".") and Path(f).suffix.lower() in SUFFIXES]
    return sorted(found, key=lambda p: p.relative_to(root).as_posix())


def _refuse(got: str) -> NoReturn:
    raise ImageError(got, wanted="a whole image file: JPEG, PNG, WebP, BMP, GIF, TIFF ...") from None


def _contents(path: Path, name: str) -> bytes:
    try:
        if not path.is_file():
            _refuse(f"{name}: not a file" if path.exists() else f"{name}: no such file")
        if path.stat().st_size > MAX_BYTES:
            _refuse(f"{name}: a file of more than {MAX_BYTES >> 20} MiB")
        data = path.read_bytes()
    except OSError as error:
        _refuse(f"{name}: cannot be read ({error.strerror})")
    if not data:
        _refuse(f"{name}: an empty file")
    return data


def _header(data: bytes, name: str, formats: Sequence[str], most: int) -> int:
    """The EXIF orientation still to be applied; size, and checksums where the format has them (PNG), are in order."""
    with HEADERS, warnings.catch_warnings():
        # Pillow warns of odd metadata, which is dropped here anyway; of what others warn nothing is hidden.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            with Image.open(io.BytesIO(data), formats=tuple(formats)) as header:
                width, height = header.size
                if width * height <= most:
                    orientation = 1 if header.format == "TIFF" else _orientation(header)  # OpenCV turns TIFF itself
                    header.verify()
        except Image.DecompressionBombError:
            width, height = MAX_PIXELS, 2  # Pillow's own bound, above ours, fires before it tells the size
        except Exception:  # damaged bytes raise whatever the format's parser stumbles on
            _refuse(f"{name}: not an image")
    if width * height > most:
        told = f"{most / 10**6:.3g} megapixels"
        raise ImageError(f"{name}: an image of more than {told}", wanted=f"at most {told}", do="make it smaller first")
    return orientation


def _orientation(header: Image.Image) -> int:
    """Tag 0x0112; 1 (upright) where there is none. Metadata that does not parse costs no picture."""
    try:
        # Not header.getexif(): Pillow's for PNG decodes all pixels to look for EXIF behind them.
        return int(Image.Image.getexif(header).get(0x0112, 1))
    except Exception:  # as above: whatever the parser stumbles on
        return 1


def _jpeg_ends(data: bytes) -> bool:
    """Whether the end-of-image marker follows the first scan (ISO 10918-1, B.1.1).

    Inside a scan FF D9 cannot occur; before it, it may (an EXIF thumbnail is a JPEG), so whole segments are skipped.
    Some versions of OpenCV fill the missing part of a short JPEG with grey and say nothing, so it is checked here.
    """
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        filler = data[at + 1] == 0xFF
        at += 1 if filler else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data.find(b"\xff\xd9", at) >= 0


def _decode(data: bytes) -> np.ndarray | None:
    try:
        with QUIET:  # our error says it; stderr stays clean
            return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None


class _Quiet:
    """OpenCV's log is silent while any thread is inside; the last one out gives it back the level it had."""

    def __init__(self) -> None:
        self._lock, self._inside, self._level = Lock(), 0, SILENT

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._level = LOG.getLogLevel()
                LOG.setLogLevel(SILENT)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                LOG.setLogLevel(self._level)


QUIET = _Quiet()
HEADERS = Lock()  # the warnings' filters are the whole process's: one thread at a time may put them aside
