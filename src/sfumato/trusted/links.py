"""tritonclient's connections over HTTP: no redirect is followed, no answer is unpacked or read past `MOST` bytes.

Whoever is outside must not choose where a release goes, nor fill the memory inside.
"""

from typing import Any

from sfumato.core.errors import ServerError

MOST = 2**26  # bytes of an answer
_BLOCK = 2**16
_PLAIN = (None, "", "identity")


class Straight:
    """The connection of tritonclient's blocking client, geventhttpclient's, which follows no redirect by itself."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    def get(self, *uri: Any, **more: Any) -> "_Read":
        """As of the connection. Raises ServerError."""
        return _read(self._stub.get(*uri, **more))

    def post(self, *uri: Any, **more: Any) -> "_Read":
        """As of the connection. Raises ServerError."""
        return _read(self._stub.post(*uri, **more))

    def close(self) -> None:
        """As of the connection."""
        self._stub.close()


class AsyncStraight:
    """The connection of tritonclient's asynchronous client, aiohttp's."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    async def get(self, **more: Any) -> "_AsyncRead":
        """As of the connection. Raises ServerError."""
        return await _awaited(await self._stub.get(**more, allow_redirects=False))

    async def post(self, **more: Any) -> "_AsyncRead":
        """As of the connection. Raises ServerError."""
        return await _awaited(await self._stub.post(**more, allow_redirects=False))

    async def close(self) -> None:
        """As of the connection."""
        await self._stub.close()


class _Read:
    """An answer that is here, as tritonclient reads it."""

    def __init__(self, answer: Any, data: bytes) -> None:
        self.status_code, self.get, self._data = answer.status_code, answer.get, data

    def read(self, length: int = -1) -> bytes:
        size = len(self._data) if length < 0 else length
        part, self._data = self._data[:size], self._data[size:]
        return part


class _AsyncRead:
    def __init__(self, answer: Any, data: bytes) -> None:
        self.status, self.headers, self._data = answer.status, answer.headers, data

    async def read(self) -> bytes:
        return self._data


def _read(answer: Any) -> _Read:
    try:
        _plain(answer.get("Content-Encoding"))
        data = bytearray()
        while part := answer.read(_BLOCK):
            data += part
            _small(len(data))
    except ServerError:
        answer.release()
        raise
    return _Read(answer, bytes(data))


async def _awaited(answer: Any) -> _AsyncRead:
    data = bytearray()
    try:
        _plain(answer.headers.get("Content-Encoding"))
        async for part in answer.content.iter_any():
            data += part
            _small(len(data))
    except BaseException:
        answer.close()
        raise
    return _AsyncRead(answer, bytes(data))


def _plain(encoding: str | None) -> None:
    if encoding not in _PLAIN:
        raise ServerError("the server packed an answer, which nobody asked for", status="wrong")


def _small(size: int) -> None:
    if size > MOST:
        raise ServerError(f"the server answered more than {MOST >> 20} MiB", status="wrong")
