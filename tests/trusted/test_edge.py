"""A device without torch makes the releases that this process makes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sfumato.core import wire
from sfumato.core.errors import AlphaError, ArtefactError, ImageError, RequestError, ServerError
from sfumato.core.obfuscator import Shape
from sfumato.core.task import Image
from sfumato.tasks.detection.task import FaceDetection
from sfumato.trusted import edge, onnx
from sfumato.trusted.protect import Protected
from tests.trusted.recorder import _Handler, recording, released
from tests.trusted.test_fused import obfuscator

SHAPE, DIGEST, SIDE = Shape(channels=6, k=5, bound=2.0, c_ref=7.5, context=4, block=3), "ab" * 32, 48


@pytest.fixture(scope="module")
def protected() -> Protected:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.Tanh()).eval().requires_grad_(False)
    return Protected(head, obfuscator(SHAPE), FaceDetection(size=(SIDE, SIDE)), DIGEST)


@pytest.fixture(scope="module")
def file(protected: Protected, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("device") / "device.onnx"
    onnx.export(protected, 0.6, place)
    return place


def picture(seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)


class Given:
    def __init__(self, noise: np.ndarray) -> None:
        self.noise = torch.from_numpy(noise)

    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        assert (records, *shape) == self.noise.shape
        return self.noise


def test_codes_are_those_of_torch(protected: Protected, file: Path) -> None:
    device, carrying = edge.Device(file), protected.at(0.6).carrying.numpy()
    noise = np.random.default_rng(1).standard_normal((2, 4, 4, len(carrying)), np.float32)
    x = np.stack([protected.task.preprocess(picture(n)).numpy() for n in range(2)])
    got = device.codes(x, noise)
    want = protected.with_noise(Given(noise))([picture(0), picture(1)], 0.6).tensor.numpy()[:, carrying]
    assert np.abs(got.astype(int) - want).max() <= 1 and (got != want).mean() < 0.01
    assert np.abs(want).max() > 20


def test_a_release_of_a_device_is_a_release(protected: Protected, file: Path) -> None:
    device = edge.Device(file)
    one, other = device.release(picture()), device.release(picture())
    release = wire.from_tensors(one, SHAPE.sent, SHAPE.block, 4)
    assert (release.digest, release.sites) == (DIGEST, (12, 12)) and release.alpha.tolist() == [pytest.approx(0.6)]
    assert (one["CODES"] != other["CODES"]).any()  # noise of its own, every time
    assert list(one) == list(wire.TYPES)


def test_noise_is_standard_normal(protected: Protected, file: Path) -> None:
    device, fused = edge.Device(file), protected.at(0.6)
    quiet = np.zeros((1, *device._noise), np.float32)
    x = protected.task.preprocess(picture()).numpy()[None]
    clean = device.codes(x, quiet)[0].astype(float)
    noisy = np.stack([device.release(picture())["CODES"][0] for _ in range(200)]).astype(float)
    noise = ((noisy - clean) / fused.per_code.numpy()[:, None, None])[:, :, :3, :3]
    assert abs(noise.mean()) < 0.02 and 0.9 < noise.std() < 1.05


def test_it_needs_no_torch(file: Path) -> None:
    code = f"from sfumato.trusted.edge import Device; import sys; Device({str(file)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_is_sent_is_the_release_and_nothing_else(file: Path) -> None:
    tensors = edge.Device(file).release(picture())
    with recording() as server:
        answer = edge.send(server.url, "m", tensors)
        assert answer[0].tolist() == [[0.5, 0.5]]
        sent = released(server, 0, SHAPE.sent, SHAPE.block)
        assert sent.to_bytes() == wire.from_tensors(tensors, SHAPE.sent, SHAPE.block, 4).to_bytes()
        for status in (302, 500):
            server.statuses = [status]
            with pytest.raises(ServerError):
                edge.send(server.url, "m", tensors)
        assert len(server.bodies) == 3  # no redirect was followed
        server.wrong = [{"name": "OUTPUT__0", "datatype": "FP32", "shape": [9, 9], "data": [1.0]}]
        with pytest.raises(ServerError):
            edge.send(server.url, "m", tensors)
        server.wrong = [{"name": "OUTPUT__0", "datatype": "FP32", "shape": [1, 1], "data": [float("nan")]}]
        with pytest.raises(ServerError):
            edge.send(server.url, "m", tensors)
    with pytest.raises(ServerError):
        edge.send(server.url, "m", tensors, timeout=2)


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", b"HTTP/1.1 200 OK\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000, b'HTTP/1.1 200 OK\r\n\r\n{"outputs": []}',
        b'HTTP/1.1 200 OK\r\n\r\n{"outputs": [{"datatype": "INT32", "shape": [1], "data": [99999999999]}]}',
    ],
)  # fmt: skip
def test_answers_that_are_none(file: Path, answer: bytes) -> None:
    class Says(_Handler):
        def do_POST(self) -> None:  # noqa: N802
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(answer)
            self.close_connection = True

    with recording() as server:
        server.RequestHandlerClass = Says
        with pytest.raises(ServerError):
            edge.send(server.url, "m", edge.Device(file).release(picture()), timeout=5)


def test_no_proxy_of_the_environment_sees_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with recording() as server:
        monkeypatch.setenv("http_proxy", server.url)
        with pytest.raises(ServerError):
            edge.send("http://127.0.0.1:9", "m", edge.Device(file).release(picture()), timeout=5)
        assert not server.bodies


def test_a_task_that_does_more_than_a_device_is_refused(protected: Protected, tmp_path: Path) -> None:
    class Scaled(FaceDetection):
        def preprocess(self, record: Image) -> Tensor:
            return super().preprocess(record) / 255

    scaled = Protected(protected.head, protected.obfuscator, Scaled(size=(SIDE, SIDE)), DIGEST)
    with pytest.raises(RequestError):
        onnx.export(scaled, 0.6, tmp_path / "x.onnx")


@pytest.mark.parametrize("url", ["http://example.org", "ftp://127.0.0.1", "file:///etc", "127.0.0.1:8000"])
def test_addresses_that_would_show_it_are_refused(file: Path, url: str) -> None:
    with pytest.raises(RequestError):
        edge.send(url, "m", edge.Device(file).release(picture()))


def test_bad_input(protected: Protected, file: Path, tmp_path: Path) -> None:
    (tmp_path / "none.onnx").write_bytes(b"no graph")
    for place in (tmp_path / "none.onnx", tmp_path / "absent.onnx"):
        with pytest.raises(ArtefactError):
            edge.Device(place)
    for wrong in (picture()[:-1], picture().astype(np.float32), picture()[..., :2]):
        with pytest.raises(ImageError):
            edge.Device(file).release(wrong)
    with pytest.raises(AlphaError):
        onnx.export(protected, 1.0, tmp_path / "x.onnx")
    open_ = Protected(protected.head, protected.obfuscator, FaceDetection(size=None), DIGEST)
    with pytest.raises(RequestError):
        onnx.export(open_, 0.8, tmp_path / "x.onnx")
