"""One namespace of a cluster, through kr8s; what goes wrong leaves as an error of ours that says what to do.

Kubernetes 1.20 and later is what the objects need, and what was tested; kr8s itself promises less, and warns.
"""

import asyncio
import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import kr8s
import kr8s.asyncio
import kr8s.objects

from sfumato.cluster.manifests import Manifest
from sfumato.core.errors import ClusterError, SfumatoError

KINDS: dict[str, Any] = {
    "Job": kr8s.objects.Job,
    "Pod": kr8s.objects.Pod,
    "PersistentVolumeClaim": kr8s.objects.PersistentVolumeClaim,
    # a class and not a name: kr8s 0.20.15, asked for a kind by name, then takes later names for that kind too
    "StorageClass": kr8s.objects.new_class(
        "StorageClass", "storage.k8s.io/v1", asyncio=False, namespaced=False, plural="storageclasses"
    ),
}
EXEC = "v4.channel.k8s.io"
STDIN, STDOUT, STDERR, STATUS = range(4)  # channels of the protocol


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    try:
        yield
    except kr8s.NotFoundError as error:
        raise ClusterError(f"{what}: not found", wanted="one that is there", do="look at its name and namespace") from (
            error
        )
    except kr8s.ServerError as error:
        status = error.response.status_code if error.response is not None else 500
        if status in (401, 403):
            do = "ask for a role that may, or name another --context"
            raise ClusterError(f"{what}: {error}", wanted="permission", do=do) from None
        if status < 500:
            raise ClusterError(f"{what}: {error}", wanted="a request the cluster takes") from None
        raise SfumatoError(f"{what}: the API server failed: {error}") from None
    except (httpx.HTTPError, OSError, kr8s.APITimeoutError, kr8s.ConnectionClosedError) as error:
        raise ClusterError(
            f"{what}: no answer from the cluster: {error or type(error).__name__}",
            wanted="a cluster that answers", do="kubectl cluster-info; KUBECONFIG or --context name another",
        ) from None  # fmt: skip


class Cluster:
    """The objects of a namespace. Raises ClusterError without a cluster, and where one refuses."""

    def __init__(self, namespace: str | None = None, context: str | None = None) -> None:
        self._context, self._file = (
            context,
            os.environ.get("KUBECONFIG"),
        )  # named, or kr8s would go on with an older one
        with _said("connecting"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                self._api = kr8s.api(kubeconfig=self._file, namespace=namespace, context=context)
            except (ValueError, KeyError) as error:
                do = "set KUBECONFIG, or name a --context of it"
                raise ClusterError(f"no cluster: {error}", wanted="credentials of one", do=do) from None
        self.namespace: str = namespace or str(self._api.namespace)

    def create(self, manifest: Manifest) -> str:
        """Makes the object; its name."""
        meta = {**manifest["metadata"], "namespace": self.namespace}
        made = KINDS[manifest["kind"]]({**manifest, "metadata": meta}, api=self._api)
        with _said(f"creating {manifest['kind']} {meta.get('name', meta.get('generateName'))}"):
            made.create()
        return str(made.raw["metadata"]["name"])

    def objects(self, kind: str, labels: dict[str, str] | None = None) -> list[Manifest]:
        """The objects of a kind that carry the labels."""
        selector = ",".join(f"{key}={value}" for key, value in (labels or {}).items()) or None
        with _said(f"listing {kind} in {self.namespace}"):
            found = self._api.get(KINDS[kind], namespace=self.namespace, label_selector=selector, raw=True)
            return [dict(one) for one in found]

    def find(self, kind: str, name: str) -> Manifest | None:
        """The object of that name, None where there is none."""
        return next((one for one in self.objects(kind) if one["metadata"]["name"] == name), None)

    def delete(self, kind: str, name: str, *, missing_ok: bool = False) -> None:
        """Removes an object and what belongs to it."""
        try:
            with _said(f"deleting {kind} {name}"):
                meta = {"name": name, "namespace": self.namespace}
                KINDS[kind]({"metadata": meta}, api=self._api).delete(propagation_policy="Background")
        except ClusterError as error:
            if not missing_ok or "not found" not in error.got:
                raise

    def logs(self, pod: str, *, lines: int | None = None, follow: bool = False) -> Iterator[str]:
        """What a pod printed, line by line, to both of its streams."""
        with _said(f"log of {pod}"):
            one = kr8s.objects.Pod({"metadata": {"name": pod, "namespace": self.namespace}}, api=self._api)
            yield from one.logs(tail_lines=lines, follow=follow, timeout=None)

    def call(self, pod: str, command: list[str], stdin: Iterable[bytes] = ()) -> str:
        """Runs a command in a pod; what it printed. Raises SfumatoError with what it said where it failed."""
        with _said(f"running a command in {pod}"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            code, out, err = asyncio.run(self._call(pod, command, stdin))
        if code:
            raise SfumatoError(f"{pod}: {err.decode(errors='replace').strip() or f'exit code {code}'}")
        return out.decode()

    async def _call(self, pod: str, command: list[str], stdin: Iterable[bytes]) -> tuple[bool, bytes, bytes]:
        # kr8s' own exec takes no stdin from servers before 1.29, which cannot be told that it has ended
        api = await kr8s.asyncio.api(kubeconfig=self._file, namespace=self.namespace, context=self._context)
        params = {"command": command, "stdin": "true", "stdout": "true", "stderr": "true"}
        got = {STDOUT: b"", STDERR: b""}
        async with api.open_websocket(
            url=f"pods/{pod}/exec", namespace=self.namespace, subprotocols=(EXEC,), params=params
        ) as socket:
            for chunk in stdin:
                await socket.send_bytes(bytes([STDIN]) + chunk)
            while True:
                message = await socket.receive_bytes()
                channel, content = message[0], message[1:]
                if channel == STATUS:
                    return json.loads(content)["status"] != "Success", got[STDOUT], got[STDERR]
                got[channel] += content
