"""`sfumato gateway`: the Open Inference Protocol for clients that know nothing of obfuscation."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sfumato.cli.common import Artefacts, Device, DeviceOption, Weights, note, size_of

if TYPE_CHECKING:
    from sfumato.gateway.server import Listening, Place
    from sfumato.trusted.guard import Guard


class Noise(StrEnum):
    """Where it comes from."""

    KEYED = "keyed"
    FRESH = "fresh"


def gateway(
    upstream: Annotated[str, typer.Option(help="Server outside: grpcs://HOST:PORT or https://HOST:PORT.")],
    ledger: Annotated[str, typer.Option(help="A path, or postgresql://USER@HOST/NAME.")],
    key: Annotated[str, typer.Option(help="The tenant's key: FILE, env:NAME or pkcs11:...; sfumato key makes one.")],
    alpha: Annotated[float, typer.Option(help="Of requests that name none: share of the bits withheld.")] = 0.8,
    noise: Annotated[Noise, typer.Option(help="Keyed: a record sent again is the same release.")] = Noise.KEYED,
    epoch: Annotated[int, typer.Option(help="Of keyed noise.")] = 0,
    min_alpha: Annotated[float | None, typer.Option(help="The least a request may name.", show_default="ALPHA")] = None,
    max_bits: Annotated[float | None, typer.Option(help="Of one record, all releases together.")] = None,
    max_releases: Annotated[int | None, typer.Option(help="Of one record.")] = None,
    artefacts: Artefacts = None,
    weights: Weights = None,
    size: Annotated[int, typer.Option(help="Side of the square input in pixels.")] = 1024,
    device: DeviceOption = Device.AUTO,
    model: Annotated[str | None, typer.Option(help="Its name outside, without the task's own.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="Of HTTP; 0 takes a free one, -1 none.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Of gRPC; 0 takes a free one, -1 none.")] = 8001,
    api_keys: Annotated[Path | None, typer.Option(help="File of API keys, or of their sha256:, a line each.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate of the gateway, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    client_ca: Annotated[Path | None, typer.Option(help="Clients need a certificate of this authority.")] = None,
    upstream_ca: Annotated[Path | None, typer.Option(help="Authority of the server outside, PEM.")] = None,
    upstream_cert: Annotated[Path | None, typer.Option(help="Certificate to show it.")] = None,
    upstream_key: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests under way at once.")] = 4,
    waiting: Annotated[int, typer.Option(help="Requests that wait; the next one is refused.")] = 16,
    workers: Annotated[int, typer.Option(help="Threads for decoding, head and obfuscation.")] = 2,
    max_body: Annotated[int, typer.Option(help="MiB of a request.")] = 64,
    max_records: Annotated[int, typer.Option(help="Records of a request.")] = 16,
    timeout: Annotated[float, typer.Option(help="Seconds for a request.")] = 60.0,
    grace: Annotated[float, typer.Option(help="Seconds to finish what is under way at the end.")] = 20.0,
) -> None:
    """Answer unchanged clients of the model from a server that sees releases alone.

    Runs inside the trust zone, in front of any server of the Open Inference Protocol. Clients send pictures, or what
    the model takes. Each request is a line of JSON on stderr; figures are at /metrics.
    """
    from functools import partial

    from sfumato.core.errors import RequestError

    try:
        from sfumato.gateway.server import Place, run
        from sfumato.gateway.service import Limits, Service
        from sfumato.trusted.client import TLS, AsyncClient
    except ImportError as error:
        raise RequestError(f"{error.name} is not installed", wanted="it", do="pip install 'sfumato[triton]'") from error
    limits = Limits(
        body=max_body << 20, records=max_records, concurrency=concurrency, waiting=waiting, workers=workers,
        timeout=timeout, grace=grace,
    )  # fmt: skip
    place = _place(Place, host, http_port, grpc_port, api_keys, (tls_cert, tls_key, client_ca))
    policy = (alpha if min_alpha is None else min_alpha, max_bits, max_releases)
    door = _guard(key, ledger, policy, artefacts, weights, size, device, epoch if noise is Noise.KEYED else None)
    outside = partial(
        AsyncClient, upstream, door, model=model, timeout=timeout / 2, retries=2,
        tls=TLS(upstream_ca, upstream_cert, upstream_key),
    )  # fmt: skip
    outside()  # an address that is wrong is said before anything is listened on
    try:
        run(lambda: Service(door, outside(), alpha=alpha, limits=limits), place, _started)
    finally:
        door.ledger.close()


def _place(
    made: "type[Place]", host: str, http: int, grpc: int, api_keys: Path | None, tls: tuple[Path | None, ...]
) -> "Place":
    from sfumato.core.errors import RequestError
    from sfumato.gateway.access import ApiKeys, Certificates

    cert, key, clients = tls
    if (cert is None) != (key is None) or (clients is not None and cert is None):
        raise RequestError("half of what TLS needs", wanted="--tls-cert and --tls-key, with --client-ca or without")
    certificates = Certificates(cert, key, clients) if cert is not None and key is not None else None
    ports = [None if port < 0 else port for port in (http, grpc)]
    return made(host, ports[0], ports[1], certificates, ApiKeys(api_keys) if api_keys is not None else None)


def _guard(
    key: str,
    ledger: str,
    policy: tuple[float, float | None, int | None],
    artefacts: Path | None,
    weights: Path | None,
    size: int,
    device: Device,
    epoch: int | None,
) -> "Guard":
    from sfumato import facade
    from sfumato.tasks.detection.task import FaceDetection
    from sfumato.trusted.guard import Guard
    from sfumato.trusted.keys import tenant_key
    from sfumato.trusted.ledger import Ledger, Policy
    from sfumato.trusted.noise import Keyed

    secret = tenant_key(key)
    task = FaceDetection(size=size_of(str(size)))
    protected = facade.load(artefacts, task=task, weights=weights, device=device.value)
    if epoch is not None:
        protected = protected.with_noise(Keyed(secret, epoch=epoch))
    return Guard(protected, Ledger(ledger, Policy(*policy)), secret)


def _started(listening: "Listening") -> None:
    places = [
        f"{name}://{listening.host}:{port}"
        for name, port in (("http", listening.http), ("grpc", listening.grpc))
        if port is not None
    ]
    service = listening.service
    note(
        f"{service.name} at {' and '.join(places)}, releases to {service.upstream.model} at {service.upstream.address}"
    )
