from pathlib import Path

import pytest
import torch

from sfumato.core.errors import WeightsError
from sfumato.facade import detector
from sfumato.tasks.detection.boxes import priors
from sfumato.tasks.detection.faceboxes import FaceBoxes, with_weights


@pytest.mark.parametrize(("height", "width"), [(256, 256), (128, 384), (200, 300)])
def test_one_output_an_anchor(height: int, width: int) -> None:
    model = FaceBoxes().eval()
    with torch.no_grad():
        loc, conf = model(torch.zeros(2, 3, height, width))
    anchors = len(priors(height, width))
    assert loc.shape == (2, anchors, 4)
    assert conf.shape == (2, anchors, 2)


def test_the_head_is_the_papers_and_the_reports() -> None:
    model = FaceBoxes().eval()
    with torch.no_grad():
        z = model.forward_head(torch.zeros(1, 3, 1024, 1024))
    assert z.shape == (1, 128, 32, 32)
    # About a million parameters (arXiv 1708.05234, section 4.1: 4 MB in fp32).
    assert 0.9e6 < sum(p.numel() for p in model.parameters()) < 1.1e6


def test_head_then_tail_is_the_model() -> None:
    torch.manual_seed(0)
    model = FaceBoxes().eval()
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        whole, parts = model(x), model.forward_tail(model.forward_head(x))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_public_weights_load_key_by_key(data_root: Path) -> None:
    model = detector(data_root / "weights" / "FaceBoxesProd.pth")
    assert len(model.state_dict()) == 174
    assert not model.training


def test_weights_of_something_else_are_named() -> None:
    state = FaceBoxes().state_dict()
    state["loc.9.weight"] = state.pop("loc.0.weight")
    state["conv1.conv.weight"] = torch.zeros(3, 3)
    with pytest.raises(
        WeightsError, match=r"loc\.0\.weight is missing.*loc\.9\.weight is unknown.*conv1\.conv\.weight is \[3, 3\]"
    ):
        with_weights(state)


def test_a_prefix_of_data_parallel_is_taken_off() -> None:
    state = FaceBoxes().state_dict()
    model = with_weights({f"module.{k}": v for k, v in state.items()})
    assert torch.equal(model.state_dict()["conv2.conv.weight"], state["conv2.conv.weight"])


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 broken", b"\x80\x04cos\nsystem\n."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_weights(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError):
        detector(path)


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.mkdir, (tmp_path / "owned",)

    torch.save({"conv1.conv.weight": Hostile()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError):
        detector(tmp_path / "w.pth")
    assert not (tmp_path / "owned").exists()


def test_a_missing_file_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="--weights"):
        detector(tmp_path / "none.pth")


def test_weights_that_overflowed_are_refused() -> None:
    state = FaceBoxes().state_dict()
    state["conv1.bn.running_var"] = torch.full((24,), 1e5).half()
    with pytest.raises(WeightsError, match=r"conv1\.bn\.running_var holds values that are not finite"):
        with_weights(state)
