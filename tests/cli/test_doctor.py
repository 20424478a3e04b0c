"""`sfumato doctor` says what is there, and exits 1 only for what is needed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tests.conftest import Ran, Tiny


def findings(ran: "Ran") -> dict[str, dict[str, Any]]:
    return {found["what"]: found for found in json.loads(ran.out)}


def asked(tiny: "Tiny", folder: Path | None = None) -> list[str]:
    return ["doctor", "--artefacts", str(folder or tiny.folder), "--weights", str(tiny.weights), "--device", "cpu"]


def test_all_is_well(cli: "Callable[..., Ran]", tiny: "Tiny") -> None:
    ran = cli(*asked(tiny), "--dataset", tiny.dataset, "--json")
    assert ran.code == 0, ran.out
    found = findings(ran)
    assert found["torch"]["says"] == torch.__version__
    assert found["device"]["says"].startswith("cpu")
    for name in ("client.safetensors", "server.safetensors", "server-frozen.safetensors", "decoder.safetensors"):
        assert found[name]["state"] == "ok", name
    assert "k 64" in found["client.safetensors"]["says"]
    assert "tail adapted" in found["server.safetensors"]["says"]
    assert "bits a site" in found["one record through"]["says"]
    assert "20 images" in found["FDDB"]["says"]
    assert "NOT FDDB" in found["FDDB"]["says"]


def test_people_get_a_table(cli: "Callable[..., Ran]", tiny: "Tiny") -> None:
    ran = cli(*asked(tiny))
    assert ran.code == 0
    assert all(
        f"\n{name} " in ran.out for name in ("torch", "device", "detector", "client.safetensors", "cache folder")
    )
    assert "FDDB" not in ran.out


def test_a_damaged_client_is_broken(cli: "Callable[..., Ran]", tiny: "Tiny", tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.folder, tmp_path / "artefacts", ignore=shutil.ignore_patterns("work"))
    client = folder / "client.safetensors"
    client.write_bytes(client.read_bytes()[:-100])
    ran = cli(*asked(tiny, folder), "--json")
    assert ran.code == 1
    found = findings(ran)
    assert found["client.safetensors"]["state"] == found["one record through"]["state"] == "broken"
    assert found["server.safetensors"]["state"] == "ok"


def test_an_absent_server_is_broken_an_absent_decoder_is_not(
    cli: "Callable[..., Ran]", tiny: "Tiny", tmp_path: Path
) -> None:
    shutil.copy(tiny.folder / "client.safetensors", tmp_path)
    shutil.copy(tiny.folder / "server-frozen.safetensors", tmp_path)
    ran = cli(*asked(tiny, tmp_path), "--json")
    assert ran.code == 0, ran.out
    assert findings(ran)["decoder.safetensors"]["state"] == "absent"
    (tmp_path / "server-frozen.safetensors").unlink()
    ran = cli(*asked(tiny, tmp_path), "--json")
    assert ran.code == 1
    assert findings(ran)["server.safetensors"]["state"] == "broken"


def test_weights_and_data_that_are_not_there(cli: "Callable[..., Ran]", tiny: "Tiny", tmp_path: Path) -> None:
    words = ["doctor", "--artefacts", tiny.folder, "--weights", tmp_path / "no.pth", "--dataset", tmp_path, "--json"]
    ran = cli(*words)
    assert ran.code == 1
    found = findings(ran)
    assert found["detector"]["state"] == found["FDDB"]["state"] == "broken"
    assert "wanted" in found["FDDB"]["says"]
