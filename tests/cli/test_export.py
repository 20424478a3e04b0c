"""`sfumato export` and `sfumato serve`: what they write, what they say, how they refuse."""

import _thread
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sfumato.outside.serving import Server

if TYPE_CHECKING:
    from tests.conftest import Ran


def test_a_repository_of_the_shipped_artefacts(cli: "Callable[..., Ran]", tmp_path: Path) -> None:
    models = tmp_path / "models"
    ran = cli("export", "triton", "shipped", models, "--size", 256)
    assert ran.code == 0 and f"sfumato serve {models}" in ran.err
    assert ran.out.splitlines() == [f"{models}/face_detection_{kind}/1" for kind in ("base", "noisy", "release")]
    again = cli("export", "triton", "shipped", models, "--size", 256)
    assert again.code == 0 and not again.out and "nothing was written" in again.err
    shown = cli("serve", models, "--print-command")
    assert shown.code == 2 and not shown.out and "--backend onnxruntime" in shown.err
    other = cli("export", "triton", "shipped", models, "--backend", "onnxruntime")
    assert other.code == 2 and "another backend" in other.err


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_command_for_the_official_image(cli: "Callable[..., Ran]", tmp_path: Path) -> None:
    models = tmp_path / "models"
    assert cli("export", "triton", "shipped", models, "--size", 256, "--backend", "pytorch").code == 0
    shown = cli("serve", models, "--print-command", "--poll")
    assert shown.code == 0 and shown.out.startswith("docker run") and f"{models}:/models:ro" in shown.out
    assert "--model-control-mode=poll" in shown.out
    assert cli("serve", models, "--print-command", "--http-port", 0).code == 2


def test_a_device(cli: "Callable[..., Ran]", tmp_path: Path) -> None:
    ran = cli("export", "onnx", tmp_path / "device.onnx", "--alpha", 0.9, "--size", 256)
    assert ran.code == 0 and "alpha 0.9" in ran.out and (tmp_path / "device.onnx").stat().st_size < 1_000_000


def test_wrong_requests(cli: "Callable[..., Ran]", tmp_path: Path) -> None:
    for words in (
        ("export", "triton", tmp_path / "absent", tmp_path / "models"),
        ("export", "onnx", tmp_path / "device.onnx", "--alpha", 1.5),
        ("serve", tmp_path),
    ):
        ran = cli(*words)
        assert ran.code == 2 and not ran.out and "wanted: " in ran.err
    assert not (tmp_path / "device.onnx").exists() and not (tmp_path / "models").exists()


def test_help_shows_examples(cli: "Callable[..., Ran]") -> None:
    assert "sfumato export triton shipped models" in cli("export", "triton", "--help").out
    assert "sfumato export onnx device.onnx" in cli("export", "onnx", "--help").out
    assert "sfumato serve models" in cli("serve", "--help").out


FAKE = """#!{python}
import http.server, signal, sys
given = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
open({place!r}, "w").write(str(__import__("os").getpid()))
http.server.HTTPServer(("127.0.0.1", int(given["http-port"])), Ready).serve_forever()
"""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_no_server_is_left_when_serve_ends(tmp_path: Path, number: int) -> None:
    program, place, model = tmp_path / "tritonserver", tmp_path / "pid", tmp_path / "models/m/config.pbtxt"
    program.write_text(FAKE.format(python=sys.executable, place=str(place)))
    program.chmod(0o755)
    model.parent.mkdir(parents=True)
    model.write_text("")
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--tritonserver", str(program)]
    code = "from sfumato.cli.app import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "serve", str(model.parents[1]), *ports], stdout=subprocess.PIPE, text=True
    ) as serve:
        assert serve.stdout is not None
        assert "models:  m" in serve.stdout.readline() and "http://" in serve.stdout.readline()
        serve.send_signal(number)
        assert serve.wait(30) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(place.read_text()), 0)


def test_a_second_interrupt_ends_a_server_that_hangs() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", deaf], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        timer = threading.Timer(0.5, _thread.interrupt_main)
        timer.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                Server(process, "127.0.0.1", 0, 0, 0, ()).stop()
            assert process.wait(5) == -signal.SIGKILL
        finally:
            signal.signal(signal.SIGINT, before)
            process.kill()
