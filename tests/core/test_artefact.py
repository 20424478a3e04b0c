"""An artefact comes back exactly as written or not at all, whatever was done to the file."""

import hashlib
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from sfumato.core import artefact
from sfumato.core.artefact import VERSION, Header, digest_of, read, write
from sfumato.core.errors import ArtefactError, OutputError
from sfumato.core.obfuscator import Obfuscator, Shape
from sfumato.core.restorer import Restorer

SHAPE = Shape(channels=3, k=2, bound=2.0, c_ref=5.0, context=2)
MODEL = hashlib.sha256(b"model").hexdigest()
SIDES = ("client", "server")
Tensors = dict[str, Tensor]
steady = settings(derandomize=True, deadline=None, max_examples=60)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture(scope="module", autouse=True)
def roof() -> Iterator[None]:
    """Whatever asks for a gigabyte more than is in use fails, so an absurd allocation cannot pass unnoticed."""
    if not sys.platform.startswith("linux"):
        yield
        return
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def tensors_of(side: str, dtype: torch.dtype = torch.float32) -> Tensors:
    """A client's tensors; a server's with an adapted tail that counts its batches."""
    rng = torch.Generator().manual_seed(len(side))
    module = Obfuscator(SHAPE) if side == "client" else Restorer(SHAPE)
    prefix = "" if side == "client" else "restorer."
    made = {prefix + name: torch.randn(t.shape, generator=rng).to(dtype) for name, t in module.state_dict().items()}
    if side == "server":
        made |= {"tail.0.weight": torch.randn(4, 3, generator=rng), "tail.1.num_batches_tracked": torch.tensor(17)}
    return made


def header_of(side: str, tensors: Tensors | None = None) -> Header:
    fit = {"images": 1600, "seed": 0, "data": [MODEL[:8], None, True], "loss": 0.25, "name": 'a "ü" \\'}
    client = digest_of(tensors if tensors is not None and side == "client" else tensors_of("client"))
    return Header(side, VERSION, MODEL, "pool2", "detection", 4, SHAPE, client, "adapted", fit, {"ap": {"0.8": 0.91}})


def packed(side: str) -> bytes:
    """The file as a fit writes it, made once a side."""
    if side not in _PACKED:
        stored, header = tensors_of(side), header_of(side)
        value = json.loads(artefact._to_json(replace(header, tensors_digest=digest_of(stored))))
        _PACKED[side] = forged(value, stored)
    return _PACKED[side]


_PACKED: dict[str, bytes] = {}


def forged(value: Any, tensors: Tensors, *, seal: bool = True) -> bytes:
    """Any header over any tensors, sealed as the forger can."""
    if seal and isinstance(value, dict):
        bare = {name: v for name, v in value.items() if name != "seal"}
        value = {**bare, "seal": hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()}
    return save(tensors, {"sfumato": json.dumps(value, sort_keys=True)})


def value_of(side: str, tensors: Tensors | None = None, **changes: Any) -> dict[str, Any]:
    stored = tensors_of(side) if tensors is None else tensors
    header = replace(header_of(side, stored), tensors_digest=digest_of(stored))
    return {**asdict(header), **changes}


def equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def refused_or_as_written(place: Path, side: str, data: bytes) -> bool:
    """True where it was refused; anything but ArtefactError or the very same content fails."""
    place.write_bytes(data)
    try:
        header, tensors = read(place, side=side)
    except ArtefactError:
        return True
    assert header == replace(header_of(side), tensors_digest=digest_of(tensors_of(side)))
    assert equal(tensors, tensors_of(side))
    return False


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artefact") / "a.safetensors"


@pytest.mark.parametrize("side", SIDES)
def test_round_trip(tmp_path: Path, side: str) -> None:
    where, stored, header = tmp_path / "new" / "a.safetensors", tensors_of(side), header_of(side)
    write(where, stored, header)
    got, tensors = read(where, side=side, model_digest=MODEL)
    assert got == replace(header, tensors_digest=digest_of(stored)) and equal(tensors, stored)
    assert [path.name for path in where.parent.iterdir()] == ["a.safetensors"]
    module = Obfuscator(SHAPE) if side == "client" else Restorer(SHAPE)
    prefix = "" if side == "client" else "restorer."
    module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if not n.startswith("tail.")})


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, tensors_of("server"), header_of("server"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == packed("server")


@pytest.mark.parametrize("side", SIDES)
def test_half_precision_loads_as_float32(tmp_path: Path, side: str) -> None:
    stored = tensors_of(side, torch.float16)
    if side == "server":
        stored["tail.2.scale"] = torch.tensor([1.5, -2]).bfloat16()
    write(tmp_path / "a", stored, header_of(side, stored))
    header, tensors = read(tmp_path / "a", side=side)
    assert header.tensors_digest == digest_of(stored)
    assert side == "server" or header.digest == header.tensors_digest
    assert all(torch.equal(tensors[name], stored[name].to(tensors[name].dtype)) for name in stored)
    assert {t.dtype for name, t in tensors.items() if "num_batches" not in name} == {torch.float32}


def test_views_and_gradients_are_written_as_what_they_are(tmp_path: Path) -> None:
    stored = {name: t.flip(0).requires_grad_() for name, t in tensors_of("client").items()}
    stored["linear.weight"] = torch.zeros(1).expand(2, 3, 1, 1)
    write(tmp_path / "a", stored, header_of("client", stored))
    assert equal(read(tmp_path / "a", side="client")[1], {n: t.detach() for n, t in stored.items()})


def test_what_was_read_does_not_change_with_the_file(tmp_path: Path) -> None:
    where = tmp_path / "a"
    write(where, tensors_of("client"), header_of("client"))
    _, tensors = read(where, side="client")
    with where.open("r+b") as file:
        file.write(bytes(where.stat().st_size))
    assert equal(tensors, tensors_of("client"))


# Damage


@steady
@given(data=st.binary(max_size=300), prefix=st.sampled_from([0, 1, 100]))
def test_random_bytes(place: Path, data: bytes, prefix: int) -> None:
    for side in SIDES:
        assert refused_or_as_written(place, side, prefix.to_bytes(8, "little") + data)
        assert refused_or_as_written(place, side, data)


@pytest.mark.parametrize("side", SIDES)
@settings(steady, max_examples=150)
@given(flips=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes(place: Path, side: str, flips: list[tuple[int, int]]) -> None:
    data = bytearray(packed(side))
    for where, flip in flips:
        data[where % len(data)] ^= flip
    refused_or_as_written(place, side, bytes(data))


@pytest.mark.parametrize("side", SIDES)
def test_every_flip_in_the_tensors_is_found(place: Path, side: str) -> None:
    data = packed(side)
    start = 8 + int.from_bytes(data[:8], "little")
    for where in range(start, len(data), 7):
        assert refused_or_as_written(place, side, data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :])


@pytest.mark.parametrize("side", SIDES)
@steady
@given(cut=st.integers(1, 1 << 20), extra=st.binary(min_size=1, max_size=9))
def test_truncated_and_padded(place: Path, side: str, cut: int, extra: bytes) -> None:
    data = packed(side)
    assert refused_or_as_written(place, side, data[: -1 - cut % len(data)])
    assert refused_or_as_written(place, side, data + extra)


@steady
@given(length=st.integers(0, 2**64 - 1) | st.integers(0, 9000))
def test_other_header_lengths(place: Path, length: int) -> None:
    data = packed("client")
    if length != int.from_bytes(data[:8], "little"):
        assert refused_or_as_written(place, "client", length.to_bytes(8, "little") + data[8:])


@steady
@given(data=st.data())
def test_edited_file_headers(place: Path, data: st.DataObject) -> None:
    """The file's own table of tensors: another dtype, shape or range of bytes under a real body."""
    whole = packed("client")
    length = int.from_bytes(whole[:8], "little")
    table = json.loads(whole[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(table)))
    entry = table[name] if name != "__metadata__" else {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
    number = st.integers(0, 70) | st.sampled_from([2**31, 2**62, 2**64 - 1, 2**64, -1])
    edit = {
        "dtype": st.sampled_from(["F16", "F64", "I8", "I64", "BOOL", "BF16", "F8_E4M3", "F4", "C64", "?", ""]),
        "shape": st.lists(number, max_size=5),
        "data_offsets": st.lists(number, max_size=3),
    }
    field = data.draw(st.sampled_from([*edit, "all", "drop", "add"]))
    if field in edit:
        table[name] = {**entry, field: data.draw(edit[field] | json_values)}
    elif field == "all":
        table[name] = data.draw(json_values)
    elif field == "drop":
        del table[name]
    else:
        table[data.draw(st.text(max_size=8))] = entry
    text = json.dumps(table).encode()
    refused_or_as_written(place, "client", len(text).to_bytes(8, "little") + text + whole[8 + length :])


@pytest.mark.parametrize("side", SIDES)
@steady
@given(data=st.data())
def test_edits_of_our_header_are_found(place: Path, side: str, data: st.DataObject) -> None:
    stored, value = tensors_of(side), value_of(side)
    value["seal"] = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    name = data.draw(st.sampled_from(sorted(value)))
    new = data.draw(json_values)
    same = json.dumps(new) == json.dumps(value[name])
    assert refused_or_as_written(place, side, forged({**value, name: new}, stored, seal=False)) != same
    del value[name]
    assert refused_or_as_written(place, side, forged(value, stored, seal=False))


# Forgery: the seal is right, so only the bounds stand


@pytest.mark.parametrize("side", SIDES)
@steady
@given(data=st.data())
def test_forged_headers(place: Path, side: str, data: st.DataObject) -> None:
    value = value_of(side)
    name = data.draw(st.sampled_from(sorted(value)))
    value[name] = data.draw(json_values | st.sampled_from([MODEL, "none", "client", "server", 2, 3]))
    place.write_bytes(forged(value, tensors_of(side)))
    try:
        header, tensors = read(place, side=side)
    except ArtefactError:
        return
    assert asdict(header) == value and name != "tensors_digest" and equal(tensors, tensors_of(side))
    assert header.version == VERSION
    assert header.side == side and header.tail in artefact.TAILS and header.ndim in (2, 3, 4)


@pytest.mark.parametrize("side", SIDES)
@steady
@given(
    name=st.sampled_from(["channels", "k", "context", "bound", "c_ref", "block"]),
    new=st.integers(-5, 2**70) | st.sampled_from([2**16, 2**16 - 1, 1e308, 0.0, -1.0, True, "64", None, [3], 1e3, 3.0]),
)
def test_forged_shapes(place: Path, side: str, name: str, new: Any) -> None:
    value = value_of(side)
    value["shape"][name] = new
    place.write_bytes(forged(value, tensors_of(side)))
    try:
        header, _ = read(place, side=side)
    except ArtefactError:
        return
    free = {"bound", "c_ref"} | ({"context"} if side == "server" else set())  # no restorer tensor shows the context
    assert name in free or new == asdict(SHAPE)[name]
    assert asdict(header.shape)[name] == new and 0 < float(new) <= 1e5 and not isinstance(new, bool)


@pytest.mark.parametrize("side", SIDES)
def test_the_largest_shape_takes_no_memory(place: Path, side: str) -> None:
    value = value_of(side)
    value["shape"] |= {"channels": 2**16, "k": 2**16 - 1, "context": 2**16}
    place.write_bytes(forged(value, tensors_of(side)))
    with pytest.raises(ArtefactError, match="F16 or F32"):
        read(place, side=side)


@pytest.mark.parametrize("text", ["", "null", "[]", "3", "NaN", "{", '{"version": NaN}', "[" * 100_000, "9" * 10_000])
def test_metadata_that_is_no_header(place: Path, text: str) -> None:
    place.write_bytes(save(tensors_of("client"), {"sfumato": text}))
    with pytest.raises(ArtefactError, match="header"):
        read(place, side="client")


def test_a_safetensors_file_of_something_else(place: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        place.write_bytes(save({"weight": torch.ones(2)}, metadata))
        with pytest.raises(ArtefactError, match="without sfumato's header"):
            read(place, side="client")


def edited(side: str, change: Callable[[Tensors], object]) -> Callable[[], bytes]:
    def make() -> bytes:
        stored = tensors_of(side)
        change(stored)
        return forged(value_of(side, stored), stored)

    return make


NAN, INF = torch.tensor([0.0, float("nan")]), torch.tensor([float("-inf"), 0.0, 0.0])
HOSTILE = {
    "missing": ("client", edited("client", lambda t: t.pop("mean")), "1 tensors missing"),
    "extra": ("client", edited("client", lambda t: t.update(more=torch.ones(1))), "1 too many"),
    "a client's tail": ("client", edited("client", lambda t: t.update({"tail.w": torch.ones(1)})), "too many"),
    "misshapen": ("client", edited("client", lambda t: t.update(mean=torch.ones(4))), "mean F32"),
    "another dtype": ("client", edited("client", lambda t: t.update(mean=torch.ones(3).double())), "mean F64"),
    "integers": ("client", edited("client", lambda t: t.update(mean=torch.ones(3).long())), "mean I64"),
    "nan": ("client", edited("client", lambda t: t.update({"linear.bias": NAN})), "not finite"),
    "inf": ("server", edited("server", lambda t: t.update({"restorer.mean": INF})), "not finite"),
    "nan in the tail": ("server", edited("server", lambda t: t.update({"tail.x": NAN.half()})), "not finite"),
    "no restorer": ("server", edited("server", lambda t: t.pop("restorer.near.mix.bias")), "1 tensors missing"),
    "beside the tail": ("server", edited("server", lambda t: t.update(tailor=torch.ones(1))), "too many"),
    "a nameless tail": ("server", edited("server", lambda t: t.update({"tail.": torch.ones(1)})), "a torch module"),
    "a complex tail": ("server", edited("server", lambda t: t.update({"tail.x": torch.ones(1) * 1j})), "torch module"),
    "deep axes": ("server", edited("server", lambda t: t.update({"tail.x": torch.ones([1] * 9)})), "torch module"),
    "another digest": ("client", lambda: forged(value_of("client", digest="0" * 64), tensors_of("client")), "digest"),
    "other tensors": ("server", lambda: forged(value_of("server", tensors_digest=MODEL), tensors_of("server")), "its"),
    "another version": ("client", lambda: forged(value_of("client", version=1), tensors_of("client")), "version"),
    "no version": ("client", lambda: forged({"side": "client"}, tensors_of("client")), "version"),
    "the other side": ("client", lambda: packed("server"), "a server artefact"),
    "a pickle": ("client", lambda: b"\x80\x04\x95" + bytes(400), "not a safetensors file"),
    "no room to parse": ("client", lambda: (1 << 25).to_bytes(8, "little") + bytes(1 << 25), "not a safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(place: Path, case: str) -> None:
    side, make, says = HOSTILE[case]
    place.write_bytes(make())
    with pytest.raises(ArtefactError, match=says) as caught:
        read(place, side=side)
    assert str(place) in str(caught.value) and caught.value.wanted


def test_an_adapted_tail_has_tensors(place: Path) -> None:
    stored = {name: t for name, t in tensors_of("server").items() if not name.startswith("tail.")}
    place.write_bytes(forged(value_of("server", stored), stored))
    with pytest.raises(ArtefactError, match="an adapted tail without tensors"):
        read(place, side="server")
    place.write_bytes(forged(value_of("server", stored, tail="frozen"), stored))
    assert read(place, side="server")[0].tail == "frozen"


def test_all_bits_in_one_channel(place: Path) -> None:
    stored = tensors_of("client")
    stored["allocation.w"] = torch.tensor([60.0, 0.0])
    value = value_of("client", stored)
    value["shape"]["c_ref"] = 70.0
    place.write_bytes(forged(value, stored))
    with pytest.raises(ArtefactError, match="64 bits or more"):
        read(place, side="client")


def test_another_model(place: Path) -> None:
    place.write_bytes(packed("client"))
    with pytest.raises(ArtefactError, match="an artefact of model") as caught:
        read(place, side="client", model_digest="f" * 64)
    assert MODEL[:12] in caught.value.got and "f" * 12 in caught.value.wanted and "fit" in caught.value.do


@pytest.mark.parametrize("side", SIDES)
def test_a_file_larger_than_any_artefact_is_not_opened(tmp_path: Path, side: str) -> None:
    with (tmp_path / "a").open("wb") as file:
        file.truncate(artefact.MAX_BYTES[side] + 1)  # a sparse file: no disk, no memory
    with pytest.raises(ArtefactError, match="bytes"):
        read(tmp_path / "a", side=side)


def test_no_file(tmp_path: Path) -> None:
    for where in (tmp_path / "absent", tmp_path, tmp_path / ("n" * 300), "a\0b"):
        with pytest.raises(ArtefactError, match="no such file"):
            read(where, side="client")
    (tmp_path / "empty").touch()
    with pytest.raises(ArtefactError, match="not a safetensors file"):
        read(tmp_path / "empty", side="client")


# Writing what could not be read


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_digest": "abc"}, "model_digest"),
        ({"version": 1}, "version"),
        ({"ndim": 5}, "ndim"),
        ({"tail": "melted"}, "tail"),
        ({"shape": Shape(3, k=2**16)}, "k"),
        ({"shape": Shape(3, bound=float("nan"))}, "bound"),
        ({"shape": Shape(3, block=17)}, "block"),
        ({"shape": Shape(3, k=2**12, block=8)}, "k block"),
        ({"fit": {"loss": float("nan")}}, "not JSON"),
        ({"metrics": {"picture": b"bytes"}}, "not JSON"),
        ({"fit": {1: 0, "b": 0}}, "not JSON"),
        ({"digest": "0" * 64}, "digest"),
    ],
)
def test_a_wrong_header_is_not_written(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ArtefactError, match=says):
        write(tmp_path / "a", tensors_of("client"), replace(header_of("client"), **change))
    assert list(tmp_path.iterdir()) == []


def test_wrong_tensors_are_not_written(tmp_path: Path) -> None:
    stored = {**tensors_of("client"), "linear.bias": NAN}
    with pytest.raises(ArtefactError, match="not finite"):
        write(tmp_path / "a", stored, header_of("client", stored))
    with pytest.raises(ArtefactError, match="too many"):
        write(tmp_path / "a", {**stored, "more": NAN}, header_of("client"))
    assert list(tmp_path.iterdir()) == []


def test_the_place_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        write(tmp_path, tensors_of("client"), header_of("client"))


# The digest


def test_digest_sees_names_dtypes_shapes_and_bytes() -> None:
    base = {"a": torch.arange(6.0), "b": torch.ones(2)}
    others: list[Tensors] = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].reshape(2, 3), "b": base["b"]},
        {"a": base["a"].reshape(3, 2), "b": base["b"]},
        {"a": base["a"].to(torch.float64), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"a": base["a"] + 1e-6, "b": base["b"]},
        {"a": base["a"]},
        {"a": torch.cat([base["a"], base["b"]])},
        {"a": base["a"].half(), "b": base["b"]},
        {"a": base["a"].bfloat16(), "b": base["b"]},
        {},
    ]
    assert len({digest_of(tensors) for tensors in [base, *others]}) == 1 + len(others)


def test_digest_sees_nothing_else() -> None:
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(True)}
    strided = torch.arange(6.0).reshape(2, 3).t().contiguous().t().requires_grad_()
    assert digest_of({"b": base["b"], "a": strided}) == digest_of(base)
    assert len(digest_of(base)) == 64
