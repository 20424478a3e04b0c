"""A folder crosses as a tar into the real receiving end, a process: whole, checked, and never out of its folder."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from sfumato.cluster import receive, volumes


def call(verb: str, folder: Path, stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    command = [sys.executable, "-m", "sfumato.cluster.receive", verb, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(command, input=stdin, capture_output=True, check=False, env=environment)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    here = tmp_path / "here"
    (here / "deep" / "er").mkdir(parents=True)
    (here / "deep" / "er" / "large.bin").write_bytes(os.urandom(volumes.PIECE * 2 + 7))
    (here / "deep" / "full.bin").write_bytes(bytes(tarfile.BLOCKSIZE))
    (here / "empty").write_bytes(b"")
    (here / ("n" * 150)).write_text("a long name")
    (here / "link").symlink_to("/etc/passwd")
    return here


def test_what_was_sent_is_there(folder: Path, tmp_path: Path) -> None:
    sent: list[int] = []
    names = list(receive.listed(folder))
    assert len(names) == 4  # links are left out
    stored = call("store", tmp_path / "there", b"".join(volumes.packed(folder, names, sent.append)))
    assert stored.returncode == 0, stored.stderr
    assert json.loads(stored.stdout) == receive.listed(folder) == receive.listed(tmp_path / "there")
    assert json.loads(call("list", tmp_path / "there").stdout) == receive.listed(folder)
    assert sum(sent) == sum((folder / name).stat().st_size for name in names)


def test_a_copy_that_was_cut_off_keeps_whole_files_only(folder: Path, tmp_path: Path) -> None:
    names = ["empty", "deep/full.bin", "deep/er/large.bin"]
    whole = b"".join(volumes.packed(folder, names, lambda _: None))
    assert call("store", tmp_path / "there", whole[: len(whole) // 2]).returncode != 0
    assert set(json.loads(call("list", tmp_path / "there").stdout)) == {"empty", "deep/full.bin"}
    assert not list((tmp_path / "there").rglob(f"*{receive.PART}"))


def test_nothing_there_is_an_empty_list(tmp_path: Path) -> None:
    assert json.loads(call("list", tmp_path / "nowhere").stdout) == {}


@pytest.mark.parametrize("name", ["../out", "/out", "a/../../out"])
def test_no_way_out(tmp_path: Path, name: str) -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    done = call("store", tmp_path / "there", made.getvalue())
    assert done.returncode == 1
    assert b"below the folder" in done.stderr and b"Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_links_are_refused(tmp_path: Path) -> None:
    made, link = io.BytesIO(), tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(fileobj=made, mode="w") as tar:
        tar.addfile(link)
    assert call("store", tmp_path / "there", made.getvalue()).returncode == 1
