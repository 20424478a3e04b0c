"""Who may ask: API keys, certificates, and where a gateway may listen without either.

A file of API keys has one a line, of at least 24 printable characters, or `sha256:` and 64 hexadecimal digits; lines
that begin with # are comments. It is read as a tenant's key is: only where nobody else could read or replace it.
"""

import hashlib
import hmac
import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from sfumato.core.errors import RequestError, TenantKeyError
from sfumato.trusted.keys import private

_MOST = 1 << 20
_HASH = re.compile(r"sha256:([0-9a-fA-F]{64})")
_KEY = re.compile(r"[!-~]{24,}")
_BEARER = re.compile(r"bearer +", re.IGNORECASE)


class ApiKeys:
    """Keys by their SHA-256. Raises TenantKeyError for a file that others can read, or that has a line of no key."""

    def __init__(self, path: Path) -> None:
        text = private(str(path), "API keys", _MOST)
        if len(text) > _MOST:
            raise TenantKeyError("a file of API keys of more than a MiB", wanted="a key a line")
        self._hashes = list(_hashes(text.decode(errors="replace")))
        if not self._hashes:
            raise TenantKeyError("a file without API keys", wanted="a key a line", do="openssl rand -hex 32 > FILE")

    def allow(self, headers: Mapping[str, str]) -> bool:
        """Whether `authorization: Bearer KEY` or `x-api-key: KEY` names one; takes as long for each of them."""
        given = headers.get("x-api-key") or _BEARER.sub("", headers.get("authorization") or "", 1)
        hashed = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        return sum(hmac.compare_digest(hashed, known) for known in self._hashes) > 0


def _hashes(text: str) -> Iterator[bytes]:
    for number, line in enumerate(text.splitlines(), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        found = _HASH.fullmatch(key)
        if not found and not _KEY.fullmatch(key):
            raise TenantKeyError(
                f"line {number} of the API keys is none", wanted="24 printable characters, or sha256:64 digits",
                do="openssl rand -hex 32 > FILE",
            )  # fmt: skip
        yield bytes.fromhex(found[1]) if found else hashlib.sha256(key.encode()).digest()


@dataclass(frozen=True)
class Certificates:
    """PEM files of the gateway's own certificate and key; `clients`: authorities that a client's must be of."""

    cert: Path
    key: Path
    clients: Path | None = None

    def context(self) -> ssl.SSLContext:
        """For HTTP. Raises RequestError, and TenantKeyError for a key that others can read."""
        private(str(self.key), "TLS key", _MOST)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.cert, self.key, password="")
            if self.clients is not None:
                context.load_verify_locations(self.clients)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ssl.SSLError) as error:
            raise RequestError("certificates that cannot be read", wanted="PEM files that fit together") from error
        return context

    def contents(self) -> tuple[bytes, bytes, bytes | None]:
        """Key, certificate and authorities, for gRPC; `context` finds what is wrong with them."""
        return self.key.read_bytes(), self.cert.read_bytes(), self.clients.read_bytes() if self.clients else None


def permit(host: str, certificates: Certificates | None, keys: ApiKeys | None) -> None:
    """Raises RequestError where others could reach the gateway without TLS, or without showing who they are."""
    try:
        here = ip_address(host).is_loopback
    except ValueError:
        here = host == "localhost"
    if here:
        return
    if certificates is None:
        raise RequestError(
            f"to listen on {host} in clear: records come in", wanted="TLS", do="--tls-cert CERT --tls-key KEY"
        )
    if keys is None and certificates.clients is None:
        raise RequestError(
            f"to listen on {host} for anyone: answers are content",
            wanted="API keys or client certificates", do="--api-keys FILE, or --client-ca CA",
        )  # fmt: skip
