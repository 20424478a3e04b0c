"""The real tritonserver: three models, HTTP and gRPC, clients, wrong requests, new versions, a kill in mid-flight.

It comes with the wheel of `sfumato.outside.serving.WHEEL`, which `make triton` installs; without it these tests skip.
"""

import asyncio
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfumato import facade
from sfumato.core import wire
from sfumato.core.errors import RequestError, ServerError, SfumatoError
from sfumato.core.task import Image
from sfumato.datasets import images, sampler
from sfumato.outside import repository, serving
from sfumato.tasks.detection.task import FaceDetection
from sfumato.trusted import edge
from sfumato.trusted import onnx as device
from sfumato.trusted.client import AsyncClient, Client
from sfumato.trusted.guard import Guard
from sfumato.trusted.ledger import Ledger, Policy
from sfumato.trusted.noise import Keyed
from sfumato.trusted.protect import Protected

try:
    serving.binary()
except RequestError as error:
    pytest.skip(f"no tritonserver: make triton ({error.got})", allow_module_level=True)

SIDE, KEY = 256, bytes(range(32))


def plan_of(protected: Protected, **options: Any) -> repository.Plan:
    assert protected.outside is not None and protected.reference is not None
    return repository.Plan(
        task="face-detection",
        outside=protected.outside,  # type: ignore[arg-type]
        base=protected.reference,
        server=facade.SHIPPED / "server.safetensors",
        model_digest=facade.face_split().digest(),
        ndim=4,
        size=(SIDE // 32, SIDE // 32),
        **options,
    )


@pytest.fixture(scope="module")
def protected() -> Protected:
    return facade.load(task=FaceDetection(size=(SIDE, SIDE))).with_noise(Keyed(KEY))


@pytest.fixture(scope="module")
def models(protected: Protected, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    assert len(repository.write(plan_of(protected), place)) == 3
    assert repository.write(plan_of(protected), place) == []
    return place


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[serving.Server]:
    with serving.serve(models, ports=(0, 0, 0)) as one:
        yield one


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Image]:
    folder = sampler.compose(tmp_path_factory.mktemp("sampler") / "s", images=10, seed=0)
    return [images.read(path) for path in images.paths(folder)]


@pytest.fixture
def door(protected: Protected, tmp_path: Path) -> Guard:
    return Guard(protected, Ledger(tmp_path / "ledger.db", Policy()), KEY)


def urls(server: serving.Server) -> dict[str, str]:
    return {"http": f"http://127.0.0.1:{server.http}", "grpc": f"grpc://127.0.0.1:{server.grpc}"}


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("model", ["face_detection_release", "face_detection_noisy"])
@pytest.mark.parametrize("shared", [False, True])
def test_answers_are_those_of_this_process(
    server: serving.Server, door: Guard, photographs: list[Image], protocol: str, model: str, shared: bool
) -> None:
    release = door(photographs[:3], [0.8, 0.8, 0.4])
    assert door.protected.outside is not None
    expected = door.protected.outside(release)
    with Client(urls(server)[protocol], door, model=model, shared_memory=shared) as client:
        time.sleep(0.3)  # a server counts after it answered
        before = counted(client)
        answers = client(release)
        time.sleep(0.3)
        assert counted(client) == before + 3
    for got, want in zip(answers, expected, strict=True):
        assert np.abs(got - want.numpy()).max() <= 1e-4


def counted(client: Client) -> int:
    """Records that the server's statistics say it answered."""
    return int(client.statistics()["model_stats"][0]["inference_count"])


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_detections_are_those_of_this_process(
    server: serving.Server, door: Guard, photographs: list[Image], protocol: str
) -> None:
    assert door.protected.outside is not None
    with Client(urls(server)[protocol], door, compression="gzip") as client:
        found = client.detect(photographs, 0.8)
    faces = 0
    for photograph, got in zip(photographs, found, strict=True):
        size = (photograph.shape[0], photograph.shape[1])
        want = door.protected.postprocess(door.protected.outside(door.protected(photograph, 0.8)), size)
        assert np.allclose(got.boxes, want.boxes, atol=1e-4 * max(size)) and np.allclose(
            got.scores, want.scores, atol=1e-4
        )
        faces += len(got.scores)
    assert faces >= 5


def test_asynchronous_clients_share_a_server(server: serving.Server, door: Guard, photographs: list[Image]) -> None:
    async def go(url: str) -> list[Any]:
        async with AsyncClient(url, door) as client:
            return await asyncio.gather(*(client.detect(one, 0.8) for one in photographs[:6]))

    for url in urls(server).values():
        assert (
            [len(one.scores) for one in asyncio.run(go(url))]
            == [
                len(door.protected.postprocess(door.protected.outside(door.protected(one, 0.8)), one.shape[:2]).scores)  # type: ignore[misc]
                for one in photographs[:6]
            ]
        )


def test_the_clean_model_is_the_providers_and_no_client_sends_to_it(
    server: serving.Server, door: Guard, photographs: list[Image]
) -> None:
    import tritonclient.http as httpclient

    z = door.protected.cut(photographs[:1]).contiguous()
    given = httpclient.InferInput("INPUT__0", list(z.shape), "FP32")
    given.set_data_from_numpy(z.numpy(), binary_data=False)
    raw = httpclient.InferenceServerClient(f"127.0.0.1:{server.http}")
    answer = raw.infer("face_detection_base", [given])
    assert door.protected.reference is not None
    with torch.no_grad():
        want = door.protected.reference(z)
    assert all(np.abs(answer.as_numpy(f"OUTPUT__{i}") - one.numpy()).max() <= 1e-4 for i, one in enumerate(want))
    raw.close()
    with pytest.raises(ServerError, match="clean"):
        Client(urls(server)["http"], door, model="face_detection_base")(door(photographs[0]))


def test_what_is_no_release_is_refused_and_the_others_are_answered(
    server: serving.Server, door: Guard, photographs: list[Image]
) -> None:
    release = door(photographs[0])
    sound = wire.to_tensors(release, door.protected.at(0.8).carrying.numpy())
    wrong = {
        "DIGEST": sound["DIGEST"] ^ 1,
        "ALPHA": np.full((1, 1), np.nan, np.float32),
        "SITES": np.array([[8, 7]], np.int32) * 9,
        "CHANNELS": ~sound["CHANNELS"],
        "CODES": np.full_like(sound["CODES"], -128),
    }
    url, answered, refused = urls(server)["http"], [], []

    def send(tensors: wire.Tensors) -> None:
        try:
            answered.append(edge.send(url, "face_detection_release", tensors))
        except ServerError as error:
            refused.append(error)

    threads = [threading.Thread(target=send, args=({**sound, name: value},)) for name, value in wrong.items()]
    threads += [threading.Thread(target=send, args=(sound,)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == len(wrong) and len(answered) == 5
    assert all(error.status == "refused" for error in refused)
    assert door.protected.outside is not None
    want = door.protected.outside(release)
    assert all(np.abs(a - w.numpy()).max() <= 1e-4 for one in answered for a, w in zip(one, want, strict=True))


def test_a_client_of_another_artefact_finds_out_before_it_sends(
    server: serving.Server, protected: Protected, photographs: list[Image], tmp_path: Path
) -> None:
    other = Protected(protected.head, protected.obfuscator, protected.task, "cd" * 32, noise=Keyed(KEY))
    foreign = Guard(other, Ledger(tmp_path / "other.db", Policy()), KEY)
    with Client(urls(server)["grpc"], foreign) as client, pytest.raises(ServerError, match="both files of one fit"):
        client(foreign(photographs[0]))


def test_configuration_says_what_is_served(server: serving.Server, protected: Protected) -> None:
    told = serving.settings(server)
    facts = {name: config["parameters"] for name, config in told.items()}
    assert set(facts) == {f"face_detection_{kind}" for kind in ("base", "noisy", "release")}
    release: Any = facts["face_detection_release"]
    assert release["artefact_digest"]["string_value"] == protected.digest
    noisy: Any = told["face_detection_noisy"]
    assert noisy["input"][0]["name"] == "INPUT__0" and noisy["input"][0]["dims"] == [128, -1, -1]
    assert [output["name"] for output in noisy["output"]] == ["OUTPUT__0", "OUTPUT__1"]


def test_a_device_without_torch_speaks_to_it(
    server: serving.Server, protected: Protected, photographs: list[Image], tmp_path: Path
) -> None:
    import cv2

    device.export(protected, 0.8, tmp_path / "device.onnx")
    one = edge.Device(tmp_path / "device.onnx")
    frame = cv2.resize(photographs[0], (SIDE, SIDE))
    answers = edge.send(urls(server)["http"], "face_detection_release", one.release(frame))
    found = protected.postprocess(tuple(torch.from_numpy(a.copy()) for a in answers), (SIDE, SIDE))
    assert len(found.above(0.5).scores) >= 1


@pytest.mark.parametrize("script", ["client.py", "tr_4928.py"])
def test_the_examples_run(server: serving.Server, photographs: list[Image], tmp_path: Path, script: str) -> None:
    import cv2

    cv2.imwrite(str(tmp_path / "photograph.png"), photographs[0])
    path = Path(__file__).resolve().parent.parent / "examples" / "triton" / script
    url = urls(server)["grpc"] if script == "client.py" else f"127.0.0.1:{server.http}"
    done = subprocess.run(
        [sys.executable, str(path), url, "photograph.png"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "photograph.png: 1 faces" in done.stdout
    assert ("the server answered" if script == "client.py" else "inference_count") in done.stdout
    assert (tmp_path / "photograph-faces.jpg").exists() == (script == "client.py")


class Tapped:
    """Forwards a port and keeps what passes towards the server."""

    def __init__(self, port: int) -> None:
        self.heard = bytearray()
        self._to = port
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                inside, _ = self._socket.accept()
            except OSError:
                return
            outside = socket.create_connection(("127.0.0.1", self._to))
            for source, target, kept in ((inside, outside, True), (outside, inside, False)):
                threading.Thread(target=self._pass, args=(source, target, kept), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, kept: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if kept:
                    self.heard += data
                target.sendall(data)
        except OSError:
            pass
        finally:
            for one in (source, target):
                one.close()

    def close(self) -> None:
        self._socket.close()


def test_releases_alone_are_on_the_wire(server: serving.Server, door: Guard, photographs: list[Image]) -> None:
    tap = Tapped(server.http)
    releases = [door(one, 0.8) for one in photographs]
    with Client(f"http://127.0.0.1:{tap.port}", door) as client:
        for release in releases:
            client(release)
    heard, found = bytes(tap.heard), []
    tap.close()
    while heard:
        head, _, heard = heard.partition(b"\r\n\r\n")
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
        lowered = {name.lower(): value for name, value in fields.items()}
        size = int(lowered.get(b"content-length", b"0"))
        body, heard = heard[:size], heard[size:]
        if not body:
            assert head.startswith(b"GET /v2/models/face_detection_release")
            continue
        split = int(lowered[b"inference-header-content-length"])
        found.append(release_in(body, split))
    assert [one.to_bytes() for one in found] == [one.to_bytes() for one in releases]


def release_in(body: bytes, split: int) -> Any:
    """The release a request holds; every byte of the body belongs to it or to the header that names the tensors."""
    from tests.trusted.recorder import tensors

    told = json.loads(body[:split])
    assert set(told) <= {"inputs", "outputs", "id", "parameters"}
    assert all(set(one) <= {"name", "shape", "datatype", "parameters"} for one in told["inputs"])
    return wire.from_tensors(tensors(body, split), 4096, 8, 4)


def test_a_poller_sees_whole_versions_only(
    protected: Protected, door: Guard, photographs: list[Image], tmp_path: Path
) -> None:
    models = tmp_path / "models"
    repository.write(plan_of(protected), models)
    said: list[str] = []
    with serving.serve(models, ports=(0, 0, 0), poll=True, log=said.append) as server:
        release, failed, done = door(photographs[0]), [], threading.Event()

        def ask() -> None:
            with Client(urls(server)["grpc"], door) as client:
                while not done.is_set():
                    try:
                        client(release)
                    except ServerError as error:
                        failed.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        changed = dataclasses.replace(plan_of(protected), batch=8)
        written = repository.write(changed, models)
        assert [version.name for version in written] == ["2", "2", "2"]
        wanted = [f"successfully loaded 'face_detection_{kind}'" for kind in ("base", "noisy", "release")]
        end = time.monotonic() + 240
        while time.monotonic() < end and any(sum(text in line for line in said) < 2 for text in wanted):
            time.sleep(0.2)
        done.set()
        asking.join()
        with Client(urls(server)["grpc"], door) as client:
            assert client.served.batch == 8
    assert failed == []
    assert [line for line in said if "error" in line or "fatal" in line] == []


def test_a_server_killed_in_mid_flight_costs_no_second_draw(
    models: Path, door: Guard, photographs: list[Image]
) -> None:
    with serving.serve(models, ports=(0, 0, 0)) as first:
        port = first.http
        client = Client(f"http://127.0.0.1:{port}", door, retries=8)
        release = door(photographs[0])
        client(release)
        os.killpg(first.process.pid, signal.SIGKILL)
        first.process.wait()
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(client(release)))
    with pytest.raises(ServerError):
        Client(f"http://127.0.0.1:{port}", door, retries=0)(release)
    with serving.serve(models, ports=(port, 0, 0)) as second:
        assert second.http == port
        thread.start()
        thread.join()
    assert len(answers) == 1 and door.ledger.totals().releases == 1


def test_serve_says_why_it_cannot(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no model"), serving.serve(tmp_path):
        pass
    with pytest.raises(RequestError, match="no program"):
        serving.binary(str(tmp_path / "none"))
    broken = tmp_path / "models" / "m" / "1"
    broken.mkdir(parents=True)
    (broken.parent / "config.pbtxt").write_text('name: "m"\nbackend: "python"\n')
    (broken / "model.py").write_text("import nothing_of_that_name\n")
    with (
        pytest.raises(SfumatoError, match="nothing_of_that_name"),
        serving.serve(tmp_path / "models", ports=(0, 0, 0)),
    ):
        pass


def test_the_server_gets_no_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENANT_KEY", "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    passed = serving._environment()
    assert "secret" not in passed.values() and passed["OMP_NUM_THREADS"] == "1" and passed["PYTHONPATH"]


def test_a_taken_port_is_not_asked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serving.free_port("127.0.0.1", port) not in (0, port)


def test_the_verb_stops_when_asked_to(models: Path) -> None:
    command = [sys.executable, "-c", "from sfumato.cli.app import main; main()", "serve", str(models)]
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    process = subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(4)]
    assert [line.split(":")[0] for line in said] == ["models", "http", "grpc", "metrics"]
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out == "" and "stopped" in err
