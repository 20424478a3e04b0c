"""The protocol over gRPC: inference.GRPCInferenceService, but for what a gateway has not (streams, shared memory).

A call of one message is received as a stream of one, which is the same on the wire: so whoever may not ask, or finds no
place, is refused before the message is read, and one that does not come to an end does not hold its place for ever.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as messages

from sfumato.gateway.access import ApiKeys, Certificates
from sfumato.gateway.protocol import from_grpc, parsed, to_grpc
from sfumato.gateway.refusals import RefusedError, refusal
from sfumato.gateway.rest import config
from sfumato.gateway.service import Service

NAME = "inference.GRPCInferenceService"
_OPEN = ("ServerLive", "ServerReady")
_OTHERS = 16  # calls beside those to infer
Handler = Callable[[bytes], Awaitable[bytes]]


class Rpc:
    """The server; `add` gives it a port."""

    def __init__(self, service: Service, keys: ApiKeys | None) -> None:
        self.service, self.keys = service, keys
        limits = service.limits
        self.server = grpc.aio.server(
            maximum_concurrent_rpcs=limits.places + _OTHERS,
            options=[
                ("grpc.max_receive_message_length", limits.body), ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0), ("grpc.max_metadata_size", 16 << 10),
                ("grpc.max_connection_idle_ms", round(1000 * limits.idle)),
                ("grpc.max_concurrent_streams", limits.places + _OTHERS),
                ("grpc.server_handshake_timeout_ms", round(1000 * limits.idle)),
            ],
        )  # fmt: skip
        calls: dict[str, Handler] = {
            "ServerLive": self._live, "ServerReady": self._ready, "ModelReady": self._model_ready,
            "ServerMetadata": self._server, "ModelMetadata": self._model, "ModelConfig": self._config,
            "ModelStatistics": self._statistics, "RepositoryIndex": self._index,
        }  # fmt: skip
        handlers = {name: self._handler(name, partial(self._read, work)) for name, work in calls.items()}
        handlers["ModelInfer"] = self._handler("ModelInfer", self._infer)
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))

    def add(self, address: str, certificates: Certificates | None) -> int:
        """Listens there once it is started -> the port; 0 where it cannot."""
        try:
            if certificates is None:
                return int(self.server.add_insecure_port(address))
            key, cert, clients = certificates.contents()
            credentials = grpc.ssl_server_credentials(
                [(key, cert)], root_certificates=clients, require_client_auth=clients is not None
            )
            return int(self.server.add_secure_port(address, credentials))
        except RuntimeError:
            return 0

    def _handler(self, name: str, work: Callable[[Any], Awaitable[bytes]]) -> Any:
        async def handle(_: object, context: Any) -> bytes:
            try:
                self._permit(name, context)
                return await work(context)
            except Exception as error:
                told = refusal(error)
                if told.reason == "key":
                    self.service.metrics.refused(told.reason)
            again = () if told.again is None else (("retry-after", str(told.again)),)
            await context.abort(grpc.StatusCode[told.grpc], told.text, again)
            raise AssertionError

        return grpc.stream_unary_rpc_method_handler(handle)

    def _permit(self, name: str, context: Any) -> None:
        if self.keys is None or name in _OPEN:
            return
        given = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        if not self.keys.allow(given):
            raise RefusedError(401, "key", "no API key, or another one")

    async def _read(self, work: Handler, context: Any) -> bytes:
        return await work(await self._message(context))

    async def _message(self, context: Any) -> bytes:
        seconds = self.service.limits.body_timeout
        try:
            found = await asyncio.wait_for(context.read(), seconds)
        except TimeoutError:
            raise RefusedError(408, "slow-body", f"the request did not arrive within {seconds:g} s") from None
        if not isinstance(found, bytes):
            raise RefusedError(400, "input", "a call without a message")
        return found

    async def _infer(self, context: Any) -> bytes:
        return await self.service.serve("grpc", partial(self._message, context), from_grpc, to_grpc)

    async def _live(self, _: bytes) -> bytes:
        return _bytes(messages.ServerLiveResponse(live=True))

    async def _ready(self, _: bytes) -> bytes:
        return _bytes(messages.ServerReadyResponse(ready=await self.service.ready()))

    async def _model_ready(self, message: bytes) -> bytes:
        await self._named(messages.ModelReadyRequest, message)
        return _bytes(messages.ModelReadyResponse(ready=await self.service.ready()))

    async def _server(self, _: bytes) -> bytes:
        return _bytes(messages.ServerMetadataResponse(**self.service.server()))

    async def _model(self, message: bytes) -> bytes:
        await self._named(messages.ModelMetadataRequest, message)
        return _bytes(messages.ModelMetadataResponse(**await self.service.metadata()))

    async def _config(self, message: bytes) -> bytes:
        await self._named(messages.ModelConfigRequest, message)
        return _bytes(messages.ModelConfigResponse(config=config(await self.service.metadata())))

    async def _statistics(self, message: bytes) -> bytes:
        await self._named(messages.ModelStatisticsRequest, message)
        return _bytes(messages.ModelStatisticsResponse(**self.service.statistics()))

    async def _index(self, _: bytes) -> bytes:
        state = "READY" if await self.service.ready() else "UNAVAILABLE"
        one = messages.RepositoryIndexResponse.ModelIndex(name=self.service.name, state=state)
        return _bytes(messages.RepositoryIndexResponse(models=[one]))

    async def _named(self, kind: Any, message: bytes) -> None:
        request = parsed(kind, message)
        await self.service.named(request.name or self.service.name, request.version)


def _bytes(message: Any) -> bytes:
    return bytes(message.SerializeToString())
