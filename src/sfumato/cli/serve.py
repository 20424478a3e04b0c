"""`sfumato serve`: the real tritonserver on a model repository."""

import shlex
import signal
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from sfumato.cli.common import note


def serve(
    repository: Annotated[Path, typer.Argument(help="What `sfumato export triton` wrote.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 127.0.0.1 is this machine alone.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any free one.")] = 8002,
    poll: Annotated[bool, typer.Option("--poll", help="Load new versions as they are exported.")] = False,
    tritonserver: Annotated[
        str | None, typer.Option(help="The program; without it the one on PATH or in the wheel.")
    ] = None,
    docker: Annotated[bool, typer.Option("--docker", help="Run the official image instead.")] = False,
    print_command: Annotated[
        bool, typer.Option("--print-command", help="Show the command of --docker and end.")
    ] = False,
    option: Annotated[
        list[str] | None, typer.Option(help="Further options of tritonserver, such as --option=--grpc-use-ssl=true.")
    ] = None,
) -> None:
    """Start NVIDIA Triton on a model repository and say where it listens; Ctrl-C lets requests end, then ends it."""
    import subprocess

    from sfumato.core.errors import RequestError
    from sfumato.outside import serving

    ports, extra = (http_port, grpc_port, metrics_port), option or []
    serving.models_of(repository)
    if docker or print_command:
        command = serving.docker(repository, host, ports, poll=poll, extra=extra)
        typer.echo(shlex.join(command))
        if docker and not print_command:
            try:
                raise typer.Exit(subprocess.run(command, check=False).returncode)
            except FileNotFoundError as error:
                raise RequestError("docker is not installed", wanted="it", do="--print-command") from error
        return
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # a terminal that is closed: the server has a session of its own
        signal.signal(number, _ended)
    told = typer.echo
    try:
        with serving.serve(
            repository, host=host, ports=ports, program=tritonserver, poll=poll, extra=extra, log=note
        ) as server:
            for asked, got in zip(ports, (server.http, server.grpc, server.metrics), strict=True):
                if asked not in (0, got):
                    note(f"port {asked} is taken: {got} instead")
            told(f"models:  {', '.join(server.models)}")
            told(f"http:    http://{host}:{server.http}/v2")
            told(f"grpc:    grpc://{host}:{server.grpc}")
            told(f"metrics: http://{host}:{server.metrics}/metrics")
            code = server.process.wait()
    except KeyboardInterrupt:
        note("stopped")
        return
    note(f"tritonserver ended with {code}")
    raise typer.Exit(1 if code else 0)


def _ended(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
