"""The batch scenario on a real cluster, in a fresh namespace: the report's Jobs, the table, and what can be amiss.

`make test-cluster` runs this against KUBECONFIG, with an image of deploy/Containerfile named by $SFUMATO_IMAGE.
"""

import asyncio
import json
import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from sfumato.cluster.api import Cluster
    from tests.conftest import Ran

pytest.importorskip("kr8s", reason="pip install -e .[dev]")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

Cli = Callable[..., "Ran"]
IMAGE = os.environ.get("SFUMATO_IMAGE") or "sfumato:0.1.0"
JOBS = Path(__file__).parents[2] / "deploy" / "kubernetes"
SET = "netapp-face-detection/FDDB"
VOLUME = "inference-data"


@pytest.fixture(scope="module")
def cluster() -> Iterator["Cluster"]:
    """A namespace of this run's own, gone at the end."""
    import kr8s

    from sfumato.cluster.api import Cluster
    from sfumato.core.errors import ClusterError

    name = f"sfumato-test-{secrets.token_hex(4)}"
    try:
        cluster = Cluster(name)
    except ClusterError as error:
        pytest.skip(error.got)
    meta = {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}
    namespace = kr8s.objects.Namespace({"metadata": meta}, api=cluster._api)
    namespace.create()
    yield cluster
    namespace.delete()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sfumato.datasets import sampler

    return sampler.compose(tmp_path_factory.mktemp("put") / "set", images=20)


@pytest.fixture
def k8s(cli: Cli, cluster: "Cluster") -> Cli:
    return lambda *words: cli("k8s", *words, "-n", cluster.namespace)


@pytest.fixture
def filled(k8s: Cli, cluster: "Cluster", folder: Path) -> None:
    if cluster.find("PersistentVolumeClaim", VOLUME) is None:
        ran = k8s("volume", "create", VOLUME, "--size", "1Gi")
        assert ran.code == 0, ran.err
    ran = k8s("data", "put", folder, f"{VOLUME}:{SET}", "--image", IMAGE, "--quiet")
    assert ran.code == 0, ran.err


def test_data_goes_once_and_what_differs_goes_again(filled: None, k8s: Cli, folder: Path) -> None:
    put = ("data", "put", folder, f"{VOLUME}:{SET}", "--image", IMAGE, "--quiet")
    assert k8s(*put).out.startswith("0 files")
    file = next(folder.rglob("*.jpg"))
    whole = file.read_bytes()
    file.write_bytes(whole + b"x")
    assert k8s(*put).out.startswith("1 file ")
    file.write_bytes(whole)
    assert k8s(*put).out.startswith("1 file ")
    assert f"{VOLUME} " in k8s("volume", "list").out


@pytest.mark.parametrize(("name", "words"), [("raw", []), ("alpha-0.8", ["--alpha", "0.8", "--noisy"])])
def test_the_report_s_jobs_print_the_local_log(
    filled: None, cli: Cli, cluster: "Cluster", folder: Path, name: str, words: list[str]
) -> None:
    job = yaml.safe_load((JOBS / f"inference-job-{name}.yaml").read_text())
    job["spec"]["template"]["spec"]["containers"][0]["image"] = IMAGE
    made = cluster.create(job)
    pods: list[dict[str, Any]] = []
    while not pods or pods[0]["status"]["phase"] not in ("Succeeded", "Failed"):
        time.sleep(0.5)
        pods = cluster.objects("Pod", {"job-name": made})
    there = "\n".join(cluster.logs(pods[0]["metadata"]["name"])).splitlines()
    here = cli("measure", "--dataset", folder, *words, "--quiet").out.splitlines()
    assert pods[0]["status"]["phase"] == "Succeeded", there
    start = there.index("==================== Results ====================")
    assert there[start : start + 13] == here[:13]


def kill(cluster: "Cluster", labels: dict[str, str]) -> None:
    """Takes the first pod away as soon as it runs."""
    for _ in range(600):
        for pod in cluster.objects("Pod", labels):
            if pod["status"]["phase"] == "Running":
                return cluster.delete("Pod", pod["metadata"]["name"])
        time.sleep(0.1)
    raise AssertionError("no pod ran")


def test_the_table_is_the_local_one_though_a_pod_was_killed(
    filled: None, cli: Cli, k8s: Cli, cluster: "Cluster", folder: Path, tmp_path: Path
) -> None:
    from sfumato.cluster.api import Cluster

    with warnings.catch_warnings():
        killer = Thread(target=lambda: kill(Cluster(cluster.namespace), {"sfumato/arm": "alpha-0-4"}))
        killer.start()
        run = ("job", "run", "--dataset", f"/data/{SET}", "--sweep", "--alpha", "0.4", "--alpha", "0.8")
        ran = k8s(*run, "--cpu", "0.5", "--image", IMAGE, "--json", tmp_path / "there.json")
        killer.join()
    assert ran.code == 0, ran.err
    words = ("--sweep", "--alpha", "0.4", "--alpha", "0.8", "--quiet")
    local = cli("measure", "--dataset", folder, *words, "--json", tmp_path / "here.json")
    here, there = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("here", "there"))
    assert there["rows"] == here["rows"]
    assert there["facts"] | {"seconds": 0} == here["facts"] | {"seconds": 0}
    assert ran.out.splitlines()[:-1] == local.out.splitlines()[:-1]  # the last has the seconds
    assert k8s("job", "table", "--quiet").out == ran.out
    assert "mAP: " in k8s("job", "logs", "accuracy", "alpha-0-8").out
    assert k8s("job", "wait").code == 0
    other = k8s("job", "run", "--dataset", f"/data/{SET}", "--image", IMAGE)
    assert other.code == 2 and "other settings" in other.err
    assert k8s("job", "delete").out == "4 jobs deleted\n"
    assert cluster.objects("Job", {"sfumato/run": "accuracy"}) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--dataset", "/data/nowhere"), "no such folder"),
        (("--dataset", f"/data/{SET}", "--image", "sfumato:there-is-none"), "image sfumato:there-is-none"),
        (("--dataset", f"/data/{SET}", "--volume", "nothing"), "volume nothing"),
    ],
)
def test_a_run_that_cannot_be_leaves_no_job(
    filled: None, k8s: Cli, cluster: "Cluster", words: tuple[str, ...], says: str
) -> None:
    given = words if "--image" in words else (*words, "--image", IMAGE)
    ran = k8s("job", "run", *given, "--name", "amiss", "--sweep", "--alpha", "0.8", "--cpu", "0.5", "--quiet")
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err and "wanted:" in ran.err
    assert cluster.objects("Job", {"sfumato/run": "amiss"}) == []


def test_a_storage_class_that_is_not_there_leaves_no_volume(k8s: Cli, cluster: "Cluster") -> None:
    ran = k8s("volume", "create", "amiss", "--size", "1Gi", "--storage-class", "there-is-none")
    assert ran.code == 2
    assert "there-is-none: not found" in ran.err and "one that the cluster has" in ran.err
    assert cluster.find("PersistentVolumeClaim", "amiss") is None


async def token(namespace: str) -> str:
    """Of the namespace's own service account, which may nothing."""
    import kr8s.asyncio

    api = await kr8s.asyncio.api(namespace=namespace)
    request = json.dumps({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}})
    url = "serviceaccounts/default/token"
    async with api.call_api("POST", url=url, namespace=namespace, content=request) as answer:
        return str(answer.json()["status"]["token"])


def test_without_permission(k8s: Cli, cluster: "Cluster", monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # kr8s promises less than 1.20
        nobody = asyncio.run(token(cluster.namespace))
    config = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
    config["users"][0]["user"] = {"token": nobody}
    (tmp_path / "nobody").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nobody"))
    for words in (("job", "run", "--dataset", "/data"), ("volume", "list"), ("volume", "create", "a", "--size", "1Gi")):
        ran = k8s(*words)
        assert ran.code == 2
        assert "forbidden" in ran.err and "wanted: permission" in ran.err
