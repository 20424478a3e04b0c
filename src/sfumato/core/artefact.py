"""What a fit leaves: one safetensors file a side, with a JSON header. What is read is what was written, or an error.

The header is the metadata entry "sfumato" of the file: a JSON object of the fields of `Header` and a `seal`, the sha256
of the other fields as sorted JSON. `tensors_digest` covers names, dtypes, shapes and bytes of the stored tensors. So
damage of any kind is found. A forger can recompute both, hence every size is checked before anything is built or
loaded. Nothing is ever unpickled.

Tensors of the obfuscator and the restorer are stored as float16 or float32 and load as float32. An adapted tail brings
whatever its model holds (integer counters too): 16-bit floats load as float32, the rest as stored.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sfumato.core import channel
from sfumato.core.digest import digest_of
from sfumato.core.errors import ArtefactError
from sfumato.core.files import write_bytes
from sfumato.core.obfuscator import Allocation, Obfuscator, Shape
from sfumato.core.restorer import Restorer

__all__ = ["VERSION", "Header", "digest_of", "read", "write"]

VERSION = 2
TAILS = ("none", "frozen", "adapted")
# Generous over anything the project makes: an obfuscator is under 1 MiB, a tail as large as its model.
MAX_BYTES = {"client": 1 << 28, "server": 1 << 34}
MAX_HEADER = 1 << 24  # of JSON, a list of 200,000 digests of fit data
MAX_WIDTH = 1 << 16  # channels in, context width; channels sent are below it because they travel as 16 bits
MAX_BLOCK = 16
MAX_BOUND, MAX_BITS = 1e3, 1e5  # bound B, and C_ref in bits per site
MAX_AXES = 8  # of a tail's tensor
_KEY, _SEAL = "sfumato", "seal"
_OUR_DTYPES = {"F16", "F32"}
_TAIL_DTYPES = _OUR_DTYPES | {"BF16", "F64", "I8", "I16", "I32", "I64", "U8", "BOOL"}
_DTYPES = {
    torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.bool: "BOOL",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8",
}  # fmt: skip
_FIT = "fit again (sfumato fit) or copy the file again"

Spec = tuple[str, tuple[int, ...]]  # dtype as safetensors writes it, shape


@dataclass(frozen=True)
class Header:
    """What an artefact says of itself. `digest` is of the client's tensors on both sides: it names the pair.

    `tail` is what the server side ships: "none", "frozen" (the provider's own) or "adapted" (fine-tuned, tensors under
    "tail."). `fit` and `metrics` are JSON objects. `tensors_digest` is of the file's own tensors; `write` fills it in.
    """

    side: str
    version: int
    model_digest: str
    cut: str
    task: str
    ndim: int
    shape: Shape
    digest: str
    tail: str
    fit: dict[str, Any]
    metrics: dict[str, Any]
    tensors_digest: str = ""


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Header) -> None:
    """Tensors and header to `path`, whole or not at all.

    Raises ArtefactError for what `read` would refuse, OutputError for a place that cannot be written.
    """
    stored = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    _check_header(header)
    _check_specs(header, {name: (_DTYPES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in stored.items()})
    _check_values(header, stored)
    sealed = replace(header, tensors_digest=digest_of(stored))
    _check_digests(sealed, sealed.tensors_digest)
    write_bytes(path, save(stored, {_KEY: _to_json(sealed)}))


def read(
    path: str | os.PathLike[str], *, side: str, model_digest: str | None = None
) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors of the artefact of `side` at `path`, made for the model of `model_digest` where one is given.

    Raises ArtefactError for a file that is absent, no artefact, damaged, too large, of the other side, another version
    or another model, or whose tensors are not exactly those of its shape, finite, and of its digests.
    """
    place = Path(path)
    try:
        _check_file(place, side)
        header, stored = _load(place, side, model_digest)
        _check_values(header, stored)
        _check_digests(header, digest_of(stored))
    except ArtefactError as error:
        raise ArtefactError(f"{place}: {error.got}", wanted=error.wanted, do=error.do) from error.__cause__
    short = (torch.float16, torch.bfloat16)
    return header, {name: t.float() if t.dtype in short else t for name, t in stored.items()}


def _check_file(place: Path, side: str) -> None:
    """Before any parser sees the file: it is one, and neither it nor its header is absurdly large."""
    if not os.path.isfile(place):  # Path.is_file raises on a name no file can have
        raise ArtefactError("no such file", wanted=f"a {side} artefact", do="sfumato fit writes one")
    try:
        with place.open("rb") as file:
            size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise ArtefactError(f"unreadable: {error.strerror}", wanted=f"a {side} artefact") from error
    if size > MAX_BYTES.get(side, 0):
        raise ArtefactError(f"{size} bytes", wanted=f"a {side} artefact, at most {MAX_BYTES.get(side, 0)} bytes")
    if not 0 < length <= min(MAX_HEADER, size - 8):
        raise ArtefactError("not a safetensors file, or a truncated one", wanted=f"a {side} artefact", do=_FIT)


def _load(place: Path, side: str, model_digest: str | None) -> tuple[Header, dict[str, Tensor]]:
    """Header first, then sizes, then tensors, copied out of the mapped file so that they stay what was checked."""
    try:
        with safe_open(place, framework="pt") as file:
            header = _from_json((file.metadata() or {}).get(_KEY))
            _check_header(header)
            _check_wanted(header, side, model_digest)
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            _check_specs(header, {name: (str(v.get_dtype()), tuple(v.get_shape())) for name, v in views.items()})
            return header, {name: file.get_tensor(name).clone() for name in views}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ArtefactError("not a safetensors file, or a damaged one", wanted=f"a {side} artefact", do=_FIT) from error


def _plain(header: Header) -> dict[str, Any]:
    return {**asdict(header), "shape": header.shape.as_dict()}


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _seal_of(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()


def _to_json(header: Header) -> str:
    try:
        value = json.loads(_canonical(_plain(header)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtefactError("fit or metrics that are not JSON", wanted="text, finite numbers and lists") from error
    text = _canonical({**value, _SEAL: _seal_of(value)})
    if len(text) > MAX_HEADER // 2:  # the file holds it as a JSON string, quotes escaped
        raise ArtefactError(f"a header of {len(text)} characters", wanted=f"at most {MAX_HEADER // 2}")
    return text


def _from_json(text: str | None) -> Header:
    if text is None:
        raise ArtefactError("a safetensors file without sfumato's header", wanted="an artefact", do=_FIT)
    try:
        value = json.loads(text)
        version, seal = value.get("version"), value.pop(_SEAL, None)
        same = seal == _seal_of(value)
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ArtefactError("a header that is not JSON", wanted="an artefact", do=_FIT) from error
    if version != VERSION:
        raise ArtefactError("an artefact of another version", wanted=f"version {VERSION}", do="fit again (sfumato fit)")
    if not same or set(value) != {f.name for f in fields(Header)}:
        raise ArtefactError("a damaged header", wanted="the header as it was written", do=_FIT)
    shape = value["shape"]
    if not isinstance(shape, dict) or set(shape) != {f.name for f in fields(Shape)}:
        raise ArtefactError("a header without a shape", wanted="channels, k, bound, c_ref, context, block", do=_FIT)
    return Header(**{**value, "shape": Shape(**shape)})


def _check_header(header: Header) -> None:
    """Types and bounds of every field, before any of them is used."""
    checks = {
        "side": header.side in ("client", "server"),
        "version": type(header.version) is int and header.version == VERSION,
        "model_digest": _is_hex(header.model_digest),
        "cut": isinstance(header.cut, str),
        "task": isinstance(header.task, str),
        "ndim": type(header.ndim) is int and header.ndim in (2, 3, 4),
        "digest": _is_hex(header.digest),
        "tail": header.tail in TAILS,
        "fit": isinstance(header.fit, dict),
        "metrics": isinstance(header.metrics, dict),
        "channels": _is_width(header.shape.channels, MAX_WIDTH),
        "k": _is_width(header.shape.k, MAX_WIDTH - 1),
        "context": _is_width(header.shape.context, MAX_WIDTH),
        "block": _is_width(header.shape.block, MAX_BLOCK),
        "bound": _is_amount(header.shape.bound, MAX_BOUND),
        "c_ref": _is_amount(header.shape.c_ref, MAX_BITS),
    }
    wrong = [name for name, right in checks.items() if not right]
    if not wrong and header.shape.sent >= MAX_WIDTH:
        wrong = ["k block^2"]
    if wrong:
        raise ArtefactError(f"a header out of bounds in {', '.join(wrong)}", wanted="the header of a fit", do=_FIT)


def _is_hex(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_width(value: object, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_amount(value: object, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most


def _check_wanted(header: Header, side: str, model_digest: str | None) -> None:
    if header.side != side:
        raise ArtefactError(f"a {header.side} artefact", wanted=f"a {side} artefact", do=f"give {side}.safetensors")
    if model_digest is not None and header.model_digest != model_digest:
        raise ArtefactError(
            f"an artefact of model {header.model_digest[:12]}",
            wanted=f"one of model {model_digest[:12]}",
            do="use the weights it was fitted to, or fit again (sfumato fit)",
        )


def _expected(header: Header) -> dict[str, tuple[int, ...]]:
    """Names and shapes the header implies, from modules on the meta device, which hold no memory."""
    with torch.device("meta"):
        client = header.side == "client"
        module = Obfuscator(header.shape) if client else Restorer(header.shape)
    prefix = "" if client else "restorer."
    return {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _check_specs(header: Header, specs: Mapping[str, Spec]) -> None:
    want = _expected(header)
    ours = {name: spec for name, spec in specs.items() if header.side == "client" or not name.startswith("tail.")}
    missing, extra = sorted(want.keys() - ours.keys()), sorted(ours.keys() - want.keys())
    if missing or extra:
        raise ArtefactError(
            f"{len(missing)} tensors missing, {len(extra)} too many, first {(missing + extra)[0]!r}",
            wanted=f"exactly the {len(want)} tensors of a {header.side} artefact",
            do=_FIT,
        )
    for name, (dtype, shape) in ours.items():
        if shape != want[name] or dtype not in _OUR_DTYPES:
            raise ArtefactError(f"{name} {dtype} {list(shape)}", wanted=f"F16 or F32 {list(want[name])}", do=_FIT)
    _check_tail(header, {name: spec for name, spec in specs.items() if name not in ours})


def _check_tail(header: Header, specs: Mapping[str, Spec]) -> None:
    if header.side == "server" and header.tail == "adapted" and not specs:
        raise ArtefactError("an adapted tail without tensors", wanted='the tail\'s tensors under "tail."', do=_FIT)
    for name, (dtype, shape) in specs.items():
        if dtype not in _TAIL_DTYPES or len(shape) > MAX_AXES or name == "tail.":
            raise ArtefactError(f"{name!r} {dtype} {list(shape)}", wanted="a tensor of a torch module", do=_FIT)


def _check_values(header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Finite tensors, and an allocation whose gains are finite at every alpha."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ArtefactError(f"{name} holds values that are not finite", wanted="finite tensors", do=_FIT)
    prefix = "" if header.side == "client" else "restorer."
    allocation = Allocation(header.shape)
    state = {name: tensors[f"{prefix}allocation.{name}"].float() for name in allocation.state_dict()}
    allocation.load_state_dict(state)
    alphas = torch.linspace(0, 1, 17)
    with torch.no_grad():
        if not bool(torch.isfinite(channel.reach(allocation(alphas))).all()):
            raise ArtefactError("an allocation of 64 bits or more to one channel", wanted="less", do="a smaller c_ref")


def _check_digests(header: Header, found: str) -> None:
    if header.tensors_digest != found:
        raise ArtefactError("tensors that are not those of its digest", wanted="an undamaged file", do=_FIT)
    if header.side == "client" and header.digest != found:
        raise ArtefactError(
            f"tensors of digest {found[:12]} under the header of {header.digest[:12]}",
            wanted="header.digest == digest_of(tensors) on the client side",
            do=_FIT,
        )
