"""The protocol over HTTP, and /metrics.

Connections that have no request under way for longer than `Limits.idle`, be it that they are idle or that their header
does not come to an end, are closed; so are the longest such ones where there are too many.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from aiohttp import web

from sfumato.core.errors import RequestError
from sfumato.gateway.access import ApiKeys
from sfumato.gateway.protocol import from_rest, to_rest
from sfumato.gateway.refusals import RefusedError, refusal
from sfumato.gateway.service import Service
from sfumato.gateway.telemetry import TEXT

HEADER = "Inference-Header-Content-Length"
_OPEN = ("/v2/health/live", "/v2/health/ready")  # for probes, which have no key
_SILENT = logging.Logger("sfumato.silent", logging.CRITICAL + 1)  # aiohttp's own would show what it cannot read
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Rest:
    """Routes, and a watch over the connections."""

    def __init__(self, service: Service, keys: ApiKeys | None) -> None:
        self.service, self.keys = service, keys
        self.app = web.Application(middlewares=[self._told], client_max_size=service.limits.body)
        one = r"/v2/models/{model}{version:(?:/versions/[^/]+)?}"
        self.app.add_routes([
            web.get("/v2/health/live", self._live), web.get("/v2/health/ready", self._ready),
            web.get("/v2", self._server), web.get("/metrics", self._metrics),
            web.post("/v2/repository/index", self._index), web.get("/v2/models/stats", self._statistics),
            web.get(one, self._model), web.get(f"{one}/ready", self._ready), web.get(f"{one}/config", self._config),
            web.get(f"{one}/stats", self._statistics), web.post(f"{one}/infer", self._infer),
        ])  # fmt: skip
        limits = service.limits
        self.runner = web.AppRunner(
            self.app, access_log=None, logger=_SILENT, keepalive_timeout=limits.idle, shutdown_timeout=limits.grace,
            lingering_time=1.0,
        )  # fmt: skip
        self._busy: set[object] = set()

    async def watch(self) -> None:
        """Until it is cancelled."""
        loop, limits = asyncio.get_running_loop(), self.service.limits
        since: dict[Any, float] = {}
        while True:
            await asyncio.sleep(min(1.0, limits.idle / 4))
            server = self.runner.server
            waiting = [one for one in (server.connections if server else []) if one not in self._busy]
            since = {one: since.get(one, loop.time()) for one in waiting}
            longest = sorted(since, key=since.__getitem__)
            too_many = max(0, len(longest) - limits.connections)
            late = [one for i, one in enumerate(longest) if i < too_many or loop.time() - since[one] > limits.idle]
            for one in late:
                if one.transport is not None:
                    one.transport.abort()

    @web.middleware
    async def _told(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Keys first; refusals as JSON."""
        self._busy.add(request.protocol)
        try:
            if self.keys is not None and request.path not in _OPEN and not self.keys.allow(_headers(request)):
                raise RefusedError(401, "key", "no API key, or another one")
            return await handler(request)
        except RefusedError as refused:
            if refused.reason in ("key", "name"):
                self.service.metrics.refused(refused.reason)
            return _refused(refused)
        except web.HTTPException as error:
            return _refused(RefusedError(error.status, "input", error.reason))
        except Exception as error:
            return _refused(refusal(error))
        finally:
            self._busy.discard(request.protocol)

    async def _live(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _ready(self, request: web.Request) -> web.Response:
        await self._named(request)
        return web.Response(status=200 if await self.service.ready() else 503)

    async def _server(self, _: web.Request) -> web.Response:
        return _json(self.service.server())

    async def _model(self, request: web.Request) -> web.Response:
        await self._named(request)
        return _json(await self.service.metadata())

    async def _config(self, request: web.Request) -> web.Response:
        await self._named(request)
        return _json(config(await self.service.metadata()))

    async def _statistics(self, request: web.Request) -> web.Response:
        await self._named(request)
        return _json(self.service.statistics())

    async def _index(self, _: web.Request) -> web.Response:
        ready = await self.service.ready()
        return _json([{"name": self.service.name, "state": "READY" if ready else "UNAVAILABLE"}])

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self.service.metrics.text(), headers={"Content-Type": TEXT})

    async def _named(self, request: web.Request) -> None:
        if "model" in request.match_info:
            version = request.match_info["version"].removeprefix("/versions/")
            await self.service.named(request.match_info["model"], version)

    async def _infer(self, request: web.Request) -> web.Response:
        await self._named(request)
        header = _length(request.headers.get(HEADER))
        parse = partial(from_rest, header=header, most=self.service.limits.json)
        body, size = await self.service.serve("http", partial(_body, request, self.service.limits.body), parse, to_rest)
        binary = {} if size is None else {HEADER: str(size)}
        kind = "application/json" if size is None else "application/octet-stream"
        return web.Response(body=body, headers={"Content-Type": kind, **binary})


def config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The little of Triton's model configuration that is so of a gateway."""
    ends = {end: [_configured(one) for one in metadata[f"{end}s"]] for end in ("input", "output")}
    return {"name": metadata["name"], "platform": metadata["platform"], "max_batch_size": 1, **ends}


def _configured(one: Mapping[str, Any]) -> dict[str, Any]:
    kind = "STRING" if one["datatype"] == "BYTES" else one["datatype"]
    return {"name": one["name"], "data_type": f"TYPE_{kind}", "dims": one["shape"][1:] or [1]}


def _headers(request: web.Request) -> dict[str, str]:
    return {name: request.headers.get(name, "") for name in ("authorization", "x-api-key")}


def _length(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise RequestError(f"a {HEADER} that is no number", wanted="bytes of the JSON part")
    return int(text)


async def _body(request: web.Request, most: int) -> bytes:
    too_large = RefusedError(413, "too-large", f"a body of more than {most} bytes")
    if (request.content_length or 0) > most:
        raise too_large
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise too_large from None
    except ConnectionError:
        raise RefusedError(400, "gone", "the client went away") from None
    except web.RequestPayloadError:
        raise RequestError("a body that does not arrive whole, or is not compressed as it says") from None


def _refused(refused: RefusedError) -> web.Response:
    again = {} if refused.again is None else {"Retry-After": str(refused.again)}
    response = _json({"error": refused.text}, status=refused.status, headers=again)
    if refused.status in (408, 413):
        response.force_close()  # the rest of the body is still to come
    return response


def _json(told: Any, **more: Any) -> web.Response:
    return web.Response(body=json.dumps(told).encode(), content_type="application/json", **more)
