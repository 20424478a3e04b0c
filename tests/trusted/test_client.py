"""The client against a server that records: what is sent again, what is not, what an answer must be."""

import asyncio
import datetime
import http.server
import ssl
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sfumato.core.errors import GuardError, RequestError, ServerError
from sfumato.trusted.client import TLS, AsyncClient, Client
from tests.trusted.recorder import Recorder, recording, released
from tests.trusted.test_guard import SHAPE, guard, picture


@pytest.fixture
def server() -> Iterator[Recorder]:
    with recording() as one:
        yield one


def codes(server: Recorder, number: int) -> bytes:
    return released(server, number, SHAPE.sent, SHAPE.block).to_bytes()


@pytest.mark.parametrize("status", [503, 502, 429])
def test_a_busy_server_is_asked_again_with_the_same_release(tmp_path: Path, server: Recorder, status: int) -> None:
    door = guard(tmp_path)
    release = door(picture())
    server.statuses = [status, status]
    with Client(server.url, door) as client:
        client(release)
    assert len(server.bodies) == 3 and len(set(server.bodies)) == 1
    assert codes(server, 0) == release.to_bytes() and door.ledger.totals().releases == 1


@pytest.mark.parametrize("status", [400, 500, 302])
def test_a_refusal_is_not_tried_again(tmp_path: Path, server: Recorder, status: int) -> None:
    door = guard(tmp_path)
    server.statuses = [status]
    with Client(server.url, door) as client, pytest.raises(ServerError) as error:
        client(door(picture()))
    assert len(server.bodies) == 1 and error.value.status in ("refused", "wrong")


def test_retries_end(tmp_path: Path, server: Recorder) -> None:
    door = guard(tmp_path)
    server.statuses = [503] * 9
    with Client(server.url, door, retries=2) as client, pytest.raises(ServerError) as error:
        client(door(picture()))
    assert len(server.bodies) == 3 and error.value.status == "busy"


@pytest.mark.parametrize(
    "wrong",
    [
        [{"name": "OUTPUT__0", "datatype": "FP32", "shape": [3, 2], "data": [0.0] * 6}],
        [{"name": "OUTPUT__0", "datatype": "FP32", "shape": [1, 2], "data": [0.0]}],
        [{"name": "OTHER", "datatype": "FP32", "shape": [1, 2], "data": [0.0, 0.0]}],
        [],
        "no outputs",
    ],
)
def test_a_server_that_lies_is_an_error(tmp_path: Path, server: Recorder, wrong: Any) -> None:
    door = guard(tmp_path)
    server.wrong = wrong
    with Client(server.url, door) as client, pytest.raises(ServerError):
        client(door(picture()))
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "said",
    [
        {"versions": 5},
        {"versions": ["1" * 999]},
        {"outputs": [{"name": ["OUTPUT__0"]}]},
        {"outputs": ["OUTPUT__0"]},
        {"inputs": 3},
        {"inputs": [{"name": {}}]},
    ],
)
def test_a_server_that_describes_itself_wrongly_is_sent_nothing(
    tmp_path: Path, server: Recorder, said: dict[str, Any]
) -> None:
    door = guard(tmp_path)
    server.said = said
    with Client(server.url, door) as client, pytest.raises(ServerError) as error:
        client(door(picture()))
    assert error.value.status == "wrong" and server.bodies == []


def test_what_is_no_number_is_no_answer(tmp_path: Path, server: Recorder) -> None:
    door = guard(tmp_path)
    server.wrong = [{"name": "OUTPUT__0", "datatype": "FP32", "shape": [1, 2], "data": [float("nan"), 0.0]}]
    with Client(server.url, door) as client, pytest.raises(ServerError):
        client(door(picture()))


def test_a_server_that_is_away_costs_a_record_nothing(tmp_path: Path) -> None:
    door, away = guard(tmp_path), "http://127.0.0.1:9"
    with Client(away, door, retries=0) as client, pytest.raises(ServerError):
        client.detect(picture())

    async def go() -> None:
        async with AsyncClient(away, door, retries=0) as client:
            with pytest.raises(ServerError):
                await client.detect(picture())

    asyncio.run(go())
    assert door.ledger.totals().releases == 0


def test_records_of_several_alphas_are_several_requests_and_one_answer(tmp_path: Path, server: Recorder) -> None:
    door = guard(tmp_path)
    release = door([picture(n) for n in range(4)], [0.2, 0.2, 0.8, 0.2])
    with Client(server.url, door) as client:
        assert client(release)[0].shape == (4, 2)
    sent = [released(server, n, SHAPE.sent, SHAPE.block) for n in range(len(server.bodies))]
    assert torch.equal(torch.cat([one.tensor for one in sent]), release.tensor)
    assert all(len(set(one.alpha.tolist())) == 1 for one in sent)


def test_the_asynchronous_client_does_the_same(tmp_path: Path, server: Recorder) -> None:
    door = guard(tmp_path)
    release = door([picture(0), picture(1)], [0.2, 0.8])
    server.statuses = [503]

    async def go() -> None:
        async with AsyncClient(server.url, door) as client:
            assert (await client(release))[0].tolist() == [[0.5, 0.5]] * 2
            with pytest.raises(GuardError):
                await client(picture())
            server.statuses = [500]
            with pytest.raises(ServerError):
                await client(release)

    asyncio.run(go())
    assert {codes(server, n) for n in range(3)} == {codes(server, 0), codes(server, 1), codes(server, 2)}
    assert len(server.bodies) >= 3


@pytest.mark.parametrize("options", [{"timeout": 0}, {"retries": -1}])
def test_options_that_cannot_be_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        Client("http://127.0.0.1:1", guard(tmp_path), **options)
    with pytest.raises(RequestError):
        Client("https://example.org", guard(tmp_path), shared_memory=True)


def certificate(folder: Path, name: str, issuer: tuple[x509.Certificate, Any] | None = None) -> tuple[Path, Path, Any]:
    """A certificate of 127.0.0.1, its key, and what signs others."""
    key = ec.generate_private_key(ec.SECP256R1())
    called = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    signer_name, signer = (issuer[0].subject, issuer[1]) if issuer else (called, key)
    made = (
        x509.CertificateBuilder()
        .subject_name(called)
        .issuer_name(signer_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    pem, private = folder / f"{name}.pem", folder / f"{name}.key"
    pem.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pem, private, (made, key)


def test_mutual_tls(tmp_path: Path) -> None:
    ca, _, signer = certificate(tmp_path, "ca")
    pem, key, _ = certificate(tmp_path, "server", signer)
    mine, mine_key, _ = certificate(tmp_path, "client", signer)
    door = guard(tmp_path)
    with recording() as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem, key)
        context.load_verify_locations(ca)
        context.verify_mode = ssl.CERT_REQUIRED
        server.socket = context.wrap_socket(server.socket, server_side=True)
        url = server.url.replace("http://", "https://")
        with Client(url, door, tls=TLS(ca, mine, mine_key), retries=0) as client:
            assert client(door(picture()))[0].shape == (1, 2)
        for tls in (TLS(ca), TLS()):  # without a certificate, and without trust in the server's
            with Client(url, door, tls=tls, retries=0, timeout=5) as client, pytest.raises(ServerError):
                client(door(picture()))
    assert len(server.bodies) == 1
    with pytest.raises(RequestError):
        TLS(ca=tmp_path / "nothing.pem").context()


def test_a_server_that_does_not_answer_is_slow(tmp_path: Path) -> None:
    class Silent(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(1)  # never comes

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    door = guard(tmp_path)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    with Client(url, door, timeout=0.5, retries=0) as client, pytest.raises(ServerError) as error:
        client(door(picture()))
    assert error.value.status == "slow"
    server.shutdown()
    server.server_close()
