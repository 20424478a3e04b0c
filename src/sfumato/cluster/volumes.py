"""Volumes and what is in them: PersistentVolumeClaims, and a folder copied file by file into one."""

import contextlib
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sfumato.cluster import receive
from sfumato.cluster.manifests import DATA, Manifest, uploader
from sfumato.core.errors import ClusterError, DatasetError, SfumatoError

if TYPE_CHECKING:
    from sfumato.cluster.api import Cluster

IS_DEFAULT = "storageclass.kubernetes.io/is-default-class"
PIECE = 1 << 18  # bytes sent at a time
DAY = 86400  # s, the longest a copy may take
SPOILT = (
    "ErrImageNeverPull",
    "InvalidImageName",
    "ImagePullBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
)
Told = Callable[[str], None]


def create(cluster: "Cluster", claim: Manifest, *, patience: float = 60) -> str:
    """Makes the claim and waits until it has a volume; what it waits for where that comes with the first pod.

    Seconds of patience. Raises ClusterError; then there is no claim left behind.
    """
    waits = _binds_late(cluster, claim["spec"].get("storageClassName"))
    name = cluster.create(claim)
    if waits:
        return "waits for its first pod"
    with _undone(cluster, "PersistentVolumeClaim", name):
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if phase(cluster.find("PersistentVolumeClaim", name)) == "Bound":
                return "bound"
            time.sleep(0.5)
        wanted = "a storage class whose provisioner answers"
        raise ClusterError(f"volume {name}: none after {patience:g} s", wanted=wanted, do="--storage-class another")


def phase(claim: Manifest | None) -> str:
    """Bound, Pending or Lost; Missing where there is no claim."""
    return str(claim["status"].get("phase", "Pending")) if claim else "Missing"


def there(cluster: "Cluster", name: str) -> None:
    """Raises ClusterError where there is no such claim."""
    if cluster.find("PersistentVolumeClaim", name) is None:
        got = f"volume {name} in {cluster.namespace}: not found"
        raise ClusterError(got, wanted="a volume with the data", do=f"sfumato k8s volume create {name} --size 50Gi")


def put(
    cluster: "Cluster", folder: Path, claim: str, path: str, image: str, told: Told, bar: Callable[[int], object]
) -> int:
    """Copies the files of a folder to `path` of a volume; how many were missing there or differed.

    Files arrive whole or not at all, and are read back: a copy that was cut off goes on with the first missing file.
    `bar` is told of every byte sent. Raises DatasetError, ClusterError, SfumatoError.
    """
    target = PurePosixPath(path.lstrip("/"))
    if ".." in target.parts:
        raise ClusterError(f"path {path}", wanted="a path on the volume", do=f"{claim}:FDDB")
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder", wanted="a folder to copy")
    there(cluster, claim)
    told("reading the folder")
    here = receive.listed(folder)
    with _pod(cluster, uploader(claim, image, DAY), told) as pod:
        call = ["python3", "-m", "sfumato.cluster.receive"]
        root = f"{DATA}/{target}"
        has = json.loads(cluster.call(pod, [*call, "list", root]))
        missing = [name for name, digest in here.items() if has.get(name) != digest]
        told(f"{len(missing)} of {len(here)} files are missing there")
        if missing:
            stored = json.loads(cluster.call(pod, [*call, "store", root], packed(folder, missing, bar)))
            wrong = [name for name in missing if stored.get(name) != here[name]]
            if wrong:
                raise SfumatoError(f"{len(wrong)} files arrived otherwise than they were sent, the first {wrong[0]}")
    return len(missing)


def packed(folder: Path, names: list[str], bar: Callable[[int], object]) -> Iterator[bytes]:
    """A tar of the files in pieces."""
    for name in names:
        info = tarfile.TarInfo(name)
        info.size = (folder / name).stat().st_size
        yield info.tobuf(tarfile.GNU_FORMAT)
        left = info.size
        with (folder / name).open("rb") as file:
            while left and (piece := file.read(min(PIECE, left))):
                left -= len(piece)
                bar(len(piece))
                yield piece
        if left:
            raise SfumatoError(f"{folder / name} became shorter while it was read")
        yield bytes(-info.size % tarfile.BLOCKSIZE)
    yield bytes(tarfile.RECORDSIZE)  # the end, and more than enough to fill the last record
    yield bytes(tarfile.RECORDSIZE)


def waiting(pod: Manifest) -> tuple[str, str]:
    """Why a pod's container does not run: (reason, message), both empty where it does."""
    for status in pod["status"].get("containerStatuses", []):
        if why := status.get("state", {}).get("waiting"):
            return str(why.get("reason", "")), str(why.get("message", ""))
    for condition in pod["status"].get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return "not scheduled", str(condition.get("message", ""))
    return "", ""


def spoilt(pod: Manifest) -> ClusterError | None:
    """What keeps a pod from ever starting, the image above all."""
    reason, message = waiting(pod)
    if reason not in SPOILT:
        return None
    image = pod["spec"]["containers"][0]["image"]
    wanted = "an image the nodes have or can pull"
    return ClusterError(f"image {image}: {reason}: {message}", wanted=wanted, do="--image another")


@contextlib.contextmanager
def _pod(cluster: "Cluster", manifest: Manifest, told: Told) -> Iterator[str]:
    """A pod that runs, gone at the end."""
    name = cluster.create(manifest)
    try:
        said = ""
        while True:
            pod = cluster.find("Pod", name)
            if pod is None or pod["status"].get("phase") in ("Failed", "Succeeded"):
                raise SfumatoError(f"pod {name} ended before its work")
            if error := spoilt(pod):
                raise error
            if pod["status"].get("phase") == "Running":
                break
            why = " ".join(filter(None, waiting(pod)))
            if why != said:
                told(f"pod {name}: {why}")
                said = why
            time.sleep(0.5)
        yield name
    finally:
        cluster.delete("Pod", name, missing_ok=True)


@contextlib.contextmanager
def _undone(cluster: "Cluster", kind: str, name: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        cluster.delete(kind, name, missing_ok=True)
        raise


def _binds_late(cluster: "Cluster", name: str | None) -> bool:
    """Whether the claim's class waits for a first pod. Raises ClusterError where there is no such class."""
    try:
        classes = {one["metadata"]["name"]: one for one in cluster.objects("StorageClass")}
    except ClusterError:  # a role that may make claims need not see classes; the wait will tell
        return False
    if name is None:
        marked = [one for one in classes.values() if one["metadata"].get("annotations", {}).get(IS_DEFAULT) == "true"]
        if not marked:
            got = "no storage class is the default"
            raise ClusterError(got, wanted="a storage class", do=f"--storage-class {' or '.join(classes) or 'NAME'}")
        return bool(marked[0].get("volumeBindingMode") == "WaitForFirstConsumer")
    if name not in classes:
        got, has = f"storage class {name}: not found", ", ".join(classes) or "none"
        raise ClusterError(got, wanted=f"one that the cluster has: {has}", do="leave --storage-class out, or name one")
    return bool(classes[name].get("volumeBindingMode") == "WaitForFirstConsumer")
