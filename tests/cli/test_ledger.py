"""`sfumato ledger`: figures of a real ledger, and of a photograph in it by its key alone."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import pytest

from sfumato.trusted.guard import Guard
from sfumato.trusted.keys import new_key_file, tenant_key
from sfumato.trusted.ledger import Ledger
from tests.trusted.test_guard import picture, protected

if TYPE_CHECKING:
    from tests.conftest import Ran


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A ledger of three releases of two pictures, which lie beside it."""
    new_key_file(tmp_path / "tenant.key")
    door = Guard(protected(), Ledger(tmp_path / "ledger.db"), tenant_key(str(tmp_path / "tenant.key")))
    for seed in (0, 1, 1):
        cv2.imwrite(str(tmp_path / f"{seed}.png"), picture(seed))
        door(picture(seed))
    door.ledger.close()
    return tmp_path


def test_totals(cli: "Callable[..., Ran]", place: Path) -> None:
    ran = cli("ledger", place / "ledger.db")
    assert ran.code == 0 and ran.out.startswith("2 records, 3 releases; the record with the most: ")


def test_one_photograph(cli: "Callable[..., Ran]", place: Path) -> None:
    ran = cli("ledger", place / "ledger.db", "--photograph", place / "1.png", "--key", place / "tenant.key")
    assert ran.code == 0 and "near-duplicates of it: 2 releases, " in ran.out
    (place / "tenant.key").unlink()
    new_key_file(place / "tenant.key")  # under another key nobody is found
    ran = cli("ledger", place / "ledger.db", "--photograph", place / "1.png", "--key", place / "tenant.key")
    assert ran.code == 0 and "near-duplicates of it: 0 releases, 0 bits" in ran.out


def test_wrong_requests(cli: "Callable[..., Ran]", place: Path) -> None:
    for absent in (place / "absent.db", f"sqlite:///{place / 'absent.db'}"):
        assert cli("ledger", absent).code == 2 and not (place / "absent.db").exists()
    assert cli("ledger", place / "1.png").code == 2
    assert cli("ledger", place / "ledger.db", "--photograph", place / "1.png").code == 2
    assert cli("ledger", place / "ledger.db", "--key", place / "tenant.key").code == 2


def test_help_shows_an_example(cli: "Callable[..., Ran]") -> None:
    ran = cli("ledger", "--help")
    assert ran.code == 0 and "Example" in ran.out and "sfumato ledger ledger.db" in ran.out
