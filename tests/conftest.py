"""Fixtures for all tests: where the data lies that cannot be shipped, and photographs that dependencies ship."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import pytest

if TYPE_CHECKING:
    from sfumato.trusted.protect import Protected

cv2.setNumThreads(1)  # tests run side by side; threads that wait for one another cost more than they bring


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with FDDB, LFW and weights: $SFUMATO_DATA, or ../shared/data beside the repository; else a skip."""
    named = os.environ.get("SFUMATO_DATA")
    root = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not root.is_dir():
        pytest.skip("no data: SFUMATO_DATA names no folder (see docs/data-and-weights.md)")
    return root


@pytest.fixture(scope="session")
def astronaut() -> np.ndarray:
    """A photograph with one face, [512, 512, 3] uint8 BGR."""
    from sfumato.datasets import images, sampler

    return images.read(sampler._shipped("scikit-image", "skimage", "data/astronaut.png"))


@pytest.fixture(scope="session")
def sampler_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default sampler: 60 composed photographs in FDDB's layout. Read only."""
    from sfumato.datasets import sampler

    return sampler.compose(tmp_path_factory.mktemp("sampler") / "set")


class Tiny(NamedTuple):
    """Artefacts that load and run like any, fitted for two steps to a detector of random weights: fast, and no good."""

    folder: Path
    weights: Path
    dataset: Path
    size: int

    @property
    def options(self) -> list[str]:
        """What a verb needs to use them."""
        return ["--artefacts", str(self.folder), "--weights", str(self.weights), "--size", str(self.size)]

    @property
    def photographs(self) -> Path:
        return self.dataset / "originalPics"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Client, both servers and a decoder at 256 x 256, and a sampler of twenty photographs. Read only."""
    import torch

    from sfumato import facade
    from sfumato.attack import decoder
    from sfumato.datasets import sampler
    from sfumato.datasets.folder import Photographs
    from sfumato.learn.fit import Settings
    from sfumato.tasks.detection.faceboxes import FaceBoxes
    from sfumato.tasks.detection.task import FaceDetection

    root, task = tmp_path_factory.mktemp("tiny"), FaceDetection(size=(256, 256))
    made = Tiny(root / "artefacts", root / "weights.pth", sampler.compose(root / "set", images=20), 256)
    torch.manual_seed(0)
    model = FaceBoxes().eval()
    with torch.no_grad():  # spread the scores and lower them, so that some anchors count as faces and most do not
        for layer in model.conf:
            assert isinstance(layer, torch.nn.Conv2d)
            assert layer.bias is not None
            layer.weight.mul_(8)
            layer.bias.copy_(torch.tensor([2.0, 0.0]).repeat(len(layer.bias) // 2))
    torch.save(model.state_dict(), made.weights)
    photographs = Photographs(made.photographs, quiet=True)[:12]
    cut = facade.face_split(made.weights)
    for tail, start in (("adapted", None), ("frozen", made.folder)):
        settings = Settings(tail="frozen" if tail == "frozen" else "adapted", steps=2, batch=2, validations=1)
        fitted = facade.fit(
            cut, photographs, task=task, out=made.folder, settings=settings, start=start, device="cpu", quiet=True
        )
    trained = decoder.train(fitted, photographs, steps=2, batch=2, quiet=True)
    decoder.save(trained, made.folder / "decoder.safetensors", fitted.digest)
    return made


class Ran(NamedTuple):
    """What a command left: its exit code, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Ran]:
    """Runs the command line in this process: cli("detect", folder, "--out", out)."""
    from sfumato.cli.app import app

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            app([str(word) for word in words], prog_name="sfumato")
        return Ran(int(left.value.code or 0), *capsys.readouterr())

    return run


def wire_bytes(protected: "Protected", alpha: float, blocks: int) -> Any:
    """About what a release of one record weighs; a channel whose few codes all round to 0 does not travel."""
    import torch

    carrying = len(protected.obfuscator.allocation.carrying(torch.tensor([alpha])))
    return pytest.approx(54 + 4 + protected.obfuscator.shape.sent / 8 + carrying * blocks, rel=0.05)
