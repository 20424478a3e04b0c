"""The command line: every verb is a module of its own, registered here; errors leave as sentences and exit codes.

Exit codes: 0 done, 1 the work failed, 2 the request was wrong, 130 interrupted.
"""

from collections.abc import Callable
from typing import Annotated

import typer

from sfumato import __version__
from sfumato.cli import bench, export, k8s
from sfumato.cli.audit import audit
from sfumato.cli.common import examples, guarded
from sfumato.cli.demo import demo
from sfumato.cli.detect import detect
from sfumato.cli.doctor import doctor
from sfumato.cli.fit import fit
from sfumato.cli.gateway import gateway
from sfumato.cli.key import key
from sfumato.cli.ledger import ledger
from sfumato.cli.measure import measure
from sfumato.cli.serve import serve

app = typer.Typer(
    name="sfumato",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",  # flows a docstring's lines together
    pretty_exceptions_enable=False,  # a traceback must not show local variables: they hold records
    context_settings={"help_option_names": ["-h", "--help"]},
)

_AGAIN = "type the same command to begin again"

app.command()(guarded(demo, resume=_AGAIN))
app.command(
    epilog=examples(
        "sfumato fit --data photographs --out mine",
        "sfumato fit --data photographs --out mine --weights FaceBoxesProd.pth --decoder-steps 1500",
        "sfumato fit --data photographs --out mine --start mine --tail frozen",
    )
)(guarded(fit))
app.command(epilog=examples("sfumato detect photographs --alpha 0.8 --out results"))(guarded(detect))
app.command(
    epilog=examples(
        "sfumato measure --dataset FDDB --alpha 0.8 --noisy",
        "sfumato measure --dataset FDDB --sweep --seeds 0,1,2 --csv table.csv",
    )
)(guarded(measure))
app.command(
    epilog=examples(
        "sfumato audit --data lfw",
        "sfumato audit mine --data lfw --weights FaceBoxesProd.pth --budget full --fail-above tar=0.05",
    )
)(guarded(audit))

exports = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help=export.__doc__,
    epilog=examples("sfumato export triton shipped models"),
)
exports.command(
    epilog=examples(
        "sfumato export triton shipped models",
        "sfumato export triton mine models --weights FaceBoxesProd.pth --backend onnxruntime --kind gpu",
    )
)(guarded(export.triton, resume=_AGAIN))
exports.command(epilog=examples("sfumato export onnx device.onnx --alpha 0.8"))(guarded(export.onnx, resume=_AGAIN))
app.add_typer(exports, name="export")
app.command(epilog=examples("sfumato serve models", "sfumato serve models --docker --print-command"))(
    guarded(serve, resume=_AGAIN)
)

app.command(epilog=examples("sfumato key tenant.key"))(guarded(key, resume=_AGAIN))
app.command(
    epilog=examples("sfumato ledger ledger.db", "sfumato ledger ledger.db --photograph ward.jpg --key tenant.key")
)(guarded(ledger, resume=_AGAIN))
app.command(
    epilog=examples(
        "sfumato gateway --upstream grpcs://inference.example:8001 --ledger ledger.db --key tenant.key",
        "sfumato gateway --upstream grpc://127.0.0.1:8001 --ledger ledger.db --key tenant.key --http-port 9000"
        " --grpc-port 9001",
        "sfumato gateway --upstream https://inference.example --ledger ledger.db --key tenant.key --host 0.0.0.0"
        " --tls-cert cert.pem --tls-key key.pem --api-keys keys.txt --max-releases 100",
    )
)(guarded(gateway, resume=_AGAIN))
_LEFT = "what was started in the cluster goes on; the same command follows it again"
clusters = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help=k8s.__doc__)
_GROUPS: dict[str, tuple[str, dict[str, tuple[Callable[..., None], str]]]] = {
    "job": (
        "Runs of the table, one Job an arm.",
        {
            "run": (k8s.job_run, "sfumato k8s job run --dataset /data/FDDB --sweep"),
            "wait": (k8s.job_wait, "sfumato k8s job wait accuracy"),
            "logs": (k8s.job_logs, "sfumato k8s job logs accuracy alpha-0-8"),
            "table": (k8s.job_table, "sfumato k8s job table accuracy --json table.json"),
            "delete": (k8s.job_delete, "sfumato k8s job delete accuracy"),
        },
    ),
    "volume": (
        "Volumes, which are PersistentVolumeClaims.",
        {
            "create": (k8s.volume_create, "sfumato k8s volume create inference-data --size 50Gi"),
            "list": (k8s.volume_list, "sfumato k8s volume list -n inference"),
            "delete": (k8s.volume_delete, "sfumato k8s volume delete inference-data"),
        },
    ),
    "data": ("What is on volumes.", {"put": (k8s.data_put, "sfumato k8s data put FDDB inference-data:FDDB")}),
    "render": (
        "The YAML of what the other verbs would make.",
        {
            "job": (k8s.render_job, "sfumato k8s render job --dataset /data/FDDB --sweep"),
            "volume": (k8s.render_volume, "sfumato k8s render volume inference-data --size 50Gi"),
        },
    ),
}
for _group, (_says, _verbs) in _GROUPS.items():
    _made = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help=_says)
    for _name, (_verb, _example) in _verbs.items():
        _made.command(_name, epilog=examples(_example))(guarded(_verb, resume=_LEFT))
    clusters.add_typer(_made, name=_group)
app.add_typer(clusters, name="k8s")
app.command(epilog=examples("sfumato doctor --dataset FDDB"))(guarded(doctor, resume=_AGAIN))

benches = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help=bench.__doc__, epilog=examples("sfumato bench obfuscate")
)
benches.command(
    epilog=examples("sfumato bench obfuscate --threads 1", "sfumato bench obfuscate --stream 10000 --json step.json")
)(guarded(bench.obfuscate, resume=_AGAIN))
benches.command(epilog=examples("sfumato bench pipeline --data photographs"))(guarded(bench.pipeline, resume=_AGAIN))
benches.command(epilog=examples("sfumato bench wire --alpha 0.4 --alpha 0.8"))(guarded(bench.wire, resume=_AGAIN))
benches.command(epilog=examples("sfumato bench fit --steps 10"))(guarded(bench.fit, resume=_AGAIN))
app.add_typer(benches, name="bench")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def sfumato(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Which one.")] = False,
) -> None:
    """Confidential inference: obfuscate what leaves, run the rest anywhere, measure what still leaks."""


def main() -> None:
    """The console command."""
    app(prog_name="sfumato")
