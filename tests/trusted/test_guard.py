"""Nothing leaves but what the guard made and entered: ten thousand other things are tried on a server that records."""

import copy
import dataclasses
import gc
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from sfumato.core.errors import (
    AlphaError,
    GuardError,
    LedgerError,
    PolicyError,
    RequestError,
    ServerError,
    SfumatoError,
)
from sfumato.core.obfuscator import Shape
from sfumato.core.release import Release
from sfumato.tasks.classification import Classification
from sfumato.trusted import record
from sfumato.trusted.client import Client
from sfumato.trusted.guard import Guard
from sfumato.trusted.ledger import Ledger, Policy
from sfumato.trusted.noise import Fresh, Keyed
from sfumato.trusted.protect import Protected
from tests.trusted.recorder import Recorder, recording, released
from tests.trusted.test_fused import obfuscator

SHAPE = Shape(channels=3, k=5, bound=2.0, c_ref=7.5, context=4, block=3)
KEY, DIGEST, SIDE = bytes(range(32)), "ab" * 32, 12
TRIED = 10_000


@dataclasses.dataclass(frozen=True)
class Pictures(Classification):
    """Pictures go in as they are."""

    def preprocess(self, record: NDArray[np.uint8]) -> torch.Tensor:
        return torch.from_numpy(record).permute(2, 0, 1).float() / 255


def protected(noise: Fresh | Keyed | None = None, digest: str = DIGEST) -> Protected:
    return Protected(nn.Identity(), obfuscator(SHAPE), Pictures(), digest, noise=noise)


def guard(
    place: Path, policy: Policy | None = None, noise: Fresh | Keyed | None = None, task: Classification | None = None
) -> Guard:
    made = protected(noise)
    made.task = task or made.task
    return Guard(made, Ledger(place / "ledger.db", policy or Policy()), KEY)


def picture(seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with recording() as server:
        yield server


def client(server: Recorder, door: Guard) -> Client:
    return Client(server.url, door, retries=0)


def test_a_release_arrives_code_for_code(tmp_path: Path, recorder: Recorder) -> None:
    door = guard(tmp_path)
    release = door([picture(0), picture(1)], [0.2, 0.8])
    assert client(recorder, door)(release)[0].tolist() == [[0.5, 0.5]] * 2
    got = [released(recorder, n, SHAPE.sent, SHAPE.block) for n in range(len(recorder.bodies))]
    assert torch.equal(torch.cat([one.tensor for one in got]), release.tensor)
    assert torch.equal(torch.cat([one.alpha for one in got]), release.alpha)
    assert {(one.digest, one.sites) for one in got} == {(DIGEST, release.sites)}
    assert door.ledger.totals().releases == 2


def things(door: Guard, made: list[Release]) -> st.SearchStrategy[Any]:
    """What somebody might send by mistake or on purpose."""
    head = torch.rand(1, 3, SIDE, SIDE)
    honest, foreign = made[0], protected(digest=DIGEST).obfuscate(head)

    def changed(field: str, value: Any) -> Release:
        one = dataclasses.replace(honest, **{field: value})
        return one

    def by_hand(seed: int) -> Release:
        codes = torch.randint(-127, 128, honest.tensor.shape, generator=torch.Generator().manual_seed(seed))
        return Release(codes.to(torch.int8), honest.alpha, DIGEST, honest.bits, 4, SHAPE.block, honest.sites)

    class Disguised(Release):
        pass

    fields = {f.name: getattr(honest, f.name) for f in dataclasses.fields(Release)}
    tensors = st.tuples(st.sampled_from([torch.float32, torch.float16, torch.int8, torch.uint8]), st.integers(0, 99))
    return st.one_of(
        st.integers(0, 99).map(picture),
        st.integers(0, 99).map(lambda n: picture(n)[::2]),
        st.integers(0, 99).map(lambda n: [picture(n)]),
        tensors.map(lambda t: (torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(t[1])) * 9).to(t[0])),
        st.sampled_from([head, head[:, :1], head.transpose(2, 3), head.numpy(), head.half(), honest.tensor]),
        st.sampled_from([honest.tensor[:], honest.tensor.clone(), honest.to_bytes(), foreign, fields]),
        st.integers(0, 9999).map(by_hand),
        st.builds(lambda n: changed("digest", f"{n:064x}"), st.integers(0, 2**32)),
        st.builds(lambda a: changed("alpha", torch.tensor([a])), st.floats(0, 0.99)),
        st.builds(lambda n: changed("ndim", n), st.integers(2, 4)),
        st.sampled_from([copy.copy(honest), copy.deepcopy(honest), pickle.loads(pickle.dumps(honest))]),
        st.just(Disguised(**fields)),
        st.sampled_from(
            [Release.from_bytes(honest.to_bytes()), door, door.protected, door.ledger, None, "picture.jpg"]
        ),
        st.binary(max_size=200),
        st.dictionaries(st.text(max_size=5), st.floats(), max_size=3),
        st.recursive(st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3), max_leaves=5),
    )


def test_ten_thousand_other_things_do_not_leave(tmp_path: Path, recorder: Recorder) -> None:
    door = guard(tmp_path)
    link, made, tried = client(recorder, door), [door(picture())], []

    @settings(derandomize=True, deadline=None, max_examples=TRIED // 10, database=None)
    @given(batch=st.lists(things(door, made), min_size=10, max_size=10))
    def refused(batch: list[Any]) -> None:
        for thing in batch:
            tried.append(type(thing))
            with pytest.raises(GuardError):
                link(thing)
            with pytest.raises(GuardError):
                door.open(thing)

    refused()
    assert len(tried) >= TRIED and len(set(tried)) > 10
    assert recorder.bodies == [] and recorder.asked == []
    link(made[0])
    assert released(recorder, 0, SHAPE.sent, SHAPE.block).to_bytes() == made[0].to_bytes()


@pytest.mark.parametrize("field", ["tensor", "alpha", "digest", "sites", "ndim"])
def test_a_release_that_was_changed_does_not_leave(tmp_path: Path, field: str) -> None:
    door = guard(tmp_path)
    release = door(picture())
    others = {"alpha": torch.tensor([0.1]), "digest": "cd" * 32, "sites": (SIDE, SIDE - 1), "ndim": 3}
    if field == "tensor":
        with torch.inference_mode():
            release.tensor[0, 0, 0, 0] += 1
    else:
        object.__setattr__(release, field, others[field])
    with pytest.raises(GuardError):
        door.open(release)


def test_another_guards_release_does_not_leave(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one, two = guard(tmp_path), guard(tmp_path / "other")
    with pytest.raises(GuardError):
        two.open(one(picture()))


def test_a_release_that_is_gone_frees_its_place_and_never_vouches_for_another(tmp_path: Path) -> None:
    door = guard(tmp_path)
    for seed in range(50):
        door(picture(seed))
    gc.collect()
    assert not door._made


def test_past_the_policy_nothing_is_released(tmp_path: Path) -> None:
    door = guard(tmp_path, Policy(max_releases=2, min_alpha=0.3))
    for _ in range(2):
        door(picture())
    with pytest.raises(LedgerError):
        door(picture())
    with pytest.raises(PolicyError):
        door([picture(1), picture()])  # one of them is past it: none leaves
    assert door.ledger.totals().records == 1
    with pytest.raises(LedgerError):
        door(picture(2), 0.2)
    with pytest.raises(AlphaError):
        door(picture(2), 1.0)


def test_bits_compose_as_the_noise_does(tmp_path: Path) -> None:
    shape = protected().obfuscator.shape
    sites = shape.coded((SIDE, SIDE))
    once = float(protected().obfuscator.bits_per_record(0.8, sites)[0])
    for noise, name in ((Fresh(), "fresh"), (Keyed(KEY), "keyed")):
        (tmp_path / name).mkdir()
        door = guard(tmp_path / name, noise=noise)
        for _ in range(4):
            door(picture())
        more = float(protected().obfuscator.bits_per_record(0.8, sites, releases=4)[0])
        assert door.ledger.totals().largest_bits == pytest.approx(once if name == "keyed" else more, rel=1e-4)
    near = np.kron(picture(), np.ones((4, 4, 1), np.uint8))
    (tmp_path / "near").mkdir()
    door = guard(tmp_path / "near", noise=Keyed(KEY))
    for place in range(4):  # near-duplicates: a bit of each is another
        other = near.copy()
        other[place, 0, 0] ^= 1
        door(other)
    found = door.ledger.totals()
    many = protected().obfuscator.bits_per_record(0.8, shape.coded(near.shape[:2]), releases=4 / 2.5)[0]
    assert found.records == 1 and found.largest_bits == pytest.approx(float(many), rel=1e-4)


def test_frames_of_a_still_scene_are_one_release_in_the_ledger(tmp_path: Path, recorder: Recorder) -> None:
    door = guard(tmp_path, Policy(max_bits_per_record=4000))
    frames, link = door.session("door", 0.8), client(recorder, door)
    for _ in range(20):
        link(frames(picture()))
    found = door.ledger.totals()
    assert (found.records, found.releases, len(recorder.bodies)) == (1, 20, 20)
    assert len(set(recorder.bodies)) == 1 and found.largest_bits < 2 * 16 * 9 * 7.5 * 0.2 + 100
    with pytest.raises(LedgerError):
        _ = [frames(picture(seed)) for seed in range(1, 99)]


def shared(one: Release, two: Release) -> float:
    """Correlation of two releases' codes where both send something."""
    a, b = one.tensor.flatten().double(), two.tensor.flatten().double()
    both = (a != 0) & (b != 0)
    return float(np.corrcoef(a[both], b[both])[0, 1])


@dataclasses.dataclass(frozen=True)
class Shown(Pictures):
    """Shows so many rows of a picture to the model, brighter or not."""

    rows: int = SIDE
    times: float = 1.0

    def preprocess(self, record: NDArray[np.uint8]) -> torch.Tensor:
        return super().preprocess(record)[:, : self.rows] * self.times


def test_keyed_noise_is_other_noise_where_the_signal_is_another(tmp_path: Path) -> None:
    tasks = (Shown(), Shown(rows=SIDE - 1), Shown(times=0.5))  # 12 and 11 rows of sites are 4 rows of blocks alike
    one, fewer, darker = (guard(tmp_path, noise=Keyed(KEY), task=task)(picture(), 0.95) for task in tasks)
    assert one.tensor.shape == fewer.tensor.shape
    assert max(abs(shared(one, fewer)), abs(shared(one, darker))) < 0.5
    again = guard(tmp_path, noise=Keyed(KEY), task=Shown())(picture(), 0.95)
    assert torch.equal(again.tensor, one.tensor)


def test_what_a_record_let_out_in_several_ways_adds_up_and_never_falls(tmp_path: Path) -> None:
    name = record.named(KEY, picture())
    before, sum_of = 0.0, 0.0
    keys: list[Fresh | Keyed] = [Fresh(), Keyed(KEY), Keyed(bytes(reversed(KEY))), Fresh()]
    for noise, task in zip(keys, (Shown(), Shown(), Shown(), Shown(rows=3)), strict=True):
        door = guard(tmp_path, noise=noise, task=task)
        release = door(picture())
        sum_of += float(release.bits[0])
        found = door.ledger.exposure(name)
        assert found.bits > before
        before = found.bits
    assert before == pytest.approx(sum_of, rel=1e-4)  # four independent releases
    guard(tmp_path, noise=Keyed(KEY), task=Shown())(picture())
    assert door.ledger.exposure(name).bits == pytest.approx(sum_of, rel=1e-4)  # one that had left already


def test_sessions_of_a_camera_add_up_and_of_two_do_not(tmp_path: Path) -> None:
    door = guard(tmp_path, noise=Keyed(KEY))  # sessions draw fresh noise all the same
    for _ in range(3):
        door.session("door")(picture())
    once = float(door.session("window")(picture()).bits[0])
    found = door.ledger.totals()
    assert (found.records, found.releases) == (2, 4)
    assert found.largest_bits == pytest.approx(3 * once, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.7, 0.8, 0.9, 0.95])
def test_the_least_alpha_of_a_policy_is_allowed(tmp_path: Path, alpha: float) -> None:
    guard(tmp_path, Policy(min_alpha=alpha))(picture(), alpha)


@pytest.mark.parametrize("status", [302, 500])
def test_a_server_that_does_not_answer_well_is_an_error(tmp_path: Path, recorder: Recorder, status: int) -> None:
    door = guard(tmp_path)
    recorder.statuses = [status]
    with pytest.raises(SfumatoError):
        client(recorder, door)(door(picture()))
    assert len(recorder.bodies) == 1  # no redirect was followed


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/x",
        "https://example.org:99999/x",
        "ftp://127.0.0.1/x",
        "file:///x",
        "127.0.0.1",
        "https:///",
        "https://example.org/x",
        "grpc://example.org:8001",
        "https://user:secret@example.org",
    ],
)
def test_addresses_that_would_show_the_release_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(RequestError):
        Client(url, guard(tmp_path))


def test_an_output_that_is_missing_is_an_error_too(tmp_path: Path, recorder: Recorder) -> None:
    door = guard(tmp_path)
    recorder.wrong = [{"name": "OUTPUT__7", "datatype": "FP32", "shape": [1, 2], "data": [0.5, 0.5]}]
    with pytest.raises(ServerError, match="for 1 records") as error:
        client(recorder, door)(door(picture()))
    assert error.value.status == "wrong"


def test_no_server_is_an_error_that_names_no_content(tmp_path: Path, recorder: Recorder) -> None:
    door = guard(tmp_path)
    link = client(recorder, door)
    recorder.shutdown()
    recorder.server_close()
    with pytest.raises(SfumatoError, match="cannot be reached"):
        link(door(picture()))


def test_a_short_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError):
        Guard(protected(), Ledger(tmp_path / "ledger.db"), b"short")
