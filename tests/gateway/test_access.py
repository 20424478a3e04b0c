"""Keys and certificates: who has none gets nothing, a gateway that others could reach does not start without."""

import datetime
import hashlib
import http.client
import ipaddress
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tritonclient.utils import InferenceServerException

from sfumato.core.errors import RequestError, TenantKeyError
from sfumato.gateway.access import ApiKeys, Certificates
from sfumato.gateway.server import Place
from tests.gateway.upstream import MODEL, Running, Tail, ask, door, gateway, picture, sent, tail

KEY, OTHER = "k" * 32, "o" * 40


def private(path: Path, text: str | bytes) -> Path:
    path.touch(0o600)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.fixture
def outside() -> Iterator[Tail]:
    with tail() as server:
        yield server


@pytest.fixture
def keys(tmp_path: Path) -> ApiKeys:
    hashed = hashlib.sha256(OTHER.encode()).hexdigest()
    return ApiKeys(private(tmp_path / "keys", f"# two\n{KEY}\n\nsha256:{hashed}\n"))


@pytest.mark.parametrize(
    ("headers", "may"),
    [
        ({"x-api-key": KEY}, True), ({"authorization": f"Bearer {KEY}"}, True),
        ({"authorization": f"bearer {OTHER}"}, True),
        ({"x-api-key": OTHER}, True), ({}, False), ({"x-api-key": KEY[:-1]}, False), ({"x-api-key": ""}, False),
        ({"authorization": f"Basic {KEY}"}, False), ({"x-api-key": "é" * 32}, False), ({"x-api-key": "# two"}, False),
        ({"x-api-key": hashlib.sha256(OTHER.encode()).hexdigest()}, False),
    ],
)  # fmt: skip
def test_keys(keys: ApiKeys, headers: dict[str, str], may: bool) -> None:
    assert keys.allow(headers) is may


def test_a_file_of_keys_is_as_private_as_a_tenants_key(tmp_path: Path) -> None:
    path = private(tmp_path / "keys", KEY)
    ApiKeys(path)
    path.chmod(0o640)
    with pytest.raises(TenantKeyError, match="open to others"):
        ApiKeys(path)
    for wrong in ("", "# nothing\n", "short\n", "with a space in it, and long enough\n", f"{KEY}\nsha256:12\n"):
        with pytest.raises(TenantKeyError) as error:
            ApiKeys(private(tmp_path / "wrong", wrong))
        assert KEY not in str(error.value)
    with pytest.raises(TenantKeyError):
        ApiKeys(tmp_path / "absent")


def test_without_a_key_nothing_but_health(outside: Tail, keys: ApiKeys, tmp_path: Path) -> None:
    with gateway(outside.url, door(tmp_path), place=Place(http=0, grpc=0, keys=keys)) as running:
        paths = ("/v2", "/metrics", f"/v2/models/{MODEL}", f"/v2/models/{MODEL}/stats", "/nothing")
        assert {ask(running.http, "GET", path)[0] for path in paths} == {401}
        assert ask(running.http, "POST", f"/v2/models/{MODEL}/infer", b"x" * 99)[0] == 401
        assert ask(running.http, "GET", "/v2/health/ready")[0] == ask(running.http, "GET", "/v2/health/live")[0] == 200
        for library, address in ((over_http, running.http), (over_grpc, running.grpc)):
            with library.InferenceServerClient(address) as client:
                assert client.is_server_live() and client.is_server_ready()
                for headers in (None, {"x-api-key": "wrong"}, {"authorization": "Bearer wrong"}):
                    with pytest.raises(InferenceServerException, match="no API key"):
                        infer(library, client, headers=headers)
                assert not outside.bodies
                infer(library, client, headers={"authorization": f"Bearer {KEY}"})
                infer(library, client, headers={"x-api-key": OTHER})
                outside.bodies.clear()
        assert b'refusals_total{reason="key"} 12.0' in ask(running.http, "GET", "/metrics", x_api_key=KEY)[2]


def infer(library: Any, client: Any, **more: Any) -> Any:
    image = picture()[None]
    one = library.InferInput("IMAGE", list(image.shape), "UINT8")
    one.set_data_from_numpy(np.ascontiguousarray(image))
    return client.infer(MODEL, [one], **more)


class Authority:
    """Makes certificates."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.key = folder, ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.pem = self.made(name, self.key, self.name, ca=True)[0]

    def made(self, name: str, key: Any, subject: x509.Name, *, ca: bool = False) -> tuple[Path, Path]:
        now = datetime.datetime.now(datetime.UTC)
        names = x509.SubjectAlternativeName(
            [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        )
        built = (
            x509.CertificateBuilder().subject_name(subject).issuer_name(self.name).public_key(key.public_key())
            .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1)).add_extension(names, critical=False)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )  # fmt: skip
        pem = serialization.Encoding.PEM
        cert = private(self.folder / f"{name}.pem", built.public_bytes(pem))
        form = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return cert, private(self.folder / f"{name}.key", key.private_bytes(pem, *form))

    def issue(self, name: str) -> tuple[Path, Path]:
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        return self.made(name, ec.generate_private_key(ec.SECP256R1()), subject)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


@pytest.fixture
def mutual(outside: Tail, tmp_path: Path, authority: Authority) -> Iterator[Running]:
    cert, key = authority.issue("gateway")
    place = Place(http=0, grpc=0, certificates=Certificates(cert, key, authority.pem))
    with gateway(outside.url, door(tmp_path), place=place) as running:
        yield running


def test_mutual_tls(mutual: Running, outside: Tail, authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    cert, key = authority.issue("client")
    foreign = Authority(tmp_path / "foreign", "authority").issue("stranger")
    for ours, works in (((cert, key), True), (foreign, False), (None, False)):
        context = ssl.create_default_context(cafile=authority.pem)
        if ours:
            context.load_cert_chain(*ours)
        url = f"https://{mutual.http}/v2/health/live"
        if works:
            with urllib.request.urlopen(url, context=context, timeout=10) as answer:
                assert answer.status == 200
        else:
            with pytest.raises((urllib.error.URLError, ConnectionError, ssl.SSLError)):
                urllib.request.urlopen(url, context=context, timeout=10)
        names = {"private_key": str(ours[1]), "certificate_chain": str(ours[0])} if ours else {}
        with over_grpc.InferenceServerClient(
            mutual.grpc, ssl=True, root_certificates=str(authority.pem), **names
        ) as client:
            if works:
                assert infer(over_grpc, client).as_numpy("OUTPUT__0").shape[0] == 1
            else:
                with pytest.raises(InferenceServerException):
                    client.is_server_live()
    context = ssl.create_default_context(cafile=authority.pem)
    context.load_cert_chain(cert, key)
    with over_http.InferenceServerClient(mutual.http, ssl=True, ssl_context_factory=lambda: context) as client:
        infer(over_http, client)
    assert len(sent(outside)) == 2


def test_clear_text_does_not_reach_a_gateway_with_tls(mutual: Running) -> None:
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        ask(mutual.http, "GET", "/v2/health/live")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "gateway.example"])
def test_others_are_let_in_with_tls_and_a_proof_alone(
    host: str, keys: ApiKeys, authority: Authority, tmp_path: Path
) -> None:
    cert, key = authority.issue("gateway")
    for certificates, given in ((None, None), (None, keys), (Certificates(cert, key), None)):
        with pytest.raises(RequestError, match=r"in clear|for anyone"):
            Place(host, certificates=certificates, keys=given)
    Place(host, certificates=Certificates(cert, key), keys=keys)
    Place(host, certificates=Certificates(cert, key, authority.pem))
    for here in ("127.0.0.1", "::1", "localhost"):
        Place(here)


def test_certificates_that_do_not_fit(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("one")
    _, other = authority.issue("two")
    for wrong in (
        Certificates(cert, other), Certificates(key, key), Certificates(tmp_path / "absent", key),
        Certificates(cert, key, tmp_path / "absent"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match="certificates"):
            wrong.context()
    key.chmod(0o644)
    with pytest.raises(TenantKeyError, match="open to others"):
        Certificates(cert, key).context()
