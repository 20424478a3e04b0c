"""`fit` and `load`: both sides of one fit assembled on one machine, ready for the single additional line."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sfumato.core import artefact
from sfumato.core.cut import Split, split
from sfumato.core.errors import ArtefactError, DeviceError, RequestError, WeightsError
from sfumato.core.files import atomic
from sfumato.core.obfuscator import Obfuscator, Shape
from sfumato.core.restorer import Restorer
from sfumato.core.task import Image, Task
from sfumato.learn import cache, identity
from sfumato.learn.fit import Fitted, Settings, Trainer
from sfumato.outside.model import Outside
from sfumato.tasks.detection.faceboxes import FaceBoxes, with_weights
from sfumato.tasks.detection.task import FaceDetection
from sfumato.trusted.protect import Protected

CLIENT = "client.safetensors"
SERVERS = {"adapted": "server.safetensors", "frozen": "server-frozen.safetensors"}
CUT = "pool2"
BLOCK = 8  # sites a side that are coded as one
SHIPPED = Path(str(files("sfumato"))) / "weights"


def device_of(name: str | None) -> torch.device:
    """The device named, or the fastest one here. Raises DeviceError."""
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(str(name))
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"device {name!r}", wanted="cpu, or cuda where there is one", do="--device cpu") from error


def detector(weights: str | Path | None = None) -> FaceBoxes:
    """FaceBoxes with the shipped weights, or with those at `weights` (.pth or .safetensors). Raises WeightsError."""
    path = SHIPPED / "faceboxes.safetensors" if weights is None else Path(weights)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file", wanted="FaceBoxes weights", do="--weights FaceBoxesProd.pth")
    try:
        state: Mapping[str, Tensor] = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise WeightsError(f"{path}: not weights", wanted="a .pth state dict or .safetensors file") from error
    except Exception as error:  # the unpickler raises whatever a hostile file makes it raise
        raise WeightsError(f"{path}: refused by the safe loader", wanted="a plain state dict of tensors") from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path}: not a state dict of tensors", wanted="FaceBoxes weights")
    return with_weights({k: v.float() if v.is_floating_point() else v for k, v in state.items()})


def face_split(weights: str | Path | None = None) -> Split:
    """FaceBoxes cut after its second pool, as TR-4928 cut it."""
    return split(detector(weights), at=CUT)


def load(
    folder: str | Path | None = None,
    *,
    cut: Split | None = None,
    task: Task | None = None,
    weights: str | Path | None = None,
    tail: str | None = None,
    device: str | None = "cpu",
) -> Protected:
    """The artefacts in `folder` on their model: client, and server where it is there too. Raises ArtefactError.

    Without arguments: the shipped detector. With `weights`: artefacts fitted to FaceBoxes with those weights. With
    `cut` and `task`: artefacts of any model. `tail` is "adapted" or "frozen"; None takes adapted where it is there.
    """
    place = SHIPPED if folder is None else Path(folder)
    if not place.is_dir():
        raise ArtefactError(f"{place}: no such folder", wanted=f"a folder with {CLIENT}", do="sfumato fit --out FOLDER")
    cut = cut or face_split(weights)
    task = task or FaceDetection()
    where = device_of(device)
    header, state = artefact.read(place / CLIENT, side="client", model_digest=cut.digest())
    if header.task != task.name:
        raise ArtefactError(f"an artefact for {header.task}", wanted=f"one for {task.name}")
    obfuscator = Obfuscator(header.shape)
    obfuscator.load_state_dict(state)
    outside = _outside(place, cut, tail, header.digest)
    if outside is not None:
        outside.to(where)
    head, reference = _own(cut.head, where), _own(cut.tail, where)
    return Protected(head, obfuscator.to(where), task, header.digest, outside=outside, reference=reference)


def _own(side: nn.Module, device: torch.device) -> nn.Module:
    """A copy in eval mode on the device: the user's model stays where and as it is."""
    return deepcopy(side).to(device).eval()


def _outside(place: Path, cut: Split, tail: str | None, digest: str) -> Outside | None:
    if tail not in (None, *SERVERS):
        raise RequestError(f"tail {tail!r}", wanted="adapted or frozen", do="--tail adapted")
    names = [SERVERS[tail]] if tail else [name for name in SERVERS.values() if (place / name).exists()]
    if not names:
        return None
    header, state = artefact.read(place / names[0], side="server", model_digest=cut.digest())
    if header.digest != digest:
        raise ArtefactError(f"{place / names[0]}: the server of another client", wanted="both files of one fit")
    restorer = Restorer(header.shape)
    restorer.load_state_dict(_under("restorer.", state))
    module = deepcopy(cut.tail)
    if header.tail == "adapted":
        module.load_state_dict(_under("tail.", state))
    return Outside(restorer, module, digest)


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def fit(
    cut: Split,
    records: Sequence[Image],
    *,
    task: Task,
    out: str | Path,
    settings: Settings | None = None,
    shape: Mapping[str, Any] | None = None,
    start: str | Path | None = None,
    recogniser: identity.Recognise | None = None,
    device: str | None = "auto",
    half: bool = False,
    quiet: bool = False,
) -> Protected:
    """Fit to `records` and write the artefacts to `out`; the same call after a kill resumes. Raises RequestError.

    `start`: a folder of artefacts. With an adapted tail the fit begins from their obfuscator and restorer, and from
    their tail where they were fitted to this very model, from that of `cut` where not; with a frozen tail their
    obfuscator is kept as it is: one client serves both kinds of server.
    `recogniser`: square pictures of one subject each -> embeddings; with it, the fit plays against being recognised
    (`settings.identity`), where the task says where subjects are.
    `out/work` holds the head's clean outputs, the recogniser's answers and the checkpoint: it belongs inside the trust
    zone.
    """
    settings, where, place = settings or Settings(), device_of(device), Path(out)
    if recogniser is None or settings.tail == "frozen":
        settings = replace(settings, identity=0.0)
    place.mkdir(parents=True, exist_ok=True)
    _keep_pairs(place, settings.tail, start)
    key = f"{cut.digest()}:{cut.at}"
    held = cache.build(_own(cut.head, where), task, records, place / "work", key=key, device=where, quiet=quiet)
    sizes = Shape(channels=int(held.z.shape[1]), **{"block": _block(held.ndim, held.z.shape[2:]), **(shape or {})})
    if sizes.sent >= artefact.MAX_WIDTH:
        raise RequestError(f"{sizes.k} channels in blocks of {sizes.block}", wanted=f"k block^2 < {artefact.MAX_WIDTH}")
    subjects = None
    if recogniser is not None and settings.identity:
        tail = _own(cut.tail, where)
        subjects = identity.find(tail, task, recogniser, records, held, place / "work", device=where, quiet=quiet)
    begun = _begin(start, cut, keep=settings.tail == "frozen")
    work = place / "work" / settings.tail
    work.mkdir(parents=True, exist_ok=True)
    fitted = Trainer(
        cut.tail, task, held, work, settings, sizes, subjects=subjects, device=where, quiet=quiet, **begun
    ).run()
    facts = {"records": len(held) // held.views, "views": held.views, "data": held.digest, **asdict(settings)}
    _write(place, cut, task, fitted, settings.tail, held.ndim, facts, half=half)
    return load(place, cut=cut, task=task, tail=settings.tail, device=str(where))


def _block(ndim: int, size: Sequence[int]) -> int:
    """Side of the blocks that are coded as one: up to 8, what divides a picture's sites evenly; 1 for tokens."""
    return max(side for side in (1, 2, 4, BLOCK) if side == 1 or (ndim == 4 and not any(n % side for n in size)))


def _keep_pairs(place: Path, tail: str, start: str | Path | None) -> None:
    """Refuse to begin a fit that would end by replacing the client of a server that lies in the same folder."""
    other = place / SERVERS["adapted" if tail == "frozen" else "frozen"]
    if not other.exists() or (place / "work" / tail / "checkpoint.pt").exists():
        return
    if tail == "frozen" and start is not None:
        kept = artefact.read(Path(start) / CLIENT, side="client")[0].digest
        if kept == artefact.read(other, side="server")[0].digest:
            return
    raise RequestError(
        f"{place} holds {other.name}, whose client this fit would replace",
        wanted="a folder of its own, or a frozen tail that keeps that client",
        do=f"another --out, or --tail frozen --start {place}",
    )


def _begin(start: str | Path | None, cut: Split, *, keep: bool) -> dict[str, Any]:
    """What a fit starts from: the modules of an earlier one, its obfuscator kept as it is or not."""
    if start is None:
        return {}
    header, state = artefact.read(Path(start) / CLIENT, side="client")
    obfuscator = Obfuscator(header.shape)
    obfuscator.load_state_dict(state)
    _, server = artefact.read(Path(start) / SERVERS["adapted"], side="server")
    restorer = Restorer(header.shape)
    restorer.load_state_dict(_under("restorer.", server))
    same = header.model_digest == cut.digest() and not keep
    tail = _under("tail.", server) if same else {}
    return {"obfuscator": obfuscator, "restorer": restorer, "keep": keep, "tail_state": tail}


def _write(
    place: Path, cut: Split, task: Task, fitted: Fitted, tail: str, ndim: int, facts: dict[str, Any], *, half: bool
) -> None:
    client = {k: v.detach().cpu() for k, v in fitted.obfuscator.state_dict().items()}
    digest = artefact.digest_of(client)
    shape, metrics = fitted.obfuscator.shape, {"agreement": fitted.scores, "steps": fitted.steps}
    common: dict[str, Any] = {"version": artefact.VERSION, "model_digest": cut.digest(), "cut": cut.at, "ndim": ndim}
    common |= {"task": task.name, "shape": shape, "digest": digest, "fit": facts, "metrics": metrics}
    server = {f"restorer.{k}": v for k, v in fitted.restorer.state_dict().items()}
    if tail == "adapted":
        server |= {f"tail.{k}": v for k, v in fitted.tail.state_dict().items()}
    if half:
        # The allocation stays exact: both sides derive the width of a code from it.
        server = {k: v.half() if v.is_floating_point() and "allocation" not in k else v for k, v in server.items()}
    artefact.write(place / SERVERS[tail], server, artefact.Header(side="server", tail=tail, **common))
    if not _same_client(place / CLIENT, digest):
        artefact.write(place / CLIENT, client, artefact.Header(side="client", tail="none", **common))
        with atomic(place / "card.md") as temporary:
            temporary.write_text(_card(fitted.obfuscator, common, tail))


def _same_client(path: Path, digest: str) -> bool:
    """A frozen server fitted to the client that is already there leaves it, and its card, alone."""
    return path.exists() and artefact.read(path, side="client")[0].digest == digest


def _card(obfuscator: Obfuscator, common: Mapping[str, Any], tail: str) -> str:
    """What was fitted, to what, on what, and what it lets out."""
    rows = [(a, float(obfuscator.bits_per_site(a).detach())) for a in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95)]
    scores = ", ".join(f"{k.replace('a0', 'alpha 0')}: {v:.4f}" for k, v in common["metrics"]["agreement"].items())
    fit_facts = "\n".join(f"- {k}: {v}" for k, v in common["fit"].items())
    table = "\n".join(f"| {a:g} | {bits:.2f} |" for a, bits in rows)
    return f"""# Artefacts of an obfuscated model

Task {common["task"]}, model `{common["model_digest"][:16]}`, cut at `{common["cut"]}`, tail {tail}.
Obfuscator `{common["digest"]}`, {common["shape"]}.

`{CLIENT}` belongs inside the trust zone; `{SERVERS[tail]}` runs outside it.

| alpha | most bits a site lets out |
|---|---|
{table}

Agreement with the clean model on held-out records (1 = the same decisions): {scores}.
It says nothing of what an attacker still learns.

Fitted with:
{fit_facts}
"""
