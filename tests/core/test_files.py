"""A file is there whole or not at all, and whatever stands in the way is said as an OutputError."""

import errno
import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sfumato.core.errors import OutputError
from sfumato.core.files import atomic, write_bytes


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user who owns nothing: root may write anywhere, so it steps down for the block."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_writes_and_replaces(tmp_path: Path) -> None:
    place = tmp_path / "a.bin"
    write_bytes(place, b"one")
    assert place.read_bytes() == b"one"
    write_bytes(str(place), b"two, longer")
    assert place.read_bytes() == b"two, longer" and names(tmp_path) == ["a.bin"]


def test_makes_the_folders(tmp_path: Path) -> None:
    write_bytes(tmp_path / "x" / "y" / "a.bin", b"1")
    assert (tmp_path / "x" / "y" / "a.bin").read_bytes() == b"1"


def test_temporary_has_the_suffix_and_the_folder(tmp_path: Path) -> None:
    with atomic(tmp_path / "picture.png") as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".png" and temporary.is_file()
        assert not (tmp_path / "picture.png").exists()
    assert names(tmp_path) == ["picture.png"]


def test_an_exception_leaves_what_was(tmp_path: Path) -> None:
    place = tmp_path / "a.bin"
    write_bytes(place, b"old")

    def interrupted() -> None:
        with atomic(place) as temporary:
            temporary.write_bytes(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert place.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


def test_an_error_about_something_else_stays_itself(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "a.bin"):
        (tmp_path / "an input that is not there").read_bytes()
    assert names(tmp_path) == []


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_killed_writer_leaves_what_was(tmp_path: Path) -> None:
    place = tmp_path / "a.bin"
    write_bytes(place, b"old")
    child = os.fork()
    if child == 0:
        with atomic(place) as temporary:
            temporary.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert place.read_bytes() == b"old"


def test_a_reader_never_sees_half(tmp_path: Path) -> None:
    place, whole, stop = tmp_path / "a.bin", {b"a" * 100_000, b"b" * 30_000}, threading.Event()
    write_bytes(place, b"a" * 100_000)

    def write() -> None:
        while not stop.is_set():
            for data in whole:
                write_bytes(place, data)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {place.read_bytes() for _ in range(300)}
    finally:
        stop.set()
        writer.join()
    assert seen <= whole


def test_rights_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a.bin", b"1")
    finally:
        os.umask(before)
    assert (tmp_path / "a.bin").stat().st_mode & 0o777 == 0o640


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.bin").symlink_to(tmp_path / "real" / "a.bin")
    write_bytes(tmp_path / "link.bin", b"1")
    assert (tmp_path / "link.bin").is_symlink() and (tmp_path / "real" / "a.bin").read_bytes() == b"1"


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with unprivileged(), pytest.raises(OutputError, match="Permission denied"):
            write_bytes(tmp_path / "a.bin", b"1")
        with unprivileged(), pytest.raises(OutputError, match="Permission denied"):
            write_bytes(tmp_path / "new" / "a.bin", b"1")
    finally:
        tmp_path.chmod(0o700)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be written") as caught:
        write_bytes(tmp_path / "file" / "a.bin", b"1")
    assert str(tmp_path / "file" / "a.bin") in str(caught.value) and caught.value.do and caught.value.exit_code == 2


def test_a_folder_in_the_place(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        write_bytes(tmp_path, b"1")


@pytest.mark.parametrize("name", ["a\0b", "n" * 300])
def test_a_name_no_file_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError):
        write_bytes(tmp_path / name, b"1")
    assert names(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=os.strerror(errno.ENOSPC)), atomic(tmp_path / "a.bin"):
        Path("/dev/full").write_bytes(b"1")
    assert names(tmp_path) == []


def test_a_file_larger_than_allowed(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OutputError, match=os.strerror(errno.EFBIG)):
            write_bytes(tmp_path / "a.bin", bytes(8192))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "a.bin").read_bytes() == b"old" and names(tmp_path) == ["a.bin"]
