"""A gateway that listens: both protocols, a signal to end, the requests under way finished first."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

from sfumato.core.errors import RequestError
from sfumato.gateway.access import ApiKeys, Certificates, permit
from sfumato.gateway.rest import Rest
from sfumato.gateway.rpc import Rpc
from sfumato.gateway.service import Service


@dataclass(frozen=True)
class Place:
    """Where to listen; port 0 takes any that is free, None leaves the protocol out."""

    host: str = "127.0.0.1"
    http: int | None = 8000
    grpc: int | None = 8001
    certificates: Certificates | None = None
    keys: ApiKeys | None = None

    def __post_init__(self) -> None:
        permit(self.host, self.certificates, self.keys)
        if self.http is None and self.grpc is None:
            raise RequestError("a gateway of no protocol", wanted="HTTP, gRPC or both")


@dataclass(frozen=True)
class Listening:
    """A gateway that takes requests on these ports; None where the protocol is left out."""

    service: Service
    host: str
    http: int | None
    grpc: int | None


@asynccontextmanager
async def listen(service: Service, place: Place) -> AsyncIterator[Listening]:
    """The gateway; at the end of the block it takes no more, finishes what is under way within `Limits.grace`, ends.

    Raises RequestError where a port is taken, or certificates do not fit.
    """
    context = place.certificates.context() if place.certificates else None
    rest, rpc = Rest(service, place.keys), Rpc(service, place.keys)
    watch = asyncio.create_task(rest.watch())
    http = grpc = None
    try:
        if place.grpc is not None:
            host = f"[{place.host}]" if ":" in place.host else place.host
            grpc = rpc.add(f"{host}:{place.grpc}", place.certificates)
            if not grpc:
                raise _taken(place.host, place.grpc)
        await rest.runner.setup()
        if place.http is not None:
            site = web.TCPSite(rest.runner, place.host, place.http, ssl_context=context)
            try:
                await site.start()
            except OSError as error:
                raise _taken(place.host, place.http) from error
            http = int(rest.runner.addresses[0][1])
        await rpc.server.start()
        yield Listening(service, place.host, http, grpc)
    finally:
        service.stopping = True
        await asyncio.gather(rpc.server.stop(service.limits.grace), rest.runner.cleanup())
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
        await service.close()


def _taken(host: str, port: int) -> RequestError:
    return RequestError(
        f"{host}:{port} cannot be listened on", wanted="an address of this machine and a port that is free",
        do="--http-port 0 --grpc-port 0 take any",
    )  # fmt: skip


def run(made: Callable[[], Service], place: Place, started: Callable[[Listening], None]) -> None:
    """Until SIGINT or SIGTERM; `started` is told once it takes requests, `made` is called in the loop."""

    async def whole() -> None:
        ended, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ended.set)
        async with listen(made(), place) as listening:
            started(listening)
            await ended.wait()

    asyncio.run(whole())
