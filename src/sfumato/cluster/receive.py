"""The pod's end of `sfumato k8s data put`, called there as `python3 -m sfumato.cluster.receive list|store FOLDER`.

list prints {path: SHA-256} of the files below the folder; store takes a tar from stdin, each file whole or not at all,
and prints the same of what it wrote, read back from the volume. A tar ends by itself: stdin need not be closed.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

PART = ".sfumato-part"  # of a file that is not whole yet


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files(root: Path) -> Iterator[Path]:
    """The regular files below a folder in order, links left out."""
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.suffix != PART:
            yield path


def listed(root: Path) -> dict[str, str]:
    """{path below the folder: SHA-256}; empty where there is no folder."""
    return {path.relative_to(root).as_posix(): digest(path) for path in files(root)}


def store(root: Path, stream: BinaryIO) -> dict[str, str]:
    """Writes the files of a tar below the folder. Raises ValueError for a path that leads out of it."""
    stored = {}
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            name, source = PurePosixPath(member.name), tar.extractfile(member)
            if name.is_absolute() or ".." in name.parts or not member.isreg() or source is None:
                raise ValueError("a member that is no file below the folder")
            _write(root / name, source)
            stored[member.name] = digest(root / name)
    return stored


def _write(path: Path, source: IO[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    try:
        with part.open("wb") as file:
            shutil.copyfileobj(source, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()


def main(verb: str, folder: str) -> None:
    """Prints JSON; a volume that is full or read only is said in one line."""
    try:
        done = listed(Path(folder)) if verb == "list" else store(Path(folder), sys.stdin.buffer)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(json.dumps(done))


if __name__ == "__main__":
    main(*sys.argv[1:])
