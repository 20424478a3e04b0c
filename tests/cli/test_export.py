"""`sfumato export` and `sfumato serve`: what they write, what they say, how they refuse."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.conftest import Ran


def test_a_repository_of_the_shipped_artefacts(cli: "Callable[..., Ran]", tmp_path: Path) -> None:
    models = tmp_path / "models"
    ran = cli("export", "triton", "shipped", models, "--size", 256)
    assert ran.code == 0 and f"sfumato serve {models}" in ran.err
    assert ran.out.splitlines() == [f"{models}/face_detection_{kind}/1" for kind in ("base", "noisy", "release")]
    again = cli("export", "triton", "shipped", models, "--size", 256)
    assert again.code == 0 and not again.out and "nothing was written" in again.err
    shown = cli("serve", models, "--print-command")
    assert shown.code == 0 and shown.out.startswith("docker run") and f"{models}:/models:ro" in shown.out
    other = cli("export", "triton", "shipped", models, "--backend", "onnxruntime")
    assert other.code == 2 and "another backend" in other.err


def test_a_device(cli: "Callable[..., Ran]", tmp_path: Path) -> None:
    ran = cli("export", "onnx", tmp_path / "device.onnx", "--alpha", 0.9, "--size", 256)
    assert ran.code == 0 and "alpha 0.9" in ran.out and (tmp_path / "device.onnx").stat().st_size < 1_000_000


def test_wrong_requests(cli: "Callable[..., Ran]", tmp_path: Path) -> None:
    for words in (
        ("export", "triton", tmp_path / "absent", tmp_path / "models"),
        ("export", "onnx", tmp_path / "device.onnx", "--alpha", 1.5),
        ("serve", tmp_path),
    ):
        ran = cli(*words)
        assert ran.code == 2 and not ran.out and "wanted: " in ran.err
    assert not (tmp_path / "device.onnx").exists() and not (tmp_path / "models").exists()


def test_help_shows_examples(cli: "Callable[..., Ran]") -> None:
    assert "sfumato export triton shipped models" in cli("export", "triton", "--help").out
    assert "sfumato export onnx device.onnx" in cli("export", "onnx", "--help").out
    assert "sfumato serve models" in cli("serve", "--help").out
