"""What is rendered: as the golden files have it, valid for old and new clusters, restricted, and read back whole."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from sfumato.cluster import manifests
from sfumato.cluster.manifests import Run
from sfumato.core.errors import ClusterError
from sfumato.measurement import ALPHAS

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install -e .[dev]")

GOLDEN = Path(__file__).parent / "golden"
BY_HAND = Path(__file__).parents[2] / "deploy" / "kubernetes"
RUN = Run("accuracy", "/data/FDDB", (None, 0.8), True, "inference-data", "sfumato:0.1.0", ("--limit", "2"))
FULL = Run("full", "/data", (None, *ALPHAS), True, "photos", "sfumato:0.1.0", gpus=2, cpu=1.5)
Objects = list[dict[str, Any]]


def everything() -> Objects:
    files = [yaml.safe_load(path.read_text()) for path in sorted(BY_HAND.glob("*.yaml"))]
    rendered = [*manifests.jobs(RUN), *manifests.jobs(FULL), manifests.table(FULL)]
    upload = manifests.uploader("photos", "sfumato:0.1.0", 60)
    return [*files, *rendered, upload, manifests.volume("photos", "50Gi", "fast", "ReadWriteOnce")]


@pytest.mark.parametrize(
    ("name", "objects"),
    [
        ("job", [*manifests.jobs(RUN), manifests.table(RUN)]),
        ("volume", [manifests.volume("inference-data", "50Gi", None, "ReadWriteMany")]),
    ],
)
def test_as_the_golden_files_have_it(name: str, objects: Objects) -> None:
    assert list(yaml.safe_load_all((GOLDEN / f"{name}.yaml").read_text())) == objects


@pytest.mark.parametrize("version", ["1.25", "1.31", "1.37"])
def test_valid_and_nothing_misspelt(version: str) -> None:
    for one in everything():
        kubernetes_validate.validate(one, version, strict=True)


def test_a_misspelt_field_would_be_found() -> None:
    job = manifests.table(RUN)
    job["spec"]["backofLimit"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.37", strict=True)


def test_every_pod_is_restricted_and_the_data_of_jobs_read_only() -> None:
    jobs = [one for one in everything() if one["kind"] == "Job"]
    assert len(jobs) == 2 + 2 + 9 + 1
    for job in jobs:
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]) & set(container["resources"]["limits"])
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert mounts["/data"]["readOnly"] is True
        assert "/dev/shm" in mounts


def test_one_job_an_arm_and_their_commands() -> None:
    jobs = manifests.jobs(FULL)
    ends = ["raw", *(f"alpha-0-{digits}" for digits in ("05", "1", "2", "4", "6", "8", "9", "95"))]
    assert [job["metadata"]["name"] for job in jobs] == [f"full-{end}" for end in ends]
    commands = [job["spec"]["template"]["spec"]["containers"][0]["command"] for job in jobs]
    assert "--alpha" not in commands[0]
    assert commands[6][-6:] == ["--work", "/work", "--alpha", "0.8", "--threads", "2"]
    last = manifests.table(FULL)["spec"]["template"]["spec"]["containers"][0]
    assert last["command"].count("--alpha") == 8 and "--sweep" in last["command"]
    assert last["resources"]["limits"]["nvidia.com/gpu"] == "2"


@pytest.mark.parametrize("run", [RUN, FULL])
def test_a_run_is_read_back_from_its_jobs(run: Run) -> None:
    assert all(Run.of(job) == run for job in (*manifests.jobs(run), manifests.table(run)))


@pytest.mark.parametrize(
    "wrong",
    [{"name": "Upper"}, {"name": "-a"}, {"name": "a" * 41}, {"dataset": "/etc"}, {"dataset": "/data/../etc"},
     {"dataset": "/database"}, {"memory": "much"}],
)  # fmt: skip
def test_settings_that_cannot_be(wrong: dict[str, str]) -> None:
    right: dict[str, Any] = {"name": "a", "dataset": "/data", "memory": "2Gi"}
    with pytest.raises(ClusterError, match="wanted"):
        Run(**right | wrong, arms=(None,), sweep=False, claim="c", image="i")
