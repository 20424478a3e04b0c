"""A request becomes releases, releases an answer: what both protocols share.

    read -> wait -> decode -> obfuscate (head, obfuscator, noise, ledger) -> upstream -> answer

A place is taken before the body is read: with as many under way and waiting as there are places, the next one is
refused at once. Work on the processor runs in a few threads, so that the loop goes on listening. A server outside
that failed is asked what it serves before anything more is obfuscated: a release that is entered and cannot be sent
is lost to its record.
"""

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch

from sfumato import __version__
from sfumato.core.errors import AlphaError, RequestError, ServerError
from sfumato.core.sites import unfold
from sfumato.gateway.protocol import Answered, Array, Asked, name_of
from sfumato.gateway.records import inputs_of, records_of
from sfumato.gateway.refusals import AGAIN, RefusedError, refusal
from sfumato.gateway.telemetry import Call, Log, Metrics, line, to_stderr
from sfumato.trusted.client import AsyncClient, Served
from sfumato.trusted.guard import Guard

T = TypeVar("T")
_FRESH = 1.0  # seconds for which an answer about the server outside holds


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them, may take. Times in seconds, sizes in bytes."""

    body: int = 64 << 20
    json: int = 32 << 20
    records: int = 16
    pixels: int = 50_000_000
    concurrency: int = 4
    waiting: int = 16
    workers: int = 2
    timeout: float = 60.0
    body_timeout: float = 15.0
    idle: float = 15.0
    connections: int = 256
    grace: float = 20.0

    def __post_init__(self) -> None:
        least = (self.body, self.json, self.records, self.pixels, self.concurrency, self.workers, self.connections)
        if min(least) < 1 or self.waiting < 0 or min(self.timeout, self.body_timeout, self.idle, self.grace) <= 0:
            raise RequestError("a limit of nothing", wanted="at least one of each, and times above 0")

    @property
    def places(self) -> int:
        """Requests under way and waiting."""
        return self.concurrency + self.waiting


class Service:
    """Answers requests for `guard`'s task with what `upstream` makes of their releases.

    `alpha` is that of requests that name none. Call from one event loop.
    """

    def __init__(
        self,
        guard: Guard,
        upstream: AsyncClient,
        *,
        alpha: float = 0.8,
        limits: Limits | None = None,
        log: Log = to_stderr,
    ) -> None:
        if not 0 <= alpha < 1:
            raise AlphaError(f"alpha = {alpha:g}", wanted="0 <= alpha < 1", do="--alpha 0.8")
        self.guard, self.upstream, self.alpha, self.log = guard, upstream, alpha, log
        self.limits, self.metrics, self.stopping = limits or Limits(), Metrics(), False
        self.task = guard.protected.task
        self.name = self.task.name.replace("-", "_")
        self._pool = ThreadPoolExecutor(self.limits.workers, "sfumato-gateway")
        self._turn = asyncio.Semaphore(self.limits.concurrency)
        self._taken = 0
        self._asking = asyncio.Lock()
        self._served: Served | None = None
        self._asked_at = -math.inf
        self._failed: tuple[float, ServerError | RequestError] | None = None
        self._shapes = lru_cache(8)(self._shapes_at)

    async def close(self) -> None:
        """Lets go of the threads and of the server outside."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        await self.upstream.close()

    async def run(self, work: Callable[[], T]) -> T:
        """Work on the processor, in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def serve(
        self,
        protocol: str,
        read: Callable[[], Awaitable[bytes]],
        parse: Callable[[bytes], Asked],
        write: Callable[[Asked, Answered], T],
    ) -> T:
        """One request, counted and told. Raises RefusedError and nothing else."""
        call = Call(protocol)
        try:
            with self._place():
                async with asyncio.timeout(self.limits.timeout):
                    return await self._answered(call, read, parse, write)
        except asyncio.CancelledError:
            call.status, call.reason = 499, "gone"
            raise
        except Exception as error:
            refused = refusal(error)
            call.status, call.reason = refused.status, refused.reason
            call.fault = type(error).__name__ if refused.status == 500 else ""
            self._forget(error)
            raise refused from (error if refused.status == 500 else None)
        finally:
            self.metrics.add(call)
            self.log(line(call))

    async def served(self) -> Served:
        """What the server outside serves, asked again after it failed; those who wait share what one is told.

        Raises ServerError, and RequestError where it cannot be asked.
        """
        loop = asyncio.get_running_loop()
        came = loop.time()
        async with self._asking:
            if self._served is None:
                if self._failed is not None and self._failed[0] >= came:
                    raise self._failed[1]
                try:
                    self._served = await self.upstream.ask()
                except (ServerError, RequestError) as error:
                    self._failed = loop.time(), error
                    raise
                self._asked_at = loop.time()
            return self._served

    async def ready(self) -> bool:
        """Whether the server outside is ready and serves releases of this obfuscator, and we take requests."""
        if asyncio.get_running_loop().time() - self._asked_at > _FRESH:
            self._served = None
        try:
            await self.served()
        except (ServerError, RequestError):
            return False
        return not self.stopping

    async def metadata(self) -> dict[str, Any]:
        """Of the model: the server's versions and outputs, our name and inputs. Raises ServerError."""
        told = (await self.served()).metadata
        try:
            outputs = [
                {"name": str(one["name"]), "datatype": str(one["datatype"]), "shape": [int(n) for n in one["shape"]]}
                for one in told["outputs"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError("metadata that are none", status="wrong") from error
        inputs = inputs_of(self.task)
        return {
            "name": self.name, "versions": versions(told), "platform": "sfumato", "inputs": inputs, "outputs": outputs,
        }  # fmt: skip

    def server(self) -> dict[str, Any]:
        """Metadata of the server."""
        return {"name": "sfumato gateway", "version": __version__, "extensions": ["binary_tensor_data", "statistics"]}

    def statistics(self) -> dict[str, Any]:
        """As of Triton's statistics extension: counts and times of requests since the start."""
        metrics = self.metrics

        def of(count: int, name: str) -> dict[str, int]:
            return {"count": count, "ns": metrics.ns[name]}

        done = metrics.answered
        times = {
            "success": of(done, "success"), "fail": of(metrics.failed, "fail"), "queue": of(done, "wait"),
            "compute_infer": of(done, "upstream"),
        }  # fmt: skip
        told = versions(self._served.metadata)[-1] if self._served else "1"
        one = {"name": self.name, "version": told, "inference_count": done, "execution_count": done}
        return {"model_stats": [{**one, "inference_stats": times}]}

    async def named(self, name: str, version: str = "") -> None:
        """Raises RefusedError where this is not our model, or not the version that the server outside answers with."""
        if name != self.name:
            raise RefusedError(404, "name", f"no such model; this gateway has {self.name}")
        if version and version != versions((await self.served()).metadata)[-1]:
            raise RefusedError(404, "name", "no such version of the model")

    async def _answered(
        self,
        call: Call,
        read: Callable[[], Awaitable[bytes]],
        parse: Callable[[bytes], Asked],
        write: Callable[[Asked, Answered], T],
    ) -> T:
        with call.stage("read"):
            body = await _in_time(read(), self.limits.body_timeout)
        call.bytes_in = len(body)
        with call.stage("wait"):
            await self._turn.acquire()
        try:
            with call.stage("decode"):
                asked = await self.run(partial(parse, body))
                await self.named(asked.model or self.name, asked.version)
                limits = self.limits
                records = await self.run(partial(records_of, asked.inputs, self.task, limits.records, limits.pixels))
            alpha = self._alpha(asked)
            served = await self.served()
            if not set(asked.outputs) <= set(served.outputs):
                raise RequestError("an output that is not there", wanted=" or ".join(served.outputs))
            with call.stage("obfuscate"):
                release = await self.run(partial(self.guard, records, alpha))
            call.alpha, call.records = alpha, len(records)
            call.bits, call.bytes_released = float(release.bits.sum()), release.nbytes
            with call.stage("upstream"):
                answers = await self.upstream(release)
            with call.stage("answer"):
                answered = Answered(
                    self.name, versions(served.metadata)[-1], dict(zip(served.outputs, answers, strict=True))
                )
                sites, ndim = release.sites, release.ndim
                made, call.bytes_out = await self.run(partial(self._written, asked, answered, sites, ndim, write))
            return made
        finally:
            self._turn.release()

    def _alpha(self, asked: Asked) -> float:
        value = asked.parameters.get("alpha", self.alpha)
        try:
            found = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            found = math.nan
        if not 0 <= found < 1:  # true of nan
            raise AlphaError("an alpha that is none", wanted="a number, 0 <= alpha < 1")
        return found

    def _written(
        self,
        asked: Asked,
        answered: Answered,
        sites: tuple[int, int],
        ndim: int,
        write: Callable[[Asked, Answered], T],
    ) -> tuple[T, int]:
        arrays: Sequence[Array] = list(answered.outputs.values())
        found = [(name_of(a), a.shape[1:]) for a in arrays]
        wanted = self._shapes(sites, ndim)
        if wanted is not None and found != wanted:
            raise ServerError(f"{found} for {wanted}", status="wrong")
        return write(asked, answered), sum(a.nbytes for a in arrays)

    @torch.inference_mode()
    def _shapes_at(self, sites: tuple[int, int], ndim: int) -> list[tuple[str, tuple[int, ...]]] | None:
        """Types and shapes of a record's outputs, as the provider's own tail has them; None where it is not here."""
        protected = self.guard.protected
        if protected.reference is None:
            return None
        zeros = torch.zeros(1, protected.obfuscator.shape.channels, *sites, device=protected.obfuscator.mean.device)
        outputs = self.task.outputs(protected.reference(unfold(zeros, ndim)))
        return [(name_of(o.cpu().numpy()), tuple(o.shape[1:])) for o in outputs]

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        if self.stopping:
            raise RefusedError(503, "stopping", "this gateway is about to end", again=AGAIN)
        if self._taken >= self.limits.places:
            raise RefusedError(
                429, "busy", f"{self._taken} requests are under way or wait: try again later", again=AGAIN
            )
        self._taken += 1
        self.metrics.in_flight.inc()
        try:
            yield
        finally:
            self._taken -= 1
            self.metrics.in_flight.dec()

    def _forget(self, error: BaseException) -> None:
        if isinstance(error, ServerError):
            self._served = None


def versions(metadata: Mapping[str, Any]) -> list[str]:
    """Of a model, as its server tells them; a server need not."""
    return [str(version) for version in metadata.get("versions", ())] or ["1"]


async def _in_time(reading: Awaitable[bytes], seconds: float) -> bytes:
    try:
        return await asyncio.wait_for(reading, seconds)
    except TimeoutError:
        raise RefusedError(408, "slow-body", f"the request did not arrive within {seconds:g} s") from None
