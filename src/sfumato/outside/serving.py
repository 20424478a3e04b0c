"""Starts the real tritonserver on a model repository, with what its python backend needs to run sfumato's models.

The binary is that of the nvidia-pytriton wheel, or any other. Of the wheel, only files are used: its Python package
asks for NumPy 1, so it is installed without what it depends on.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfumato.core.errors import RequestError, SfumatoError

WHEEL = "nvidia-pytriton==0.7.0"
IMAGE = "nvcr.io/nvidia/tritonserver:24.10-py3"
PORTS = (8000, 8001, 8002)  # HTTP, gRPC, metrics: Triton's own
_LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "fatal"}
_LINE = re.compile(r"^([IWEF])\d{4} (\d\d:\d\d:\d\d)\S* \S+ \S+\] (.*)$")
_PASSED = ("CUDA_", "HOME", "LANG", "LC_", "NVIDIA_", "OMP_", "TMPDIR", "TORCH", "TZ")  # of the environment
_LAST = 40  # lines of the log that an error shows


@dataclass(frozen=True)
class Server:
    """A tritonserver that is ready."""

    process: subprocess.Popen[str]
    host: str
    http: int
    grpc: int
    metrics: int
    models: tuple[str, ...]

    def stop(self, *, within: float = 30.0) -> int:
        """Lets requests under way end, then ends; its exit code."""
        try:
            if self.process.poll() is None:
                self.process.terminate()  # SIGINT is ignored in the background of a shell
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(within)
        finally:  # whoever interrupts the wait does not mean to leave it running
            with contextlib.suppress(ProcessLookupError):  # a server that was killed leaves its backends behind
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


def binary(given: str | None = None) -> Path:
    """tritonserver: the one named, one on PATH, or the wheel's. Raises RequestError."""
    tried = [given] if given else [shutil.which("tritonserver"), _in_wheel()]
    for path in tried:
        if path and Path(path).is_file() and os.access(path, os.X_OK):
            return Path(path).resolve()
    raise RequestError(
        f"{given}: no program" if given else "no tritonserver on this machine",
        wanted="Linux on x86_64 with glibc 2.35 or later, and the server's wheel, without what it depends on",
        do=f"pip install --no-deps {WHEEL}, or sfumato serve REPO --docker",
    )


def _in_wheel() -> str | None:
    found = importlib.util.find_spec("pytriton")
    return (
        None if found is None or not found.origin else str(Path(found.origin).parent / "tritonserver/bin/tritonserver")
    )


def free_port(host: str, wanted: int) -> int:
    """`wanted` where it is free (0: any), another where not."""
    for port in (wanted, 0):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial, contextlib.suppress(OSError):
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
            return int(trial.getsockname()[1])
    raise RequestError(
        f"no port of {host} can be listened on", wanted="an address of this machine", do="--host 127.0.0.1"
    )


def models_of(repository: Path) -> list[str]:
    """Names of the models there. Raises RequestError for none."""
    names = sorted(path.parent.name for path in repository.glob("[!.]*/config.pbtxt"))
    if not names:
        raise RequestError(
            f"{repository}: no model", wanted="a model repository", do="sfumato export triton shipped REPO"
        )
    return names


def arguments(
    repository: Path | str, host: str, ports: Sequence[int], *, poll: bool, extra: Sequence[str]
) -> list[str]:
    """Of tritonserver; flags need their equals sign."""
    http, grpc, metrics = ports
    chosen = [
        f"--model-repository={repository}", f"--http-address={host}", f"--grpc-address={host}",
        f"--metrics-address={host}", f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}",
        "--exit-timeout-secs=20", "--disable-auto-complete-config",
    ]  # fmt: skip
    if poll:
        chosen += ["--model-control-mode=poll", "--repository-poll-secs=2"]
    return [*chosen, *extra]


def docker(
    repository: Path, host: str, ports: Sequence[int], *, poll: bool = False, extra: Sequence[str] = ()
) -> list[str]:
    """The same with the official image. Raises RequestError for a repository of the python backend.

    That needs torch and sfumato, which the image has not.
    """
    if any('backend: "python"' in path.read_text() for path in repository.glob("[!.]*/config.pbtxt")):
        raise RequestError(
            f"{repository} is for the python backend, and the official image has neither torch nor sfumato",
            wanted="a repository of the onnxruntime or pytorch backend",
            do="sfumato export triton shipped OTHER --backend onnxruntime",
        )
    if 0 in ports:
        raise RequestError(
            "port 0 with the official image", wanted="ports that can be published", do="--http-port 8000"
        )
    published = [part for port in ports for part in ("-p", f"{host}:{port}:{port}")]
    inside = arguments("/models", "0.0.0.0", ports, poll=poll, extra=extra)
    mounted = ["-v", f"{repository.resolve()}:/models:ro"]
    return [
        "docker",
        "run",
        "--rm",
        "--read-only",
        "--tmpfs",
        "/tmp",
        *published,
        *mounted,
        IMAGE,
        "tritonserver",
        *inside,
    ]


@contextlib.contextmanager
def serve(
    repository: Path,
    *,
    host: str = "127.0.0.1",
    ports: Sequence[int] = PORTS,
    program: str | None = None,
    poll: bool = False,
    extra: Sequence[str] = (),
    within: float = 120.0,
    log: Callable[[str], None] = lambda _: None,
) -> Iterator[Server]:
    """The server, ready; it is stopped at the end of the block. `log` is given a line for each thing that happens.

    Raises RequestError, and SfumatoError with the last lines of its log where it does not become ready.
    """
    models = models_of(repository)
    found = binary(program)
    chosen = [free_port(host, port) for port in ports]
    with tempfile.TemporaryDirectory(prefix="sfumato-triton-") as temporary:
        backends = _backends(found, Path(temporary))
        command = [str(found), *arguments(repository.resolve(), host, chosen, poll=poll, extra=extra)]
        command += [f"--backend-directory={backends}"] if backends else []
        last: list[str] = []
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env=_environment(), start_new_session=True,
        )  # fmt: skip
        reader = threading.Thread(target=_read, args=(process, last, log), daemon=True)
        reader.start()
        server = Server(process, host, chosen[0], chosen[1], chosen[2], tuple(models))
        try:
            _wait(server, last, within)
            yield server
        finally:
            server.stop()
            reader.join()


def _read(process: subprocess.Popen[str], last: list[str], log: Callable[[str], None]) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            short = brief(line)
            if short:
                log(short)
            if short or not (_LINE.match(line) or line.startswith(("|", "+"))):  # else the server's own bookkeeping
                last.append(short or line.rstrip())
                del last[:-_LAST]


# What a machine without a GPU makes the server say.
_NO_GPU = re.compile(r"CUDA driver version|CudaDriverHelper|DCGM|pinned")


def brief(line: str) -> str:
    """A line of the server's log as a person wants it; empty for what only the server's makers want."""
    found = _LINE.match(line.rstrip())
    if found is None:
        return ""
    level, clock, text = found.groups()
    said = text.strip('"').split(r"\n\nAt:")[0]
    if (level == "I" and not re.match(r"successfully (un)?load", said)) or _NO_GPU.search(said):
        return ""
    return f"{clock} {_LEVELS[level]}: {said}"


def _wait(server: Server, last: list[str], within: float) -> None:
    end = time.monotonic() + within
    url = f"http://{_shown(server.host)}:{server.http}/v2/health/ready"
    while time.monotonic() < end:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    told = [line for line in last if " error: " in line or " fatal: " in line] or last[-10:]
    ended = server.process.poll()
    what = f"ended with {ended}" if ended is not None else f"was not ready within {within:.0f} s"
    raise SfumatoError("\n".join([f"tritonserver {what}", *told]))


def _shown(host: str) -> str:
    plain = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{plain}]" if ":" in plain else plain


def _backends(server: Path, temporary: Path) -> Path | None:
    """The wheel's python backend laid out as the server wants it; None for a server that has its own."""
    root = server.parent.parent
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    source = root / "backends" / "python"
    if not (root / "python_backend_stubs").is_dir():
        return None
    if not stub.is_file():
        raise RequestError(
            f"the server's wheel has no python backend for Python {version}", wanted="Python 3.8 to 3.13"
        )
    place = temporary / "python"
    place.mkdir()
    for path in (source / "libtriton_python.so", source / "triton_python_backend_utils.py", stub):
        (place / path.name).symlink_to(path)
    return temporary


def _environment() -> dict[str, str]:
    """The stub must load this very Python's library and find this very sfumato, torch and the rest."""
    library = sysconfig.get_config_var("LIBDIR") or ""
    before = os.environ.get("LD_LIBRARY_PATH", "")
    found = [path for path in sys.path if path and Path(path).exists()]
    passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED)}
    return {
        **passed,  # no more: a tenant key may stand in the environment, and the server is outside
        "LD_LIBRARY_PATH": ":".join(part for part in (library, before) if part),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(found),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def settings(server: Server) -> dict[str, dict[str, object]]:
    """Configuration of every model, as the server tells it."""
    told = {}
    for model in server.models:
        url = f"http://{_shown(server.host)}:{server.http}/v2/models/{model}/config"
        with urllib.request.urlopen(url, timeout=10) as answer:
            told[model] = json.load(answer)
    return told
