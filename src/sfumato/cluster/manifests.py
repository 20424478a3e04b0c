"""A run's objects as Kubernetes takes them: pure functions from settings to dictionaries.

Pods keep to the restricted Pod Security Standard, and to more: no service account, root file system read only, the raw
data mounted read only. What a run finds lies in `.sfumato` of the same volume, the one place it may write.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sfumato.core.errors import ClusterError

Manifest = dict[str, Any]
USER = 10001  # of deploy/Containerfile
DATA, WORK, KEPT = "/data", "/work", ".sfumato"
RUN, ARM, SETTINGS = "sfumato/run", "sfumato/arm", "sfumato/settings"  # two labels, an annotation
TABLE = "table"
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?")
QUANTITY = re.compile(r"\d+(\.\d+)?(m|[KMGT]i?)?")


@dataclass(frozen=True)
class Run:
    """One run of the table: a Job for every arm (None: raw), and one that scores what they found.

    `dataset` is a path in the pods, where the volume `claim` is mounted at /data; `options` go to `sfumato measure`.
    """

    name: str
    dataset: str
    arms: tuple[float | None, ...]
    sweep: bool
    claim: str
    image: str
    options: tuple[str, ...] = ()
    cpu: float = 1.0
    memory: str = "2Gi"
    gpus: int = 0

    def __post_init__(self) -> None:
        named(self.name)
        quantity(self.memory)
        if not (self.dataset + "/").startswith(DATA + "/") or ".." in self.dataset.split("/"):
            raise ClusterError(f"dataset {self.dataset}", wanted="a path on the volume", do=f"--dataset {DATA}/FDDB")

    @property
    def settings(self) -> str:
        """All of it, as its Jobs carry it."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def of(cls, job: Manifest) -> "Run":
        """The run a Job belongs to."""
        saved = json.loads(job["metadata"]["annotations"][SETTINGS])
        return cls(**saved | {"arms": tuple(saved["arms"]), "options": tuple(saved["options"])})

    @property
    def words(self) -> list[str]:
        return ["sfumato", "measure", "--dataset", self.dataset, *self.options, "--work", WORK]


def named(name: str) -> str:
    """The name, where it is one. Raises ClusterError."""
    if not NAME.fullmatch(name):
        raise ClusterError(f"name {name}", wanted="a to z, 0 to 9 and dashes between, 40 at most", do="another name")
    return name


def quantity(text: str) -> str:
    """A size as Kubernetes writes it. Raises ClusterError."""
    if not QUANTITY.fullmatch(text):
        raise ClusterError(f"size {text}", wanted="a number and a unit, such as 512Mi or 50Gi", do="give it so")
    return text


def volume(name: str, size: str, storage_class: str | None, access: str) -> Manifest:
    """A PersistentVolumeClaim; without a storage class the cluster's default."""
    spec: Manifest = {"accessModes": [access], "resources": {"requests": {"storage": quantity(size)}}}
    if storage_class is not None:
        spec["storageClassName"] = storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": named(name), "labels": {"app.kubernetes.io/name": "sfumato"}},
        "spec": spec,
    }


def arm_name(alpha: float | None) -> str:
    """How an arm's Job ends: raw, or alpha-0-8."""
    return "raw" if alpha is None else f"alpha-{alpha!r}".replace(".", "-").replace("+", "")


def jobs(run: Run) -> list[Manifest]:
    """A Job for every arm, in their order."""
    return [_job(run, arm_name(alpha), [*run.words, *_alphas((alpha,)), *_threads(run)]) for alpha in run.arms]


def table(run: Run) -> Manifest:
    """The Job that scores what the arms' Jobs found, and prints the JSON of the table."""
    sweep = ["--sweep"] if run.sweep else []
    return _job(run, TABLE, [*run.words, *sweep, *_alphas(run.arms), "--json", "-", "--quiet"])


def uploader(claim: str, image: str, seconds: int) -> Manifest:
    """A pod that does nothing for so long; `sfumato.cluster.receive` is called in it."""
    idle = ["python3", "-c", f"import time; time.sleep({seconds})"]
    spec = _pod(claim, image, idle, {"cpu": "100m", "memory": "128Mi"}, {"cpu": "1", "memory": "512Mi"})
    spec["containers"][0]["volumeMounts"] = [_mount("data", DATA), _mount("tmp", "/tmp")]
    spec["activeDeadlineSeconds"] = seconds
    spec["terminationGracePeriodSeconds"] = 0
    meta = {"generateName": "sfumato-data-", "labels": {"app.kubernetes.io/name": "sfumato"}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}


def _alphas(arms: Sequence[float | None]) -> list[str]:
    return [word for alpha in arms if alpha is not None for word in ("--alpha", repr(alpha))]


def _threads(run: Run) -> list[str]:
    return ["--threads", str(math.ceil(run.cpu))]


def _job(run: Run, arm: str, command: list[str]) -> Manifest:
    labels = {"app.kubernetes.io/name": "sfumato", RUN: run.name, ARM: arm}
    amounts: Manifest = {"cpu": f"{run.cpu:g}", "memory": run.memory}
    limits = amounts | ({"nvidia.com/gpu": str(run.gpus)} if run.gpus else {})
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"{run.name}-{arm}", "labels": labels, "annotations": {SETTINGS: run.settings}},
        "spec": {
            "backoffLimit": 5,
            "template": {
                "metadata": {"labels": dict(labels)},
                "spec": _pod(run.claim, run.image, command, amounts, limits),
            },
        },
    }


def _pod(claim: str, image: str, command: list[str], requests: Manifest, limits: Manifest) -> Manifest:
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
            {"name": "tmp", "emptyDir": {}},
        ],
        "containers": [
            {
                "name": "inference",
                "image": image,
                "imagePullPolicy": "IfNotPresent",
                "command": command,
                "resources": {"requests": dict(requests), "limits": dict(limits)},
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [
                    _mount("data", DATA) | {"readOnly": True},
                    _mount("data", WORK) | {"subPath": KEPT},
                    _mount("dshm", "/dev/shm"),
                    _mount("tmp", "/tmp"),
                ],
            }
        ],
    }


def _mount(name: str, path: str) -> Manifest:
    return {"name": name, "mountPath": path}
