"""A file is there whole or not at all: written beside its place, flushed to the disk, then renamed over it."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from sfumato.core.errors import OutputError

# What a full or failing disk answers; any other error inside `atomic` is not about the output and is left alone.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_OTHER_PLACE = "name a folder you may write to, on a disk with room"


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty temporary file of the same folder and suffix; it takes the place of `path` when the block ends.

    An exception in the block removes it and leaves what was at `path`. Folders on the way are made; a symbolic link is
    followed. Raises OutputError where the folder cannot be made or written, `path` is a folder, or the disk is full.
    """
    place = _real(path)
    temporary = _reserve(place)
    try:
        try:
            yield temporary
        except OSError as error:
            if error.errno in _DISK:
                raise _refused(place, error) from error
            raise
        _settle(temporary, place)
    finally:
        with contextlib.suppress(OSError):  # gone already where it was renamed; never hides the block's own error
            temporary.unlink()


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """The bytes at `path`, whole or not at all. Raises OutputError."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def _real(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:
        raise OutputError("a path with a null in it", wanted="a place to write to", do=_OTHER_PLACE) from error


def _reserve(place: Path) -> Path:
    # created by open, not by tempfile, so that the file gets the rights the user's umask gives
    temporary = place.parent / f".sfumato-{secrets.token_hex(8)}{place.suffix}"
    if os.path.isdir(place):  # Path.is_dir raises where a folder on the way is closed to us
        raise OutputError(f"{place} is a folder", wanted="the name of a file", do="add a file name to it")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except OSError as error:
        raise _refused(place, error) from error
    return temporary


def _settle(temporary: Path, place: Path) -> None:
    try:
        _flush(temporary)
        os.replace(temporary, place)
    except OSError as error:
        raise _refused(place, error) from error
    with contextlib.suppress(OSError):  # some file systems cannot flush a folder; the file itself is safe
        _flush(place.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refused(place: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{place} cannot be written: {error.strerror or error}", wanted="a place to write to", do=_OTHER_PLACE
    )
