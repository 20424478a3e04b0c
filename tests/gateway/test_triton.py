"""The gateway before the real server, by HTTP and by gRPC on both of its sides."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http

from sfumato.core.errors import RequestError
from sfumato.facade import SERVERS, SHIPPED, face_split
from sfumato.outside import repository, serving
from tests.gateway.upstream import _SHIPPED, MODEL, SIDE, ask, door, gateway, picture


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Server]:
    try:
        serving.binary()
    except RequestError as error:
        pytest.skip(f"no real server: {error.got}")
    place = tmp_path_factory.mktemp("triton") / "models"
    assert _SHIPPED.outside is not None and _SHIPPED.reference is not None
    plan = repository.Plan(
        _SHIPPED.task.name, _SHIPPED.outside, _SHIPPED.reference, SHIPPED / SERVERS["adapted"],  # type: ignore[arg-type]
        face_split().digest(), 4, (SIDE // 32, SIDE // 32),
    )  # fmt: skip
    repository.write(plan, place)
    with serving.serve(place, ports=(0, 0, 0)) as server:
        yield server


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_answers_are_those_of_this_process(scheme: str, triton: serving.Server, tmp_path: Path) -> None:
    guard, image = door(tmp_path), picture(9)
    assert guard.protected.outside is not None
    wanted = [o.detach().numpy() for o in guard.protected.outside(guard.protected(image, 0.8))]
    with gateway(f"{scheme}://127.0.0.1:{getattr(triton, scheme)}", guard, retries=2) as running:
        assert ask(running.http, "GET", "/v2/health/ready")[0] == 200
        for library, address in ((over_http, running.http), (over_grpc, running.grpc)):
            with library.InferenceServerClient(address) as client:
                one = library.InferInput("IMAGE", [1, *image.shape], "UINT8")
                one.set_data_from_numpy(image[None])
                answer = client.infer(MODEL, [one])
            for i, array in enumerate(wanted):
                np.testing.assert_allclose(answer.as_numpy(f"OUTPUT__{i}"), array, atol=1e-4)
    assert guard.ledger.totals().releases == 2
