"""`sfumato k8s` without a cluster: what it renders, and how it refuses. With one: tests/cluster/test_cluster.py."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("kr8s", reason="pip install -e .[dev]")

if TYPE_CHECKING:
    from tests.conftest import Ran

Cli = Callable[..., "Ran"]
GOLDEN = Path(__file__).parents[1] / "cluster" / "golden"
DEAD = """
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "http://127.0.0.1:1"}}]
users: [{name: u, user: {token: none}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
"""


def test_render_prints_the_golden_files(cli: Cli) -> None:
    ran = cli("k8s", "render", "job", "--dataset", "/data/FDDB", "--sweep", "--alpha", "0.8", "--limit", "2")
    assert (ran.code, ran.out) == (0, (GOLDEN / "job.yaml").read_text())
    ran = cli("k8s", "render", "volume", "inference-data", "--size", "50Gi")
    assert (ran.code, ran.out) == (0, (GOLDEN / "volume.yaml").read_text())


@pytest.mark.parametrize(
    "words",
    [
        ("--dataset", "/data/FDDB", "--alpha", "1"),
        ("--dataset", "/data/FDDB", "--folds", "a"),
        ("--dataset", "/data/FDDB", "--name", "Not a name"),
        ("--dataset", "FDDB"),
        ("--dataset", "/data/FDDB", "--memory", "lots"),
    ],
)
def test_wrong_requests_are_refused_before_a_cluster_is_asked(cli: Cli, words: tuple[str, ...]) -> None:
    for verb in (("job", "run"), ("render", "job")):
        ran = cli("k8s", *verb, *words)
        assert (ran.code, ran.out) == (2, "")
        assert "wanted:" in ran.err and "Traceback" not in ran.err


@pytest.mark.parametrize(
    "words",
    [
        ("job", "run", "--dataset", "/data/FDDB"),
        ("job", "table"),
        ("volume", "create", "a", "--size", "1Gi"),
        ("volume", "list"),
        ("data", "put", ".", "a:b"),
    ],
)
def test_no_cluster(cli: Cli, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "dead").write_text(DEAD)
    for path, says in ((tmp_path / "dead", "no answer from the cluster"), (tmp_path / "none", "no cluster")):
        monkeypatch.setenv("KUBECONFIG", str(path))
        ran = cli("k8s", *words)
        assert (ran.code, ran.out) == (2, "")
        assert says in ran.err and "do: " in ran.err
