"""A run of the table on a cluster: its Jobs made, followed until all are done, and scored by one more.

A run that fails before it could work (no image, no data) leaves nothing behind; one that was stopped is taken up again
by the same request, because Jobs that are there and of the same settings are left alone.
"""

import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from sfumato.cluster import volumes
from sfumato.cluster.manifests import ARM, RUN, TABLE, Manifest, Run, arm_name, jobs, table
from sfumato.core.errors import ClusterError, RequestError, SfumatoError

if TYPE_CHECKING:
    from sfumato.cluster.api import Cluster

Told = Callable[[str], None]
WRONG = 2  # the exit code of a request that no repetition makes right
EVERY = 1.0  # s


def start(cluster: "Cluster", run: Run) -> list[str]:
    """Makes the run's Jobs that are not there yet; their names. Raises ClusterError, and then has made none."""
    volumes.there(cluster, run.claim)
    has = {job["metadata"]["name"]: job for job in _jobs(cluster, run.name)}
    if any(Run.of(job) != run for job in has.values()):
        got = f"run {run.name} in {cluster.namespace}: there already, with other settings"
        raise ClusterError(got, wanted="a name of its own", do=f"--name another, or sfumato k8s job delete {run.name}")
    for name in [name for name, job in has.items() if ended(job) == "Failed"]:
        cluster.delete("Job", name)
        _gone(cluster, name)
        del has[name]
    return _make(cluster, [job for job in jobs(run) if job["metadata"]["name"] not in has])


def finish(cluster: "Cluster", name: str, told: Told, made: list[str] | None = None) -> dict[str, Any]:
    """Follows the run's Jobs to their end, has them scored; the JSON of `sfumato measure`, facts and rows.

    `made`: Jobs to take away again where the run cannot work. Raises ClusterError, RequestError where the pods found
    the request wrong, SfumatoError where a Job failed.
    """
    run = of(cluster, name)
    made = made or []
    wait(cluster, name, told, made)
    if not any(job["metadata"]["labels"][ARM] == TABLE for job in _jobs(cluster, name)):
        made = made + _make(cluster, [table(run)])
        wait(cluster, name, told, made)
    return _document("\n".join(logs(cluster, name, TABLE)))


def wait(cluster: "Cluster", name: str, told: Told, made: list[str] | None = None) -> None:
    """Until every Job of the run is done; a line to `told` whenever one goes on. Raises as `finish`."""
    said: dict[str, str] = {}
    of(cluster, name)
    while True:
        pods = cluster.objects("Pod", {RUN: name})
        states = {}
        for job in sorted(_jobs(cluster, name), key=lambda job: str(job["metadata"]["creationTimestamp"])):
            arm = job["metadata"]["labels"][ARM]
            mine = [pod for pod in pods if pod["metadata"]["labels"].get(ARM) == arm]
            _check(cluster, job, mine, made or [])
            states[arm] = ended(job) or _state(mine)
        done = list(states.values()).count("Complete")
        for arm in states:
            if said.get(arm) != states[arm] and (said or states[arm] != "Complete"):
                told(f"{arm}: {states[arm]} ({done} of {len(states)} complete)")
        said |= states
        if done == len(states):
            return
        time.sleep(EVERY)


def of(cluster: "Cluster", name: str) -> Run:
    """The settings of a run that is there. Raises ClusterError."""
    found = _jobs(cluster, name)
    if not found:
        got = f"run {name} in {cluster.namespace}: not found"
        raise ClusterError(
            got, wanted="a run that was started there", do="sfumato k8s job run, or -n another namespace"
        )
    return Run.of(found[0])


def logs(cluster: "Cluster", name: str, arm: str, *, follow: bool = False) -> Iterator[str]:
    """What the newest pod of an arm (raw, alpha-0-8, table) printed. Raises ClusterError."""
    pods = cluster.objects("Pod", {RUN: name, ARM: arm})
    if not pods:
        arms = ", ".join(arm_name(alpha) for alpha in of(cluster, name).arms)
        got = f"run {name} has no pod of {arm}"
        raise ClusterError(got, wanted=f"one of {arms}, {TABLE}, once it runs", do=f"sfumato k8s job wait {name}")
    newest = max(pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))
    return cluster.logs(newest["metadata"]["name"], follow=follow)


def delete(cluster: "Cluster", name: str) -> int:
    """Takes a run's Jobs and pods away; how many Jobs. What they found stays on the volume."""
    of(cluster, name)
    found = [job["metadata"]["name"] for job in _jobs(cluster, name)]
    for job in found:
        cluster.delete("Job", job, missing_ok=True)
    for job in found:
        _gone(cluster, job)
    return len(found)


def ended(job: Manifest) -> str:
    """Complete or Failed; nothing while it goes on."""
    conditions = job.get("status", {}).get("conditions", [])
    return next((c["type"] for c in conditions if c["type"] in ("Complete", "Failed") and c["status"] == "True"), "")


def _jobs(cluster: "Cluster", name: str) -> list[Manifest]:
    return cluster.objects("Job", {RUN: name})


def _make(cluster: "Cluster", manifests: list[Manifest]) -> list[str]:
    made: list[str] = []
    try:
        for manifest in manifests:
            made.append(cluster.create(manifest))
    except BaseException:
        _undo(cluster, made)
        raise
    return made


def _undo(cluster: "Cluster", made: list[str]) -> None:
    for name in made:
        cluster.delete("Job", name, missing_ok=True)


def _gone(cluster: "Cluster", name: str) -> None:
    while cluster.find("Job", name) is not None:
        time.sleep(EVERY / 4)


def _state(pods: list[Manifest]) -> str:
    if not pods:
        return "no pod yet"
    newest = max(pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))
    return " ".join(filter(None, volumes.waiting(newest))) or str(newest["status"].get("phase", "Pending"))


def _check(cluster: "Cluster", job: Manifest, pods: list[Manifest], made: list[str]) -> None:
    """Raises what makes waiting pointless."""
    for pod in pods:
        if error := volumes.spoilt(pod):
            _undo(cluster, made)
            raise error
    wrong = next((pod for pod in pods if _code(pod) == WRONG), None)
    if wrong is None and ended(job) != "Failed":
        return
    last = wrong or (pods[-1] if pods else None)
    said = list(cluster.logs(last["metadata"]["name"], lines=20)) if last else []
    name = job["metadata"]["name"]
    if wrong is not None:
        _undo(cluster, made)
        got = "\n".join(said).rpartition("error: ")[2] or "the request was wrong"
        raise RequestError(f"{name}: {got}")
    raise SfumatoError("\n  ".join([f"{name} failed; the end of its log:", *said]))


def _code(pod: Manifest) -> int | None:
    for status in pod["status"].get("containerStatuses", []):
        if over := status.get("state", {}).get("terminated"):
            return int(over["exitCode"])
    return None


def _document(log: str) -> dict[str, Any]:
    """The JSON in the log, where notes may stand around it."""
    start, end = log.find("{\n"), log.rfind("\n}")
    try:
        document = json.loads(log[start : end + 2])
    except ValueError:
        raise SfumatoError("the table's Job printed no table:\n" + log[-1000:]) from None
    return dict(document)
