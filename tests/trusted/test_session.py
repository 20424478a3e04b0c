"""Blocks that stand still leave once; what moves leaves anew, under fresh noise; both are counted."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sfumato.core.errors import AlphaError, RequestError
from sfumato.core.obfuscator import Shape
from sfumato.tasks.classification import Classification
from sfumato.trusted.noise import Fresh, Keyed
from sfumato.trusted.protect import Protected
from sfumato.trusted.session import STILL, Session, _positions
from tests.trusted.test_fused import obfuscator

SHAPE = Shape(channels=6, k=5, bound=2.0, c_ref=7.5, context=4, block=4)
SIDE = 16  # sites; 16 blocks


class Direct(Protected):
    """Frames [C, h, w] are taken for the head's output."""

    def cut(self, records: object) -> Tensor:
        assert isinstance(records, list)
        return torch.from_numpy(np.stack(records)).float()


@pytest.fixture
def session() -> Session:
    return Session(Direct(nn.Identity(), obfuscator(SHAPE), Classification(), "ab" * 32), 0.5)


def scene(seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((6, SIDE, SIDE)).astype(np.float32)


def test_a_still_scene_leaves_once(session: Session) -> None:
    frame, draw = scene(), np.random.default_rng(1)
    first = session(frame)
    assert session.refreshed == session.blocks == 16
    for _ in range(50):  # a sensor's own noise does not refresh
        again = session(frame + 1e-3 * draw.standard_normal(frame.shape).astype(np.float32))
        assert torch.equal(again.tensor, first.tensor) and session.refreshed == 0
    capacity = 16 * 16 * float(session.protected.obfuscator.bits_per_site(0.5)[0])
    assert first.bits.item() == pytest.approx(capacity + math.log2(17), rel=1e-5)
    assert session.bits == pytest.approx(capacity + _positions(16 * 51, 16), rel=1e-5)
    assert session.bits < 2.5 * capacity  # 51 releases would be 51 times as much


def test_only_what_moved_is_sent_anew_and_under_fresh_noise(session: Session) -> None:
    frame = scene()
    before = session(frame).tensor
    moved = frame.copy()
    moved[:, :2, :2] = 3 * scene(1)[:, :2, :2]
    after = session(moved).tensor
    assert 1 <= session.refreshed < 16
    same = (after == before).all(1)[0]
    assert not bool(same[0, 0]) and int((~same).sum()) == session.refreshed and bool(same[3, 3])
    back = session(frame).tensor  # what comes back comes back under other noise
    assert not torch.equal(back[0, :, 0, 0], before[0, :, 0, 0])


def test_what_is_repeated_is_near_what_would_have_been_sent(session: Session) -> None:
    frame, draw = scene(), np.random.default_rng(1)
    session(frame)
    for _ in range(20):
        frame = frame + 0.02 * draw.standard_normal(frame.shape).astype(np.float32)
        session(frame)
        assert session._reference is not None
        apart = (session._fused.signal(torch.from_numpy(frame)[None]) - session._reference) / session._fused.per_code
        assert float(apart.square().mean(3).max()) <= STILL


def test_a_scene_that_always_moves_is_counted_in_full(session: Session) -> None:
    total = sum(float(session(scene(seed)).bits[0]) for seed in range(5))
    capacity = 16 * 16 * float(session.protected.obfuscator.bits_per_site(0.5)[0])
    assert total == pytest.approx(session.bits, rel=1e-5) and session.bits >= 5 * capacity


def test_its_releases_are_those_of_the_obfuscator(session: Session) -> None:
    release, plain = session(scene()), session.protected.obfuscate(torch.from_numpy(scene())[None], 0.5)
    assert release.tensor.shape == plain.tensor.shape and release.sites == plain.sites
    assert (release.digest, release.block, release.ndim) == (plain.digest, plain.block, plain.ndim)
    assert torch.equal(release.alpha, plain.alpha)


def test_a_frame_of_another_size_begins_anew(session: Session) -> None:
    session(scene())
    session(scene()[:, :8])
    assert session.refreshed == session.blocks == 8


def test_what_is_no_number_is_refreshed_not_repeated(session: Session) -> None:
    frame = scene()
    session(frame)
    frame[0, 0, 0] = np.nan
    session(frame)
    assert session._reference is not None and bool(torch.isfinite(session._reference).all())


def test_a_release_handed_out_is_not_what_is_repeated_from(session: Session) -> None:
    first = session(scene())
    kept = first.tensor.clone()
    with torch.inference_mode():
        first.tensor.zero_()
    assert torch.equal(session(scene()).tensor, kept)


def test_keyed_noise_and_wrong_alphas_are_refused() -> None:
    keyed = Direct(nn.Identity(), obfuscator(SHAPE), Classification(), "ab" * 32, noise=Keyed(bytes(32)))
    with pytest.raises(RequestError):
        Session(keyed)
    with pytest.raises(AlphaError):
        Session(keyed.with_noise(Fresh()), 1.5)


def test_positions_count_the_ways() -> None:
    assert _positions(5, 2) == pytest.approx(math.log2(10) + math.log2(6))
    assert _positions(7, 0) == pytest.approx(3) and _positions(7, 7) == pytest.approx(3)
