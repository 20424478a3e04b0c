"""Unchanged clients of both protocols get the model's answers, the server outside gets releases and nothing else."""

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from tritonclient.utils import InferenceServerException

from sfumato.trusted.guard import Guard
from sfumato.trusted.ledger import Policy
from tests.gateway.upstream import MODEL, SIDE, Running, Tail, ask, door, gateway, picture, sent, tail

LIBRARIES = {"http": over_http, "grpc": over_grpc}


@pytest.fixture
def outside() -> Iterator[Tail]:
    with tail() as server:
        yield server


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    return door(tmp_path, Policy(min_alpha=0.5, max_releases=20))


@pytest.fixture
def running(outside: Tail, guard: Guard) -> Iterator[Running]:
    with gateway(outside.url, guard) as one:
        yield one


def encoded(image: np.ndarray, kind: str = ".png") -> bytes:
    return bytes(cv2.imencode(kind, image)[1].tobytes())


def given(library: Any, name: str, array: np.ndarray, datatype: str) -> Any:
    one = library.InferInput(name, list(array.shape), datatype)
    one.set_data_from_numpy(array)
    return one


def forms(guard: Guard, image: np.ndarray) -> list[tuple[str, np.ndarray, str]]:
    """One picture in every way it may come."""
    return [
        ("IMAGE", np.array([encoded(image)], object), "BYTES"),
        ("IMAGE", np.array([[encoded(image)]], object), "BYTES"),
        ("IMAGE", image[None], "UINT8"),
        ("INPUT__0", guard.protected.task.preprocess(image).numpy()[None], "FP32"),
    ]


def in_process(guard: Guard, image: np.ndarray, alpha: float = 0.8) -> list[np.ndarray]:
    assert guard.protected.outside is not None
    return [output.detach().numpy() for output in guard.protected.outside(guard.protected(image, alpha))]


@pytest.mark.parametrize("protocol", LIBRARIES)
def test_an_unchanged_client_gets_the_answers_that_a_process_of_its_own_would(
    protocol: str, running: Running, guard: Guard, outside: Tail
) -> None:
    library, image = LIBRARIES[protocol], picture(1)
    with library.InferenceServerClient(getattr(running, protocol)) as client:
        for form in forms(guard, image):
            answer = client.infer(MODEL, [given(library, *form)], request_id="a name")
            for i, wanted in enumerate(in_process(guard, image)):
                np.testing.assert_allclose(answer.as_numpy(f"OUTPUT__{i}"), wanted, atol=1e-6)
    releases = sent(outside)
    assert len(releases) == 4 and all(torch.equal(one.tensor, releases[0].tensor) for one in releases)
    assert guard.ledger.totals().releases == 4


@pytest.mark.parametrize("protocol", LIBRARIES)
def test_what_else_such_clients_ask(protocol: str, running: Running) -> None:
    library = LIBRARIES[protocol]
    as_json = {"as_json": True} if protocol == "grpc" else {}
    with library.InferenceServerClient(getattr(running, protocol)) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(MODEL)
        assert client.get_server_metadata(**as_json)["name"] == "sfumato gateway"
        told = client.get_model_metadata(MODEL, **as_json)
        assert (told["name"], told["versions"]) == (MODEL, ["1", "7"])
        assert [one["name"] for one in told["inputs"]] == ["IMAGE", "INPUT__0"]
        assert [(one["name"], one["datatype"]) for one in told["outputs"]] == [
            ("OUTPUT__0", "FP32"), ("OUTPUT__1", "FP32"),
        ]  # fmt: skip
        assert client.get_model_config(MODEL, **as_json)
        index = client.get_model_repository_index(**as_json)
        assert (index["models"] if protocol == "grpc" else index)[0] == {"name": MODEL, "state": "READY"}
        client.infer(MODEL, [given(library, "IMAGE", picture()[None], "UINT8")], model_version="7")
        stats = client.get_inference_statistics(MODEL, **as_json)["model_stats"][0]
        assert int(stats["inference_count"]) == 1 and int(stats["inference_stats"]["success"]["ns"]) > 0
        for wrong in ("nothing", f"{MODEL}_release"):
            with pytest.raises(InferenceServerException, match="no such model"):
                client.get_model_metadata(wrong)
            with pytest.raises(InferenceServerException, match="no such model"):
                client.infer(wrong, [given(library, "IMAGE", picture()[None], "UINT8")])
        for wrong in ("9", "1"):  # the server outside answers with its newest
            with pytest.raises(InferenceServerException, match="no such version"):
                client.infer(MODEL, [given(library, "IMAGE", picture()[None], "UINT8")], model_version=wrong)


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_http_bodies_may_be_compressed(compression: str, running: Running) -> None:
    with over_http.InferenceServerClient(running.http) as client:
        one = given(over_http, "IMAGE", picture()[None], "UINT8")
        answer = client.infer(MODEL, [one], request_compression_algorithm=compression)
    assert answer.as_numpy("OUTPUT__0").shape[0] == 1


def test_grpc_may_be_compressed(running: Running) -> None:
    with over_grpc.InferenceServerClient(running.grpc) as client:
        one = given(over_grpc, "IMAGE", picture()[None], "UINT8")
        assert client.infer(MODEL, [one], compression_algorithm="gzip").as_numpy("OUTPUT__0").shape[0] == 1


def test_plain_json_does_as_well(running: Running, guard: Guard) -> None:
    image = picture(2)
    text = base64.b64encode(encoded(image)).decode()
    asked: dict[str, Any] = {
        "id": "7",
        "inputs": [{"name": "IMAGE", "datatype": "BYTES", "shape": [1], "data": [text]}],
        "outputs": [{"name": "OUTPUT__1"}],
    }
    status, headers, body = ask(running.http, "POST", f"/v2/models/{MODEL}/infer", json.dumps(asked).encode())
    told = json.loads(body)
    assert (status, headers["Content-Type"], told["id"]) == (200, "application/json", "7")
    assert [one["name"] for one in told["outputs"]] == ["OUTPUT__1"]
    wanted = in_process(guard, image)[1]
    got = np.array(told["outputs"][0]["data"], np.float32).reshape(told["outputs"][0]["shape"])
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    asked["inputs"][0] = {"name": "IMAGE", "datatype": "UINT8", "shape": [1, *image.shape], "data": image.tolist()}
    status, _, body = ask(running.http, "POST", f"/v2/models/{MODEL}/infer", json.dumps(asked).encode())
    assert status == 200 and json.loads(body)["outputs"] == told["outputs"]


def test_several_records_in_one_request(running: Running, guard: Guard, outside: Tail) -> None:
    batch = [picture(3), picture(4, 99, 77)]
    one = given(over_grpc, "IMAGE", np.array([encoded(x) for x in batch], object), "BYTES")
    with over_grpc.InferenceServerClient(running.grpc) as client:
        answer = client.infer(MODEL, [one])
    for row, image in enumerate(batch):
        for i, wanted in enumerate(in_process(guard, image)):
            np.testing.assert_allclose(answer.as_numpy(f"OUTPUT__{i}")[row : row + 1], wanted, atol=1e-5)
    assert len(sent(outside)) == 2 and guard.ledger.totals().releases == 2


def test_alpha_is_the_requests_within_the_policy(running: Running, guard: Guard, outside: Tail) -> None:
    with over_http.InferenceServerClient(running.http) as http, over_grpc.InferenceServerClient(running.grpc) as grpc:
        for library, client in ((over_http, http), (over_grpc, grpc)):
            one = given(library, "IMAGE", picture()[None], "UINT8")
            client.infer(MODEL, [one], parameters={"alpha": 0.9})
            for refused, status in ((0.3, ("403", "PERMISSION_DENIED")), (1.0, ("400", "INVALID_ARGUMENT"))):
                with pytest.raises(InferenceServerException, match="alpha") as error:
                    client.infer(MODEL, [one], parameters={"alpha": refused})
                assert str(error.value.status()).removeprefix("StatusCode.") in status
            for wrong in ("much", True):
                with pytest.raises(InferenceServerException, match="alpha"):
                    client.infer(MODEL, [one], parameters={"alpha": wrong})
    assert [float(one.alpha[0]) for one in sent(outside)] == pytest.approx([0.9, 0.9])
    assert guard.ledger.totals().releases == 2


def test_past_the_policy_nothing_is_sent(running: Running, guard: Guard, outside: Tail) -> None:
    one = given(over_http, "IMAGE", picture()[None], "UINT8")
    with over_http.InferenceServerClient(running.http) as client:
        for _ in range(20):
            client.infer(MODEL, [one])
        with pytest.raises(InferenceServerException, match="at most 20, by the policy") as error:
            client.infer(MODEL, [one])
    assert error.value.status() == "403"
    assert len(sent(outside)) == 20 and running.lines()[-1]["reason"] == "policy"


def tensors(image: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(change(door_task().preprocess(image).numpy()[None].copy()))


def door_task() -> Any:
    from tests.gateway.upstream import _SHIPPED

    return _SHIPPED.task


@pytest.mark.parametrize(
    ("name", "array", "datatype"),
    [
        ("INPUT__0", tensors(picture(), lambda x: x + 0.25), "FP32"),
        ("INPUT__0", tensors(picture(), lambda x: x + 200), "FP32"),
        ("INPUT__0", tensors(picture(), lambda x: np.where(x == x.max(), np.nan, x).astype(np.float32)), "FP32"),
        ("INPUT__0", tensors(picture(), lambda x: np.full_like(x, np.inf)), "FP32"),
        ("INPUT__0", tensors(picture(), lambda x: x[:, :, 1:]), "FP32"),
        ("INPUT__0", tensors(picture(), lambda x: x[:, :1]), "FP32"),
        ("INPUT__0", tensors(picture(), lambda x: x[0]), "FP32"),
        ("INPUT__0", picture()[None], "UINT8"),
        ("IMAGE", tensors(picture(), lambda x: x), "FP32"),
        ("IMAGE", picture()[None, ..., :1], "UINT8"),
        ("IMAGE", picture(), "UINT8"),
        ("IMAGE", np.zeros((0, 8, 8, 3), np.uint8), "UINT8"),
        ("IMAGE", np.zeros((1, 0, 8, 3), np.uint8), "UINT8"),
        ("IMAGE", np.zeros((17, 8, 8, 3), np.uint8), "UINT8"),
        ("IMAGE", np.array([b"no picture"], object), "BYTES"),
        ("IMAGE", np.array([b""], object), "BYTES"),
        ("IMAGE", np.array([encoded(picture())[:-30]], object), "BYTES"),
        ("IMAGE", np.array([encoded(picture(), ".bmp")], object), "BYTES"),
        ("IMAGE", np.array([[encoded(picture())] * 2], object), "BYTES"),
        ("INPUT__0", np.array([encoded(picture())], object), "BYTES"),
        ("CODES", picture()[None], "UINT8"),
        ("IMAGE", np.zeros((1, 2, 2, 3), np.int8), "INT8"),
    ],
)
def test_what_is_no_picture_is_400(name: str, array: np.ndarray, datatype: str, outside: Tail, tmp_path: Path) -> None:
    with gateway(outside.url, door(tmp_path)) as running:
        for protocol, library in LIBRARIES.items():
            with library.InferenceServerClient(getattr(running, protocol)) as client:
                with pytest.raises(InferenceServerException) as error:
                    client.infer(MODEL, [given(library, name, array, datatype)])
                assert str(error.value.status()) in ("400", "StatusCode.INVALID_ARGUMENT")
        assert outside.bodies == [] and running.service.guard.ledger.totals().releases == 0


def test_a_tensor_of_a_picture_is_that_picture_to_the_ledger(running: Running, guard: Guard) -> None:
    image = picture(5)
    with over_grpc.InferenceServerClient(running.grpc) as client:
        for form in forms(guard, image):
            client.infer(MODEL, [given(over_grpc, *form)])
    assert guard.ledger.totals().records == 1


def test_an_output_that_is_not_there_costs_no_release(running: Running, guard: Guard, outside: Tail) -> None:
    for library, client in (
        (over_http, over_http.InferenceServerClient(running.http)),
        (over_grpc, over_grpc.InferenceServerClient(running.grpc)),
    ):
        with client, pytest.raises(InferenceServerException, match="OUTPUT__0 or OUTPUT__1"):
            client.infer(
                MODEL, [given(library, "IMAGE", picture()[None], "UINT8")],
                outputs=[library.InferRequestedOutput("OUTPUT__7")],
            )  # fmt: skip
    assert outside.bodies == [] and guard.ledger.totals().releases == 0


def test_figures_and_lines_hold_no_content(running: Running, guard: Guard) -> None:
    image, secret = picture(6), "Jane-Doe-1970"
    with over_http.InferenceServerClient(running.http) as client:
        client.infer(MODEL, [given(over_http, "IMAGE", image[None], "UINT8")], request_id=secret)
        with pytest.raises(InferenceServerException):
            client.infer(MODEL, [given(over_http, "IMAGE", np.array([secret.encode()], object), "BYTES")])
        with pytest.raises(InferenceServerException):
            client.infer(secret, [given(over_http, "IMAGE", image[None], "UINT8")])
    status, headers, body = ask(running.http, "GET", "/metrics")
    text = body.decode()
    assert status == 200 and headers["Content-Type"].startswith("text/plain")
    for wanted in (
        'requests_total{protocol="http",status="200"} 1.0', 'requests_total{protocol="http",status="400"} 1.0',
        'refusals_total{reason="input"} 1.0', 'refusals_total{reason="name"} 1.0', "records_total 1.0", "in_flight 0.0",
        'stage_seconds_count{stage="obfuscate"} 1.0', 'stage_seconds_count{stage="upstream"} 1.0',
    ):  # fmt: skip
        assert f"sfumato_gateway_{wanted}" in text
    good, bad = running.lines()
    assert set(good) == {
        "time", "request", "protocol", "status", "records", "alpha", "bits", "bytes", "ms", "total_ms",
    }  # fmt: skip
    assert list(good["ms"]) == ["read", "wait", "decode", "obfuscate", "upstream", "answer"]
    bits = float(guard.protected(image, 0.8).bits.sum())
    assert good["bits"] == pytest.approx(bits, abs=0.1) and f"released_bits_total {bits}" in text
    assert (bad["status"], bad["reason"], bad["bits"], bad["bytes"]["released"]) == (400, "input", 0, 0)
    assert secret not in text + "".join(running.log)


def test_unknown_paths_and_methods_are_answered_as_json(running: Running) -> None:
    for method, path, status in (
        ("GET", "/", 404), ("GET", "/v3", 404), ("POST", "/v2", 405), ("GET", f"/v2/models/{MODEL}/infer", 405),
        ("POST", f"/v2/models/{MODEL}/load", 404), ("GET", "/v2/systemsharedmemory/status", 404),
    ):  # fmt: skip
        got, _, body = ask(running.http, method, path)
        assert got == status and "error" in json.loads(body)


def test_what_a_gateway_has_not_is_unimplemented(running: Running) -> None:
    with over_grpc.InferenceServerClient(running.grpc) as client:
        for call in (client.get_system_shared_memory_status, client.get_trace_settings):
            with pytest.raises(InferenceServerException) as error:
                call()
            assert str(error.value.status()) == "StatusCode.UNIMPLEMENTED"


def test_shared_memory_is_refused(running: Running) -> None:
    for library, client in (
        (over_http, over_http.InferenceServerClient(running.http)),
        (over_grpc, over_grpc.InferenceServerClient(running.grpc)),
    ):
        one = library.InferInput("IMAGE", [1, SIDE, SIDE, 3], "UINT8")
        one.set_shared_memory("region", SIDE * SIDE * 3)
        with client, pytest.raises(InferenceServerException, match="shared memory"):
            client.infer(MODEL, [one])
