"""Sends releases by HTTP, through a guard and in no other way.

Only `https`, or `http` to this very machine (a proxy beside the client that speaks TLS): obfuscation is not encryption.
Redirects are not followed: a release goes where it was sent, or nowhere.
"""

import http.client
import ssl
from ipaddress import ip_address
from urllib.parse import urlsplit

from sfumato.core.errors import RequestError, SfumatoError
from sfumato.trusted.guard import Guard

MOST = 2**26  # bytes of an answer: whoever is outside must not fill the memory inside
MEDIA_TYPE = "application/vnd.sfumato.release"


class Client:
    """POSTs what `guard.open` gives to `url`; `answer = client(release)`. Raises RequestError for another URL."""

    def __init__(self, url: str, guard: Guard, *, timeout: float = 30.0) -> None:
        try:
            parts = urlsplit(url)
            right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            right = False
        if not right:  # not shown: it may hold a password
            raise RequestError("an address that is none", wanted="https://HOST/PATH")
        if parts.scheme == "http" and not _here(parts.hostname or ""):
            raise RequestError(
                f"http to {parts.hostname}", wanted="https: obfuscation is not encryption", do="https://"
            )
        self.url, self.guard, self.timeout = parts, guard, timeout

    def __call__(self, payload: object) -> bytes:
        """What the server answers. Raises GuardError before it connects, SfumatoError where sending fails."""
        data = self.guard.open(payload)
        path = (self.url.path or "/") + (f"?{self.url.query}" if self.url.query else "")
        try:
            link = self._link()
            try:
                link.request("POST", path, data, {"Content-Type": MEDIA_TYPE})
                answer = link.getresponse()
                body = answer.read(MOST + 1)
            finally:
                link.close()
        except (OSError, http.client.HTTPException) as error:
            raise SfumatoError(f"{self.url.hostname}: the release did not arrive ({type(error).__name__})") from error
        if answer.status != http.client.OK:
            raise SfumatoError(f"{self.url.hostname} answered {answer.status}")
        if len(body) > MOST:
            raise SfumatoError(f"{self.url.hostname} answered more than {MOST} bytes")
        return body

    def _link(self) -> http.client.HTTPConnection:
        host = self.url.hostname or ""
        if self.url.scheme == "http":
            return http.client.HTTPConnection(host, self.url.port, timeout=self.timeout)
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(host, self.url.port, timeout=self.timeout, context=context)


def _here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
