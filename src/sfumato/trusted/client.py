"""Sends releases to an inference server (Triton, or another of its protocol), through a guard and in no other way.

    client = sfumato.Client("grpcs://inference.example:8001", guard)
    faces = client.detect(frame, alpha=0.8)         # obfuscated, entered, sent, answered, postprocessed
    loc, conf = client(guard(frame, alpha=0.8))     # the same in two steps: anything but a release is a GuardError

What leaves is made from the bytes that `guard.open` gives. Only https and grpcs, or http and grpc to this very machine
(a proxy beside the client that speaks TLS): obfuscation is not encryption. A request that is tried again is the same
release, to the bit: a new draw of one record would tell more of it. Redirects are not followed.
"""

import asyncio
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import torch

from sfumato.core import channel, wire
from sfumato.core.errors import RequestError, ServerError, SfumatoError
from sfumato.core.release import Release
from sfumato.core.task import Image
from sfumato.trusted.guard import Guard
from sfumato.trusted.links import MOST, AsyncStraight, Straight

Answers = tuple[np.ndarray[Any, Any], ...]
Compression = Literal["gzip", "deflate"]
PORTS = {"http": 8000, "https": 443, "grpc": 8001, "grpcs": 443}
_PAUSE, _LONGEST = 0.1, 2.0  # seconds before the second try, doubled for each further one
_LONGEST_NAME = 256
_AGAIN = ("down", "busy")
_BUSY = {"429", "502", "503", "504", "StatusCode.UNAVAILABLE", "StatusCode.RESOURCE_EXHAUSTED"}
_SLOW = {"499", "408", "StatusCode.DEADLINE_EXCEEDED", "Deadline Exceeded"}
_NOT_FOUND = {"404", "StatusCode.NOT_FOUND", "StatusCode.UNIMPLEMENTED", "405", "501"}


@dataclass(frozen=True)
class TLS:
    """PEM files: authorities to trust (None: the system's), and a certificate and key of one's own for mutual TLS."""

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None

    def context(self) -> ssl.SSLContext:
        """Verifies names and certificates. Raises RequestError for files that are none."""
        try:
            made = ssl.create_default_context(cafile=self.ca)
            if self.cert:
                made.load_cert_chain(self.cert, self.key)
        except (OSError, ssl.SSLError) as error:
            raise RequestError("certificates that cannot be read", wanted="PEM files: ca, cert and key") from error
        return made

    def files(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Contents of ca, key, cert. Raises RequestError."""
        try:
            ca, key, cert = (
                None if path is None else Path(path).read_bytes() for path in (self.ca, self.key, self.cert)
            )
        except OSError as error:
            raise RequestError(f"{error.filename}: {error.strerror}", wanted="a PEM file") from error
        return ca, key, cert


@dataclass(frozen=True)
class Served:
    """What the server says of the model: facts of sfumato's export, most records at once, names of the outputs.

    `metadata` is what the protocol has of it.
    """

    facts: Mapping[str, str]
    batch: int
    outputs: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)


class _Base:
    """What both clients share: the address, what a release becomes, what an answer must be."""

    def __init__(
        self,
        url: str,
        guard: Guard,
        *,
        model: str | None = None,
        timeout: float = 30.0,
        retries: int = 3,
        tls: TLS | None = None,
        compression: Compression | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.scheme, self.address = _address(url)
        self.guard, self.timeout, self.retries = guard, timeout, retries
        self.model = model or f"{guard.protected.task.name.replace('-', '_')}_release"
        self.tls, self.compression, self.headers = tls or TLS(), compression, dict(headers or {})
        if timeout <= 0 or retries < 0:
            raise RequestError("a timeout of nothing, or fewer than no retries", wanted="timeout > 0, retries >= 0")
        self.grpc = self.scheme in ("grpc", "grpcs")
        self.secure = self.scheme in ("https", "grpcs")

    def _served(self, metadata: Mapping[str, Any], config: Mapping[str, Any]) -> Served:
        """Raises ServerError for a model that does not take releases of this guard's obfuscator."""
        try:
            return self._read(metadata, config)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ServerError(f"{self.model} describes itself in a way that cannot be read", status="wrong") from error

    def _read(self, metadata: Mapping[str, Any], config: Mapping[str, Any]) -> Served:
        inputs = {given["name"] for given in metadata.get("inputs", ())}
        if config:
            inputs = {given["name"] for given in config.get("input", ())}
        facts = {key: str(value.get("string_value", "")) for key, value in config.get("parameters", {}).items()}
        mine = self.guard.protected.digest
        if facts.get("kind") == "base":
            raise ServerError(f"{self.model} takes clean tensors, and those do not leave", status="refused")
        restored = facts.get("kind") == "noisy" and inputs == {"INPUT__0"}
        if not restored and inputs != set(wire.TYPES):
            raise ServerError(f"{self.model} does not take releases: it wants {sorted(inputs)}", status="wrong")
        if facts.get("artefact_digest", mine) != mine:
            raise ServerError(
                f"{self.model} answers obfuscator {facts['artefact_digest'][:12]}, and this one is {mine[:12]}: "
                "use both files of one fit", status="wrong",
            )  # fmt: skip
        if restored and self.guard.protected.outside is None:
            raise ServerError(f"{self.model} wants restored releases, and the restorer is not here", status="wrong")
        outputs = tuple(given["name"] for given in metadata.get("outputs", ()))
        told = [*outputs, *metadata.get("versions", ())]
        if not all(isinstance(name, str) and len(name) <= _LONGEST_NAME for name in told):
            raise ValueError
        return Served(facts, max(1, int(config.get("max_batch_size", 1))), outputs, metadata)

    def _requests(self, opened: bytes, served: Served) -> list[wire.Tensors]:
        """What is sent for the bytes the guard opened, a request for each run of records of one alpha."""
        release = Release.from_bytes(opened)
        protected, block = self.guard.protected, release.block
        if served.facts.get("whole_blocks") == "true" and any(side % block for side in release.sites):
            raise RequestError(
                f"{release.sites[0]} x {release.sites[1]} sites for a server that takes whole blocks of {block} alone",
                wanted="an input size that divides evenly", do="--size 1024, or export with --backend python",
            )  # fmt: skip
        alphas, parts, start = release.alpha.tolist(), [], 0
        for end in range(1, len(alphas) + 1):
            if end < len(alphas) and alphas[end] == alphas[start] and end - start < served.batch:
                continue
            part = Release(
                release.tensor[start:end], release.alpha[start:end], release.digest, release.bits[start:end],
                release.ndim, block, release.sites,
            )  # fmt: skip
            if served.facts.get("kind") == "noisy":
                assert protected.outside is not None
                z = protected.outside.restored(part)  # type: ignore[attr-defined]
                parts.append({"INPUT__0": z.contiguous().cpu().numpy()})
            else:
                parts.append(wire.to_tensors(part, protected.at(alphas[start]).carrying.cpu().numpy()))
            start = end
        return parts

    def _joined(self, answers: Sequence[Answers], requests: Sequence[wire.Tensors]) -> Answers:
        """Answers of all requests as one. Raises ServerError for what no server of this model can have meant."""
        for answer, request in zip(answers, requests, strict=True):
            rows = len(next(iter(request.values())))
            if not answer or any(a is None or a.ndim < 1 or len(a) != rows for a in answer):
                shapes = [None if a is None else list(a.shape) for a in answer]
                raise ServerError(f"{self.model} answered {shapes} for {rows} records", status="wrong")
            if not all(np.isfinite(a).all() for a in answer if a.dtype.kind == "f"):
                raise ServerError(f"{self.model} answered what is no number", status="wrong")
        try:
            return tuple(np.concatenate(parts) for parts in zip(*answers, strict=True))
        except ValueError as error:
            raise ServerError(f"{self.model} answered in several shapes", status="wrong") from error

    def result(self, answers: Answers, size: tuple[int, int] | None = None) -> Any:
        """`Protected.postprocess` of what the server answered. Raises ServerError where that cannot be."""
        raw = tuple(torch.from_numpy(np.array(a)) for a in answers)
        try:
            return self.guard.protected.postprocess(raw, size)
        except (RequestError, ValueError, RuntimeError, IndexError, TypeError) as error:
            shapes = [list(a.shape) for a in answers]
            raise ServerError(f"{self.model} answered {shapes}, which is no result", status="wrong") from error

    def _results(self, answers: Answers, record: Image | Sequence[Image]) -> Any:
        if isinstance(record, np.ndarray):
            return self.result(answers, record.shape[:2])
        return [self.result(tuple(a[i : i + 1] for a in answers), one.shape[:2]) for i, one in enumerate(record)]

    def _library(self, aio: bool) -> Any:
        try:
            if self.grpc:
                import tritonclient.grpc as plain
                import tritonclient.grpc.aio as awaited
            else:
                import tritonclient.http as plain
                import tritonclient.http.aio as awaited
        except ImportError as error:
            raise RequestError(
                "tritonclient is not installed", wanted="it, to speak to a server", do="pip install 'sfumato[triton]'"
            ) from error
        return awaited if aio else plain

    def _inputs(self, tensors: wire.Tensors) -> list[Any]:
        library, inputs = self._library(aio=False), []
        for name, array in tensors.items():
            one = library.InferInput(name, list(array.shape), wire.TYPES.get(name, "FP32"))
            one.set_data_from_numpy(array)
            inputs.append(one)
        return inputs

    def _settings(self) -> dict[str, Any]:
        """Of one request: how it is packed, and how long it may take."""
        if self.grpc:
            return {"compression_algorithm": self.compression, "client_timeout": self.timeout}
        return {"request_compression_algorithm": self.compression}

    def _asking(self) -> dict[str, Any]:
        """Of a question about the model."""
        more = {"as_json": True, "client_timeout": self.timeout} if self.grpc else {}
        return {"headers": self.headers, **more}

    def _channel(self) -> dict[str, Any]:
        """Of a gRPC connection."""
        again = ("grpc.max_reconnect_backoff_ms", round(1000 * _LONGEST))  # without it, two minutes after an outage
        limit = ("grpc.max_receive_message_length", MOST)
        direct = ("grpc.enable_http_proxy", 0)  # the environment's would see in clear what TLS does not wrap
        made: dict[str, Any] = {"ssl": self.secure, "channel_args": [limit, again, direct]}
        if self.secure:
            ca, key, cert = (None if p is None else str(p) for p in (self.tls.ca, self.tls.key, self.tls.cert))
            self.tls.files()
            made |= {"root_certificates": ca, "private_key": key, "certificate_chain": cert}
        return made


class Client(_Base):
    """Blocking; may be shared by threads, each of which gets a connection of its own.

    `url` is http(s)://HOST:PORT or grpc(s)://HOST:PORT. `model` takes releases (its name is the task's without one) or
    is the TR's, which takes restored ones. `shared_memory` hands inputs to a server on this machine without copying
    them through a socket. Raises RequestError for another address; calls raise GuardError before they connect and
    ServerError where the server does not answer as it should.
    """

    def __init__(self, url: str, guard: Guard, *, shared_memory: bool = False, **options: Any) -> None:
        super().__init__(url, guard, **options)
        if shared_memory and not _here(urlsplit(url).hostname or ""):
            raise RequestError("shared memory with another machine", wanted="a server on this one")
        self.shared_memory = shared_memory
        self._own = threading.local()

    def __call__(self, payload: object) -> Answers:
        """OUTPUT__0, OUTPUT__1 ... of every record of a release."""
        opened = self.guard.open(payload)  # before the server is asked what it serves
        served = self.served
        requests = self._requests(opened, served)
        return self._joined([self._tried(partial(self._once, request, served)) for request in requests], requests)

    def detect(self, record: Image | Sequence[Image], alpha: channel.Alpha = 0.8) -> Any:
        """The task's result for one record, or a list for several of one input size.

        The server is asked what it serves first: a release that is entered and cannot be sent is lost to its record.
        """
        _ = self.served
        return self._results(self(self.guard(record, alpha)), record)

    @cached_property
    def served(self) -> Served:
        """What the server says of the model; asked once."""
        served: Served = self._tried(self._ask)
        return served

    def statistics(self) -> dict[str, Any]:
        """The server's counts and times for the model."""
        told = self._tried(lambda: self._link.get_inference_statistics(self.model, **self._asking()))
        return dict(told)

    def close(self) -> None:
        """This thread's connection."""
        link = self._own.__dict__.pop("link", None)
        memory = self._own.__dict__.pop("memory", None)
        if memory is not None:
            memory.close(link)
        if link is not None:
            link.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _link(self) -> Any:
        if not hasattr(self._own, "link"):
            library = self._library(aio=False)
            if self.grpc:
                self._own.link = library.InferenceServerClient(self.address, **self._channel())
            else:
                self._own.link = library.InferenceServerClient(
                    self.address, ssl=self.secure, connection_timeout=self.timeout, network_timeout=self.timeout,
                    ssl_context_factory=self.tls.context if self.secure else None,
                )  # fmt: skip
                self._own.link._client_stub = Straight(self._own.link._client_stub)
        return self._own.link

    def _ask(self) -> Served:
        metadata = self._link.get_model_metadata(self.model, **self._asking())
        try:
            config = self._link.get_model_config(self.model, **self._asking())
        except Exception as error:
            if not _says(error, _NOT_FOUND):
                raise
            config = {}  # the open protocol has metadata alone
        return self._served(metadata, config.get("config", config))

    def _once(self, request: wire.Tensors, served: Served) -> Answers:
        inputs = self._inputs(request)
        with self._lent(inputs, request):
            answer = self._link.infer(self.model, inputs, headers=self.headers, **self._settings())
        return tuple(answer.as_numpy(name) for name in served.outputs)

    def _lent(self, inputs: Sequence[Any], request: wire.Tensors) -> AbstractContextManager[None]:
        if not self.shared_memory:
            return nullcontext()
        if not hasattr(self._own, "memory"):
            self._own.memory = _Memory({"client_timeout": self.timeout} if self.grpc else {})
        return self._own.memory.lent(self._link, inputs, request)  # type: ignore[no-any-return]

    def _tried(self, ask: Callable[[], Any]) -> Any:
        for tried in range(self.retries + 1):
            try:
                return ask()
            except Exception as error:
                trouble = _trouble(error, self.address, self.timeout)
                self.close()
                if getattr(trouble, "status", "") not in _AGAIN or tried == self.retries:
                    raise trouble from error
            time.sleep(_pause(tried))
        raise AssertionError


class AsyncClient(_Base):
    """`Client` for asyncio; one to an event loop. Obfuscation runs in a thread beside it."""

    _linked: Any = None
    _known: Served | None = None

    async def __call__(self, payload: object) -> Answers:
        """As of `Client`."""
        opened = self.guard.open(payload)
        served = await self.served()
        requests = await asyncio.to_thread(self._requests, opened, served)
        answers = await asyncio.gather(*(self._tried(partial(self._once, r, served)) for r in requests))
        return self._joined(answers, requests)

    async def detect(self, record: Image | Sequence[Image], alpha: channel.Alpha = 0.8) -> Any:
        """As of `Client`."""
        await self.served()
        return self._results(await self(await asyncio.to_thread(self.guard, record, alpha)), record)

    async def served(self) -> Served:
        """As of `Client`."""
        return self._known or await self.ask()

    async def ask(self) -> Served:
        """What the server says now, for the calls after this one. Raises ServerError."""
        self._known = None
        known: Served = await self._tried(self._ask)
        self._known = known
        return known

    async def close(self) -> None:
        """The connections."""
        link, self._linked = self._linked, None
        if link is not None:
            await link.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def _link(self) -> Any:
        if self._linked is None:
            library = self._library(aio=True)
            if self.grpc:
                self._linked = library.InferenceServerClient(self.address, **self._channel())
            else:
                context = self.tls.context() if self.secure else None
                self._linked = library.InferenceServerClient(
                    self.address, ssl=self.secure, conn_timeout=self.timeout, ssl_context=context
                )
                self._linked._stub = AsyncStraight(self._linked._stub)
        return self._linked

    async def _ask(self) -> Served:
        metadata = await self._link.get_model_metadata(self.model, **self._asking())
        try:
            config = await self._link.get_model_config(self.model, **self._asking())
        except Exception as error:
            if not _says(error, _NOT_FOUND):
                raise
            config = {}
        return self._served(metadata, config.get("config", config))

    async def _once(self, request: wire.Tensors, served: Served) -> Answers:
        inputs = self._inputs(request)
        plain = {} if self.grpc else {"Accept-Encoding": "identity"}  # aiohttp would ask for gzip, which takes longer
        answer = await self._link.infer(self.model, inputs, headers={**plain, **self.headers}, **self._settings())
        return tuple(answer.as_numpy(name) for name in served.outputs)

    async def _tried(self, ask: Callable[[], Any]) -> Any:
        for tried in range(self.retries + 1):
            try:
                return await asyncio.wait_for(ask(), self.timeout)
            except Exception as error:
                trouble = _trouble(error, self.address, self.timeout)
                if getattr(trouble, "status", "") not in _AGAIN or tried == self.retries:
                    raise trouble from error
            await asyncio.sleep(_pause(tried))
        raise AssertionError


class _Memory:
    """One region of system shared memory for the inputs of one connection, as large as the largest request was."""

    def __init__(self, within: Mapping[str, float]) -> None:
        self.within = within  # over HTTP the connection has a time of its own
        self.name, self.size, self.region = f"sfumato-{random.SystemRandom().getrandbits(64):016x}", 0, None

    @contextmanager
    def lent(self, link: Any, inputs: Sequence[Any], request: wire.Tensors) -> Iterator[None]:
        import tritonclient.utils.shared_memory as memory

        needed = sum(array.nbytes for array in request.values())
        if needed > self.size:
            self.close(link)
            self.region = memory.create_shared_memory_region(self.name, f"/{self.name}", needed, create_only=True)
            self.size = needed
            link.register_system_shared_memory(self.name, f"/{self.name}", needed, **self.within)
        memory.set_shared_memory_region(self.region, list(request.values()))
        offset = 0
        for one, array in zip(inputs, request.values(), strict=True):
            one.set_shared_memory(self.name, array.nbytes, offset)
            offset += array.nbytes
        yield

    def __del__(self) -> None:
        """A thread that ended closes nothing, and the region would outlive it."""
        self.close(None)

    def close(self, link: Any) -> None:
        """Gone here, and there where the server still listens."""
        import tritonclient.utils.shared_memory as memory

        if self.region is not None:
            try:
                link.unregister_system_shared_memory(self.name, **self.within)
            except Exception:  # a server that is down holds nothing
                self.size = 0
            memory.destroy_shared_memory_region(self.region)
            self.region, self.size = None, 0


def _pause(tried: int) -> float:
    """Seconds until the next try: doubled each time, and not the same for all who wait."""
    pause: float = min(_LONGEST, _PAUSE * 2**tried)
    return pause * random.uniform(0.5, 1.0)


def _says(error: BaseException, words: set[str]) -> bool:
    status = getattr(error, "status", None)
    return str(status() if callable(status) else status) in words


def _trouble(error: Exception, address: str, timeout: float) -> SfumatoError:
    """What a library raised, as an error that says who is to blame and whether to try again."""
    if isinstance(error, SfumatoError):
        return error
    name = type(error).__name__
    if isinstance(error, TimeoutError) or "imeout" in name or _says(error, _SLOW):
        return ServerError(f"{address} did not answer within {timeout:g} s", status="slow")
    if _says(error, _BUSY):
        return ServerError(f"{address} is not ready to answer", status="busy")
    if isinstance(error, (OSError, EOFError)) or "Connect" in name or "Disconnected" in name or "HTTP" in name:
        return ServerError(f"{address} cannot be reached, or broke off ({name})", status="down")
    if name == "InferenceServerException":
        return ServerError(f"{address} refused: {str(error)[:500]}", status="refused")
    return ServerError(f"{address} answered what cannot be read ({name})", status="wrong")


def _address(url: str) -> tuple[str, str]:
    """Scheme and HOST:PORT. Raises RequestError."""
    try:
        parts = urlsplit(url)
        right = (
            parts.scheme in PORTS and bool(parts.hostname) and parts.port != 0 and not (parts.query or parts.fragment)
        )
    except ValueError:
        right = False
    if not right or parts.username or parts.path not in ("", "/"):  # not shown: it may hold a password
        raise RequestError("an address that is none", wanted="https://HOST:PORT or grpcs://HOST:PORT")
    if parts.scheme in ("http", "grpc") and not _here(parts.hostname or ""):
        raise RequestError(
            f"{parts.scheme} to {parts.hostname}", wanted=f"{parts.scheme}s: obfuscation is not encryption",
            do=f"{parts.scheme}s://",
        )  # fmt: skip
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return parts.scheme, f"{host}:{parts.port or PORTS[parts.scheme]}"


def _here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
