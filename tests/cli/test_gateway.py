"""`sfumato gateway` as a process: what it refuses to begin with, a request through it, and its end."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sfumato.cli import common
from tests.gateway.test_faults import PATH, request
from tests.gateway.upstream import SIDE, ask, sent, tail

if TYPE_CHECKING:
    from tests.conftest import Ran


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "tenant.key"
    path.touch(0o600)
    path.write_text("ab" * 32 + "\n")
    return path


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--host", "0.0.0.0"), "in clear"),
        (("--upstream", "http://example.org"), "obfuscation is not encryption"),
        (("--tls-cert", "c.pem"), "half of what TLS needs"),
        (("--client-ca", "c.pem"), "half of what TLS needs"),
        (("--http-port", "-1", "--grpc-port", "-1"), "no protocol"),
        (("--alpha", "1.5"), "alpha"),
        (("--waiting", "-1"), "limit"),
        (("--api-keys", "absent"), "API keys"),
        (("--key", "absent"), "tenant key"),
    ],
)
def test_what_is_refused_before_it_listens(
    cli: "Callable[..., Ran]", key: Path, tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    usual = {"--upstream": "grpc://127.0.0.1:1", "--ledger": str(tmp_path / "l.db"), "--key": str(key)}
    given = {**usual, "--http-port": "0", "--grpc-port": "0", "--size": str(SIDE)}
    given |= dict(zip(words[::2], words[1::2], strict=True))
    ran = cli("gateway", *(word for pair in given.items() for word in pair))
    assert ran.code == 2 and says in ran.err and "Traceback" not in ran.err


def test_a_gateway_from_its_start_to_its_end(key: Path, tmp_path: Path) -> None:
    words = ["--ledger", str(tmp_path / "ledger.db"), "--key", str(key), "--http-port", "0", "--grpc-port", "0"]
    run = "from sfumato.cli.app import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(Path(common.__file__).resolve().parents[2])}
    with tail() as outside:
        words += ["--upstream", outside.url, "--size", str(SIDE), "--max-releases", "1"]
        command = [sys.executable, "-c", run, "gateway", *words]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
            try:
                assert process.stderr is not None
                found = re.search(r"http://(\S+) and grpc://\S+, releases to", process.stderr.readline())
                assert found is not None
                body, headers = request()
                answers = [ask(found[1], "POST", PATH, body, **headers)[0] for _ in range(2)]
                process.send_signal(signal.SIGTERM)
                assert process.wait(30) == 0
                lines = [json.loads(line) for line in process.stderr]
            finally:
                process.kill()
        assert answers == [200, 403] == [line["status"] for line in lines]
        assert len(sent(outside)) == 1


def test_help_shows_examples(cli: "Callable[..., Ran]") -> None:
    ran = cli("gateway", "--help")
    assert ran.code == 0 and "sfumato gateway --upstream" in ran.out
