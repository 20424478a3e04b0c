"""What the benchmarks measure adds up: structure and arithmetic, never times."""

import json
import runpy
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from sfumato import benchmarking
from sfumato.benchmarking import Encoding, Floor, Pipeline, Step, Stream, Timing, Wire, Work
from sfumato.core.errors import AlphaError, DatasetError, RequestError
from sfumato.datasets import images
from sfumato.facade import load
from sfumato.tasks.detection.task import FaceDetection
from sfumato.trusted.protect import Protected

if TYPE_CHECKING:
    from tests.conftest import Tiny

GATE = Path(__file__).resolve().parent.parent / "benchmarks" / "gate.py"


@pytest.fixture(scope="module")
def protected(tiny: "Tiny") -> Protected:
    return load(tiny.folder, weights=tiny.weights, task=FaceDetection(size=None))


@pytest.fixture
def image(tiny: "Tiny") -> np.ndarray:
    return images.read(sorted(tiny.photographs.rglob("*.jpg"))[0])


def test_a_timing_s_median_and_quartiles() -> None:
    timing = Timing((4.0, 1.0, 2.0, 3.0, 5.0))
    assert timing.median == 3.0
    assert timing.spread == (2.0, 4.0)
    assert timing.as_dict() == {"median": 3.0, "low": 2.0, "high": 4.0, "seconds": [4.0, 1.0, 2.0, 3.0, 5.0]}
    assert Timing((1.0,)).spread == (1.0, 1.0)


def test_arms_run_in_turns_and_the_first_round_is_not_counted() -> None:
    ran: list[str] = []
    found = benchmarking.interleaved({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, 3)
    assert ran == ["a", "b"] * 4
    assert {name: len(timing.seconds) for name, timing in found.items()} == {"a": 3, "b": 3}
    with pytest.raises(RequestError, match="0 runs"):
        benchmarking.interleaved({}, 0)


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with benchmarking.threads(before + 1):
        assert torch.get_num_threads() == benchmarking.machine().threads == before + 1
    with benchmarking.threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before
    with pytest.raises(RequestError), benchmarking.threads(0):
        pass


def test_the_machine_is_named() -> None:
    here = benchmarking.machine()
    assert here.cpu
    assert here.cores >= 1
    assert here.torch == torch.__version__
    assert here.numpy == np.__version__


def test_the_step_s_ratios_are_those_of_its_medians(protected: Protected, image: np.ndarray) -> None:
    step = benchmarking.step(protected, image, alpha=0.8, runs=2)
    assert set(step.arms) == {"head", "step", "head + step", "noise", "randn", "randn, channels last"}
    assert all(len(timing.seconds) == 2 for timing in step.arms.values())
    assert step.shape[:2] == (1, 128)
    medians = {name: median(timing.seconds) for name, timing in step.arms.items()}
    assert medians[step.baseline] == min(medians["randn"], medians["randn, channels last"])
    assert step.floor is not None
    assert step.ratios == {
        "step/randn": medians["step"] / medians[step.baseline],
        "step/head": medians["step"] / medians["head"],
        "step/floor": medians["step"] / step.floor.seconds,
    }
    document = json.loads(json.dumps(step.as_dict(), allow_nan=False))
    assert document["ratios"] == step.ratios
    assert document["floor"]["work"]["multiply_adds"] == step.floor.work.multiply_adds
    assert document["arms"]["step"]["median"] == medians["step"]


def test_a_step_without_a_floor_has_no_ratio_to_it() -> None:
    one = Timing((1.0,))
    arms = dict.fromkeys(("step", "head", "randn", "randn, channels last"), one)
    step = Step("cuda", (1, 128, 34, 60), 0.8, arms, None)
    assert step.ratios == {"step/randn": 1.0, "step/head": 1.0}
    assert step.as_dict()["floor"] is None


@pytest.mark.parametrize("alpha", [0.05, 0.95])
def test_required_work_is_that_of_the_layers(protected: Protected, alpha: float) -> None:
    """Counted from the weights themselves; of the last layers only the channels of which anything is sent."""
    obfuscator, (high, wide) = protected.obfuscator, (34, 60)
    work = benchmarking.required(protected, (high, wide), alpha)
    block = obfuscator.shape.block
    blocks = -(-high // block) * -(-wide // block)
    bits = obfuscator.allocation(torch.tensor([alpha]))[0].unflatten(0, (-1, block**2))
    sent, live = int((bits > 0).sum()), (bits > 0).any(1)
    assert benchmarking.carrying(protected, alpha) == sent
    layers = [m for m in obfuscator.modules() if isinstance(m, torch.nn.Conv2d)]
    weights = [m.weight[live] if len(m.weight) == obfuscator.shape.k else m.weight for m in layers]
    kernels, biases = sum(w.numel() for w in weights), sum(len(w) for w in weights)
    assert work.multiply_adds == high * wide * kernels + blocks * sent * block**2
    assert 0 <= work.words - blocks * sent <= 1
    assert work.words % 2 == 0
    moved = 128 * high * wide + kernels + biases + block**4 + 3 * sent
    assert work.bytes == 4 * moved + blocks * obfuscator.shape.sent


def test_fewer_coefficients_are_less_work(protected: Protected) -> None:
    most, least = (benchmarking.required(protected, (32, 32), alpha) for alpha in (0.05, 0.95))
    assert most.multiply_adds >= least.multiply_adds
    assert most.words >= least.words


def test_the_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    work = Work(multiply_adds=100, bytes=30, words=5)
    assert Floor(work, matmul=10, copy=10, keystream=10).seconds == 12.0
    assert Floor(work, matmul=1000, copy=10, keystream=1000).seconds == 3.0


def test_a_stream_says_what_stays(protected: Protected) -> None:
    found = benchmarking.stream(protected, 10, alpha=0.8)
    assert (found.images, found.size) == (10, benchmarking.STREAMED)
    assert found.early > 0
    assert found.growth == found.late - found.early
    with pytest.raises(RequestError, match="9 images"):
        benchmarking.stream(protected, 9)
    assert Stream(10, (1, 1), 3.0, 5.0, 1.0).as_dict()["growth"] == 2.0


def test_the_pipeline_s_ratio_is_the_median_over_pairs(tiny: "Tiny") -> None:
    both = load(tiny.folder, weights=tiny.weights, task=FaceDetection(size=(256, 256)))
    with benchmarking.photographs(tiny.photographs, 3) as paths:
        found = benchmarking.pipeline(both, paths, alpha=0.8, pairs=2, workers=1)
        with pytest.raises(AlphaError):
            benchmarking.pipeline(both, paths, alpha=1.0)
        with pytest.raises(RequestError, match="0 pairs"):
            benchmarking.pipeline(both, paths, pairs=0)
    assert found.images == 3
    assert found.ratios == tuple(o / c for o, c in zip(found.obfuscated, found.clean, strict=True))
    assert found.ratio == median(found.ratios)
    assert Pipeline(1, 0.8, (1.0, 2.0, 4.0), (1.0, 1.0, 1.0)).ratio == 0.5
    assert json.loads(json.dumps(found.as_dict()))["ratio"] == found.ratio


def test_the_wire_s_bytes_are_the_release_s(protected: Protected, image: np.ndarray) -> None:
    found = benchmarking.wire(protected, image, alphas=(0.4, 0.8, 0.4), runs=1)
    rows = {one.name: one for one in found.encodings}
    assert list(rows) == ["release, alpha 0.4", "release, alpha 0.8", "FP32", "FP32 as JSON"]
    z = protected.cut([image])
    for alpha in (0.4, 0.8):
        # Fresh noise may leave a channel empty by chance, which then does not travel.
        expected = protected.obfuscate(z, alpha).nbytes
        assert rows[f"release, alpha {alpha:g}"].bytes == pytest.approx(expected, rel=0.05)
    assert rows["FP32"].bytes == 4 * z.numel()
    assert rows["FP32 as JSON"].bytes > rows["FP32"].bytes
    assert found.ratio(rows["FP32"]) == 1.0
    document = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    for row in document["encodings"]:
        assert row["smaller"] == rows["FP32"].bytes / row["bytes"]
        assert {"median", "low", "high", "seconds"} == set(row["write"]) == set(row["read"])


def test_ratios_of_the_wire() -> None:
    one = Timing((1.0,))
    found = Wire((1,), [Encoding("release", 0.8, 10, one, one), Encoding("FP32", None, 80, one, one)])
    assert found.ratio(found.encodings[0]) == 8.0


def test_a_fit_times_its_steps(tiny: "Tiny") -> None:
    with benchmarking.photographs(tiny.photographs, 12) as paths:
        records = [images.read(path) for path in paths]
    found = benchmarking.fit(records, weights=tiny.weights, size=256, batch=2, steps=2)
    assert (found.records, found.batch, len(found.each.seconds)) == (12, 2, 2)
    assert min(found.each.seconds) > 0
    assert found.before > 0
    assert found.per_second == 1 / found.each.median
    with pytest.raises(RequestError, match="0 steps"):
        benchmarking.fit(records, steps=0)


def test_photographs_of_a_folder_and_of_the_sampler(tiny: "Tiny", tmp_path: Path) -> None:
    with benchmarking.photographs(tiny.photographs, 2) as paths:
        assert paths == sorted(tiny.photographs.rglob("*.jpg"))[:2]
    with benchmarking.photographs(None, 11) as paths:
        assert len(paths) == 11
    with pytest.raises(DatasetError), benchmarking.photographs(tmp_path, 2):
        pass
    with pytest.raises(RequestError, match="limit 0"), benchmarking.photographs(None, 0):
        pass
    assert benchmarking.full_hd().shape == (1080, 1920, 3)


@pytest.fixture(scope="module")
def gate() -> dict[str, Any]:
    return runpy.run_path(str(GATE))


@pytest.mark.parametrize(
    ("ratios", "says"),
    [
        ((1.0, 0.05, 0.95), []),
        ((1.01, 0.05, 0.95), ["step/randn is 1.010, more than 1.0"]),
        ((1.0, 0.06, 0.9), ["step/head is 0.060, more than 0.05", "throughput is 0.900, less than 0.95"]),
        ((float("nan"), 0.0, 1.0), ["step/randn is nan, more than 1.0"]),
    ],
)
def test_the_gate_says_what_is_past_its_threshold(
    gate: dict[str, Any], ratios: tuple[float, float, float], says: list[str]
) -> None:
    found = dict(zip(("step/randn", "step/head", "throughput"), ratios, strict=True))
    assert gate["failures"](found) == says


def test_a_line_of_the_history(gate: dict[str, Any]) -> None:
    text = gate["line"](benchmarking.machine(), {"runs": 2}, {"step/head": 0.123456})
    assert "\n" not in text
    document = json.loads(text)
    assert set(document) == {"date", "machine", "settings", "ratios"}
    assert document["ratios"] == {"step/head": 0.1235}
    assert document["machine"]["torch"] == torch.__version__


def test_the_history_parses() -> None:
    for text in GATE.with_name("history.jsonl").read_text(encoding="utf-8").splitlines():
        assert {"step/randn", "step/head", "throughput"} <= set(json.loads(text)["ratios"])
