"""`sfumato k8s`: TR-4928's batch scenario on a Kubernetes cluster, in kubectl's words.

KUBECONFIG, ~/.kube/config or a pod's service account names the cluster, as for kubectl.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli.common import Quiet, note, numbers, plural
from sfumato.cli.measure import table as show

if TYPE_CHECKING:
    from sfumato.cluster.api import Cluster
    from sfumato.cluster.manifests import Manifest, Run

IMAGE = "sfumato:0.1.0"
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Namespace; without it the context's.")]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig; without it the current one.")]
Image = Annotated[str, typer.Option(help="Image of deploy/Containerfile, under the name it has in the cluster.")]
Name = Annotated[str, typer.Argument(help="Name of the run.")]
RunName = Annotated[str, typer.Option(help="Name of the run; its Jobs begin with it.")]
Dataset = Annotated[str, typer.Option(help="Folder in FDDB's layout, as the pods see it: the volume is at /data.")]
Volume = Annotated[str, typer.Option(help="The volume (PersistentVolumeClaim) with the data.")]
Sweep = Annotated[bool, typer.Option("--sweep", help="The table: raw and TR-4928's alphas, or yours.")]
Alphas = Annotated[list[float] | None, typer.Option(help="Share of the bits withheld; as often as you like.")]
Folds = Annotated[str | None, typer.Option(help="Folds, such as 1,2,3; without it all ten.")]
Limit = Annotated[int | None, typer.Option(min=1, help="The first images of each fold only.")]
Artefacts = Annotated[str | None, typer.Option(help="Folder of a fit, as the pods see it.")]
Weights = Annotated[str | None, typer.Option(help="FaceBoxes weights, as the pods see them.")]
Cpu = Annotated[float, typer.Option(min=0.1, help="Cores of each pod.")]
Memory = Annotated[str, typer.Option(help="Memory of each pod.")]
Gpus = Annotated[int, typer.Option(min=0, help="GPUs of each pod (nvidia.com/gpu); wants an image for GPUs.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write every figure there as JSON.")]
Size = Annotated[str, typer.Option(help="Size, such as 50Gi.")]
StorageClass = Annotated[str | None, typer.Option(help="Storage class; without it the cluster's default.")]
Access = Annotated[str, typer.Option(help="Access mode; ReadWriteMany lets Jobs run on several nodes.")]


def job_run(
    dataset: Dataset,
    sweep: Sweep = False,
    alpha: Alphas = None,
    name: RunName = "accuracy",
    volume: Volume = "inference-data",
    image: Image = IMAGE,
    folds: Folds = None,
    limit: Limit = None,
    artefacts: Artefacts = None,
    weights: Weights = None,
    cpu: Cpu = 1,
    memory: Memory = "2Gi",
    gpus: Gpus = 0,
    json_file: JsonFile = None,
    namespace: Namespace = None,
    context: Context = None,
    quiet: Quiet = False,
) -> None:
    """Make a Job for every alpha and the raw one, follow them, and print the table.

    The same command again takes up a run that was left: Jobs that are there and folds that are done stay.
    """
    from sfumato.cli.common import writable
    from sfumato.cluster import runs

    run = _run(dataset, sweep, alpha, name, volume, image, (folds, limit, artefacts, weights), cpu, memory, gpus)
    writable(json_file)
    cluster = _cluster(namespace, context)
    made = runs.start(cluster, run)
    _told(quiet)(f"{plural(len(made), 'job')} made in {cluster.namespace}")
    _print(runs.finish(cluster, name, _told(quiet), made), json_file)


def job_wait(name: Name = "accuracy", namespace: Namespace = None, context: Context = None) -> None:
    """Follow the Jobs of a run until all are done."""
    from sfumato.cluster import runs

    runs.wait(_cluster(namespace, context), name, note)


def job_logs(
    name: Name = "accuracy",
    arm: Annotated[str, typer.Argument(help="raw, alpha-0-8 or such, or table.")] = "raw",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the pod ends.")] = False,
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """What the pod of one arm printed."""
    from sfumato.cluster import runs

    for line in runs.logs(_cluster(namespace, context), name, arm, follow=follow):
        typer.echo(line)


def job_table(
    name: Name = "accuracy",
    json_file: JsonFile = None,
    namespace: Namespace = None,
    context: Context = None,
    quiet: Quiet = False,
) -> None:
    """The table of a run, once its Jobs are done."""
    from sfumato.cli.common import writable
    from sfumato.cluster import runs

    writable(json_file)
    _print(runs.finish(_cluster(namespace, context), name, _told(quiet)), json_file)


def job_delete(name: Name = "accuracy", namespace: Namespace = None, context: Context = None) -> None:
    """Take the Jobs of a run away; what they found stays on the volume."""
    from sfumato.cluster import runs

    typer.echo(f"{plural(runs.delete(_cluster(namespace, context), name), 'job')} deleted")


def volume_create(
    name: Annotated[str, typer.Argument(help="Name of the volume.")],
    size: Size,
    storage_class: StorageClass = None,
    access: Access = "ReadWriteMany",
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """Make a volume (PersistentVolumeClaim), and wait until it is bound."""
    from sfumato.cluster import manifests, volumes

    claim = manifests.volume(name, size, storage_class, access)
    cluster = _cluster(namespace, context)
    typer.echo(f"volume {name} created in {cluster.namespace}: {volumes.create(cluster, claim)}")


def volume_list(namespace: Namespace = None, context: Context = None) -> None:
    """The volumes of a namespace."""
    from sfumato.cluster import volumes

    for claim in _cluster(namespace, context).objects("PersistentVolumeClaim"):
        spec = claim["spec"]
        size = claim["status"].get("capacity", spec["resources"]["requests"])["storage"]
        name, status = claim["metadata"]["name"], volumes.phase(claim)
        typer.echo(f"{name:<32} {size:>8}  {status:<8} {','.join(spec['accessModes'])}  {spec.get('storageClassName')}")


def volume_delete(
    name: Annotated[str, typer.Argument(help="Name of the volume.")],
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """Delete a volume and, where its class says so, what is on it."""
    from sfumato.cluster import volumes

    cluster = _cluster(namespace, context)
    volumes.there(cluster, name)
    cluster.delete("PersistentVolumeClaim", name)
    typer.echo(f"volume {name} deleted in {cluster.namespace}")


def data_put(
    folder: Annotated[Path, typer.Argument(help="Local folder.")],
    to: Annotated[str, typer.Argument(metavar="VOLUME:PATH", help="Where to, such as inference-data:FDDB.")],
    image: Image = IMAGE,
    namespace: Namespace = None,
    context: Context = None,
    quiet: Quiet = False,
) -> None:
    """Copy the files of a local folder to a volume, checked by SHA-256; again, it copies what is missing or differs."""
    from tqdm import tqdm

    from sfumato.cluster import volumes

    claim, _, path = to.partition(":")
    cluster = _cluster(namespace, context)
    with tqdm(unit="B", unit_scale=True, disable=quiet) as bar:
        count = volumes.put(cluster, folder, claim, path, image, _told(quiet), bar.update)
    typer.echo(f"{plural(count, 'file')} copied to {claim}:/{path.lstrip('/')}; the volume has all of the folder")


def render_job(
    dataset: Dataset,
    sweep: Sweep = False,
    alpha: Alphas = None,
    name: RunName = "accuracy",
    volume: Volume = "inference-data",
    image: Image = IMAGE,
    folds: Folds = None,
    limit: Limit = None,
    artefacts: Artefacts = None,
    weights: Weights = None,
    cpu: Cpu = 1,
    memory: Memory = "2Gi",
    gpus: Gpus = 0,
) -> None:
    """The Jobs of a run; the last one scores what the others found, and is to be applied after them."""
    from sfumato.cluster import manifests

    run = _run(dataset, sweep, alpha, name, volume, image, (folds, limit, artefacts, weights), cpu, memory, gpus)
    _yaml([*manifests.jobs(run), manifests.table(run)])


def render_volume(
    name: Annotated[str, typer.Argument(help="Name of the volume.")],
    size: Size,
    storage_class: StorageClass = None,
    access: Access = "ReadWriteMany",
) -> None:
    """A volume (PersistentVolumeClaim)."""
    from sfumato.cluster import manifests

    _yaml([manifests.volume(name, size, storage_class, access)])


def _run(
    dataset: str, sweep: bool, alpha: list[float] | None, name: str, volume: str, image: str,
    given: tuple[str | int | None, ...], cpu: float, memory: str, gpus: int,
) -> "Run":  # fmt: skip
    """Settings of a run. Raises AlphaError, ClusterError, RequestError."""
    from sfumato.cluster.manifests import Run
    from sfumato.core import channel
    from sfumato.measurement import ALPHAS

    chosen = tuple(dict.fromkeys(alpha or (ALPHAS if sweep else ())))
    channel.as_alpha(chosen or 0.0, len(chosen) or 1)
    arms: tuple[float | None, ...] = (None, *chosen) if sweep or not chosen else chosen
    numbers(str(given[0]) if given[0] else None, "--folds")
    names = ("--folds", "--limit", "--artefacts", "--weights")
    options = [word for option, value in zip(names, given, strict=True) if value for word in (option, str(value))]
    return Run(name, dataset, arms, sweep, volume, image, tuple(options), cpu, memory, gpus)


def _cluster(namespace: str | None, context: str | None) -> "Cluster":
    with _extra():
        from sfumato.cluster.api import Cluster
    return Cluster(namespace, context)


def _yaml(objects: "list[Manifest]") -> None:
    with _extra():
        import yaml
    typer.echo(yaml.safe_dump_all(objects, sort_keys=False, width=120), nl=False)


@contextmanager
def _extra() -> Iterator[None]:
    from sfumato.core.errors import RequestError

    try:
        yield
    except ModuleNotFoundError as error:
        got = f"{error.name} is not installed"
        raise RequestError(got, wanted="the extra k8s", do="pip install 'sfumato[k8s]'") from None


def _told(quiet: bool) -> Any:
    return (lambda _text: None) if quiet else note


def _print(document: dict[str, Any], json_file: Path | None) -> None:
    import json

    from sfumato.core.files import write_bytes

    if json_file is not None:
        write_bytes(json_file, (json.dumps(document, indent=1) + "\n").encode())
    show(document["facts"], document["rows"])
