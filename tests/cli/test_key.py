"""`sfumato key`: a new key that `tenant_key` reads, and never one in place of another."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.trusted.keys import tenant_key

if TYPE_CHECKING:
    from tests.conftest import Ran


def test_a_new_key(cli: "Callable[..., Ran]", tmp_path: Path) -> None:
    path = tmp_path / "tenant.key"
    ran = cli("key", path)
    assert ran.code == 0 and not ran.err
    assert str(path) in ran.out and "back it up" in " ".join(ran.out.split())
    assert tenant_key(str(path)).hex() == path.read_text().strip()
    assert path.read_text().strip() not in ran.out


def test_a_key_that_is_there_stays(cli: "Callable[..., Ran]", tmp_path: Path) -> None:
    path = tmp_path / "tenant.key"
    cli("key", path)
    kept = path.read_bytes()
    ran = cli("key", path)
    assert ran.code == 2 and not ran.out
    assert "is there already" in ran.err and "do: " in ran.err
    assert path.read_bytes() == kept


def test_no_place_is_a_wrong_request(cli: "Callable[..., Ran]", tmp_path: Path) -> None:
    assert cli("key", tmp_path / "absent" / "tenant.key").code == 2
    assert cli("key").code == 2


def test_help_shows_an_example(cli: "Callable[..., Ran]") -> None:
    ran = cli("key", "--help")
    assert ran.code == 0
    assert "Example" in ran.out and "sfumato key tenant.key" in ran.out
    assert " key " in cli("--help").out
