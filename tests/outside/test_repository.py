"""What is exported computes what the modules compute, in every backend, and a version is there whole or not at all."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from sfumato.core import wire
from sfumato.core.errors import OutputError, RequestError
from sfumato.core.obfuscator import Shape
from sfumato.core.release import Release
from sfumato.outside import repository
from sfumato.outside.model import Outside
from tests.outside.test_fused import restorer, sent

SHAPE, DIGEST = Shape(channels=6, k=5, bound=2.0, c_ref=7.5, context=4, block=3), "ab" * 32
SCRIPT_WARNS = pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:DeprecationWarning")


class Tail(nn.Module):
    """Two outputs, one whose size is the input's."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.near, self.far = nn.Conv2d(6, 4, 3, 2, 1), nn.Linear(4, 3)

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.near(z))
        return {"places": x.flatten(2).transpose(1, 2), "classes": self.far(x.mean((2, 3)))}


@pytest.fixture
def plan(tmp_path: Path) -> repository.Plan:
    server = tmp_path / "server.safetensors"
    server.write_bytes(b"what was fitted")
    outside, base = Outside(restorer(SHAPE), Tail(1), DIGEST), Tail(2).eval()
    return repository.Plan("seeing", outside, base, server, "cd" * 32, 4, (6, 9))


def tensors(plan: repository.Plan, alphas: list[float], size: tuple[int, int]) -> tuple[wire.Tensors, Release]:
    """Of records that send as many channels each."""
    codes = torch.cat([sent(SHAPE, 1, a, size, plan.outside.restorer, seed) for seed, a in enumerate(alphas)])
    release = Release(codes, torch.tensor(alphas), DIGEST, torch.zeros(len(alphas)), 4, 3, size)
    return wire.to_tensors(release, np.arange(SHAPE.sent)), release


def run(backend: str, place: Path, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    if backend == "onnxruntime":
        session = onnxruntime.InferenceSession(place / "model.onnx", providers=["CPUExecutionProvider"])
        return list(session.run(None, dict(inputs)))
    if backend == "pytorch":
        answers: Any = torch.jit.load(place / "model.pt")(*(torch.from_numpy(one) for one in inputs.values()))
    else:
        answers = torch.export.load(place / "tail.pt2").module()(*(torch.from_numpy(one) for one in inputs.values()))
    return [one.detach().numpy() for one in answers]


@SCRIPT_WARNS
@pytest.mark.parametrize("backend", repository.BACKENDS)
def test_every_backend_answers_as_the_modules_do(plan: repository.Plan, tmp_path: Path, backend: str) -> None:
    plan = dataclasses.replace(plan, backend=backend)
    made = repository.write(plan, tmp_path / "models")
    assert [version.relative_to(tmp_path).as_posix() for version in made] == [
        f"models/seeing_{kind}/1" for kind in ("base", "noisy", "release")
    ]
    for seed, (count, size) in enumerate([(1, (6, 9)), (3, (12, 6)), (2, (9, 9))]):
        z = torch.randn(count, 6, *size, generator=torch.Generator().manual_seed(seed))
        for version, tail in zip(made, (plan.base, plan.outside.tail), strict=False):
            want = tail(z)
            for got, one in zip(run(backend, version, {"INPUT__0": z.numpy()}), want.values(), strict=True):
                np.testing.assert_allclose(got, one.detach().numpy(), atol=1e-5)
        if backend != "python":
            inputs, release = tensors(plan, [0.3, 0.8, 0.6][:count], size)
            for got, one in zip(run(backend, made[2], inputs), plan.outside(release).values(), strict=True):
                np.testing.assert_allclose(got, one.numpy(), atol=1e-4)


@SCRIPT_WARNS
@pytest.mark.parametrize("backend", ["onnxruntime", "pytorch"])
@pytest.mark.parametrize("name", ["DIGEST", "SITES"])
def test_a_graph_answers_no_other_obfuscator_and_no_part_of_a_block(
    plan: repository.Plan, tmp_path: Path, backend: str, name: str
) -> None:
    plan = dataclasses.replace(plan, backend=backend)
    version = repository.write(plan, tmp_path / "models")[2]
    inputs, _ = tensors(plan, [0.8, 0.8], (6, 9))
    inputs[name] = inputs[name].copy()
    inputs[name][1, -1] -= 1
    for answer in run(backend, version, inputs):
        assert np.isfinite(answer[0]).all() and np.isnan(answer[1]).all()


@SCRIPT_WARNS
@pytest.mark.parametrize("backend", ["onnxruntime", "pytorch"])
@pytest.mark.parametrize("wrong", ["more", "fewer", "alpha"])
def test_a_row_that_lies_costs_the_others_nothing(
    plan: repository.Plan, tmp_path: Path, backend: str, wrong: str
) -> None:
    plan = dataclasses.replace(plan, backend=backend)
    version = repository.write(plan, tmp_path / "models")[2]
    inputs = {name: np.array(one) for name, one in tensors(plan, [0.8, 0.8], (6, 9))[0].items()}
    inputs["CODES"] = np.ascontiguousarray(inputs["CODES"][:, :3])
    inputs["CHANNELS"][:] = 0
    inputs["CHANNELS"][:, 0] = 7
    if wrong == "alpha":
        inputs["ALPHA"][1] = 1
    else:
        inputs["CHANNELS"][1, 0] = {"more": 255, "fewer": 3}[wrong]
    for answer in run(backend, version, inputs):
        assert np.isfinite(answer[0]).all() and np.isnan(answer[1]).all()


def test_the_configuration_says_what_goes_in_and_out(plan: repository.Plan, tmp_path: Path) -> None:
    repository.write(dataclasses.replace(plan, gpu=True, instances=2, batch=4), tmp_path / "models")
    told = (tmp_path / "models/seeing_release/config.pbtxt").read_text()
    for line in (
        'name: "seeing_release"', "max_batch_size: 4", "KIND_GPU count: 2", "dims: [-1, -1, -1]",
        '"OUTPUT__0" data_type: TYPE_FP32 dims: [-1, 4]', '"OUTPUT__1" data_type: TYPE_FP32 dims: [3]', DIGEST,
    ):  # fmt: skip
        assert line in told
    assert "TYPE_FP32 dims: [6, -1, -1]" in (tmp_path / "models/seeing_noisy/config.pbtxt").read_text()
    assert DIGEST not in (tmp_path / "models/seeing_base/config.pbtxt").read_text()


def test_what_is_there_already_is_left_alone_and_what_changed_is_a_new_version(
    plan: repository.Plan, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    repository.write(plan, models)
    before = {path: path.stat().st_mtime_ns for path in models.rglob("*")}
    assert repository.write(plan, models) == []
    assert {path: path.stat().st_mtime_ns for path in models.rglob("*")} == before
    plan.server.write_bytes(b"fitted again")
    assert [version.name for version in repository.write(plan, models)] == ["2", "2"]
    assert not (models / "seeing_base/2").exists() and (models / "seeing_release/1").exists()
    with pytest.raises(RequestError, match="another backend"):
        repository.write(dataclasses.replace(plan, backend="pytorch"), models)


def test_a_killed_export_leaves_no_model(
    plan: repository.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sfumato.outside.repository.write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            repository.write(plan, models)
    assert not list(models.glob("*/config.pbtxt")) and not list(tmp_path.glob(".sfumato-*"))
    assert len(repository.write(plan, models)) == 3 and len(list(models.glob("*/config.pbtxt"))) == 3


def test_a_kill_between_a_version_and_its_configuration_is_made_good(
    plan: repository.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, config = tmp_path / "models", tmp_path / "models/seeing_release/config.pbtxt"
    repository.write(plan, models)
    fitted = dataclasses.replace(plan, outside=Outside(plan.outside.restorer, plan.outside.tail, "ef" * 32))

    def killed(path: Path, data: bytes) -> None:
        if path == config:
            raise KeyboardInterrupt
        path.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr("sfumato.outside.repository.write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            repository.write(fitted, models)
    assert DIGEST in config.read_text()
    assert repository.write(fitted, models) == [models / "seeing_release/2"]
    assert "ef" * 32 in config.read_text() and repository.write(fitted, models) == []


def test_every_version_is_warmed_up_with_a_release_of_its_own(plan: repository.Plan, tmp_path: Path) -> None:
    models = tmp_path / "models"
    repository.write(plan, models)
    other = Outside(plan.outside.restorer, plan.outside.tail, "ef" * 32)
    for again in (dataclasses.replace(plan, size=(12, 12)), dataclasses.replace(plan, outside=other)):
        repository.write(again, models)
        told = (models / "seeing_release/config.pbtxt").read_text()
        found = re.findall(r'key: "(\w+)" value: .*dims: \[(.*?)\] input_data_file: "(.*?)"', told)
        assert [name for name, _, _ in found] == list(wire.TYPES)
        for name, dims, file in found:
            data = (models / "seeing_release/warmup" / file).read_bytes()
            wide = 4 if wire.TYPES[name] in ("FP32", "INT32") else 1
            assert len(data) == wide * math.prod(int(side) for side in dims.split(","))
            assert name != "DIGEST" or data.hex() == again.outside.digest


@pytest.mark.parametrize("configured", [False, True])
def test_a_model_of_another_origin_is_left_alone(plan: repository.Plan, tmp_path: Path, configured: bool) -> None:
    file = tmp_path / "models/seeing_base/1/model.pt2"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"of another origin")
    if configured:
        (file.parents[1] / "config.pbtxt").write_text('backend: "python"')
    with pytest.raises(RequestError, match="another origin"):
        repository.write(plan, tmp_path / "models")
    assert file.read_bytes() == b"of another origin"


def test_two_exports_at_once_are_one_after_the_other(plan: repository.Plan, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with repository._alone(models):
            second = pool.submit(repository.write, plan, models)
            with pytest.raises(TimeoutError):
                second.result(1)
            assert not list(models.iterdir())
        assert len(second.result(60)) == 3


class Branching(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z if float(z.sum()) > 0 else -z


@pytest.mark.parametrize("backend", ["python", "onnxruntime"])
def test_a_tail_that_cannot_be_traced_says_so(plan: repository.Plan, tmp_path: Path, backend: str) -> None:
    with pytest.raises(RequestError, match="cannot be traced"):
        repository.write(dataclasses.replace(plan, base=Branching(), backend=backend), tmp_path / "models")


def test_bad_requests(plan: repository.Plan, tmp_path: Path) -> None:
    for wrong in ({"backend": "tensorflow"}, {"batch": 0}, {"instances": 0}, {"delay": -1}):
        with pytest.raises(RequestError):
            dataclasses.replace(plan, **wrong)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        repository.write(plan, tmp_path / "file")


def test_versions_name_what_they_are_of(plan: repository.Plan, tmp_path: Path) -> None:
    version = repository.write(plan, tmp_path / "models")[2]
    told = json.loads((version / "sfumato.json").read_text())
    assert (told["artefact_digest"], told["kind"], told["task"]) == (DIGEST, "release", "seeing")
