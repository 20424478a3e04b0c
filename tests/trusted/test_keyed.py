"""Keyed noise: one record, one release; near-duplicates share half of it; nothing else shares any."""

import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from skimage import data
from torch import nn

from sfumato.core.errors import RequestError
from sfumato.core.obfuscator import Shape
from sfumato.tasks.classification import Classification
from sfumato.trusted import record
from sfumato.trusted.noise import Keyed
from sfumato.trusted.protect import Protected
from tests.trusted.test_fused import obfuscator

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
DIGEST = "ab" * 32
PHOTOGRAPHS = ["astronaut", "chelsea", "coffee", "rocket"]
steady = settings(derandomize=True, deadline=None, max_examples=60)


def photograph(name: str = "astronaut") -> NDArray[np.uint8]:
    return np.asarray(getattr(data, name)()[:, :, ::-1], np.uint8)


def noise(
    picture: NDArray[np.uint8], count: int = 20_000, key: bytes = KEY, epoch: int = 0, artefact: str = DIGEST,
    alpha: float = 0.8,
) -> NDArray[np.float32]:  # fmt: skip
    eps: NDArray[np.float32] = Keyed(key, epoch).of(picture, artefact, alpha).normals(1, (count,))[0].numpy()
    return eps


def again(picture: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    coded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)


def test_the_same_record_gives_the_same_noise_and_a_known_one() -> None:
    picture = photograph()
    assert np.array_equal(noise(picture), noise(picture.copy()))
    flat = np.full((8, 8, 3), 100, np.uint8)
    np.testing.assert_allclose(noise(flat, 3), KNOWN, atol=1e-4)  # what leaves must not change with a version unseen


KNOWN = (0.270315, -1.433879, 0.111574)


@pytest.mark.parametrize(
    "other",
    [{"key": OTHER}, {"epoch": 1}, {"artefact": "cd" * 32}, {"alpha": 0.7999}],
    ids=["key", "epoch", "artefact", "alpha"],
)
def test_another_key_epoch_artefact_or_alpha_is_other_noise(other: dict[str, object]) -> None:
    picture = photograph()
    one, two = noise(picture), noise(picture, **other)  # type: ignore[arg-type]
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / math.sqrt(20_000)


def test_other_shapes_are_other_noise() -> None:
    source = Keyed(KEY).of(photograph(), DIGEST, 0.8)
    one, two = (source.normals(1, shape).flatten().numpy() for shape in ((100, 200), (200, 100)))
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / math.sqrt(20_000)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_it_is_standard_normal(name: str) -> None:
    eps = noise(photograph(name), 200_000)
    assert stats.kstest(eps, "norm").pvalue > 1e-3
    assert abs(eps.mean()) < 5 / math.sqrt(len(eps)) and abs(eps.var() - 1) < 5 * math.sqrt(2 / len(eps))
    assert abs(np.corrcoef(eps[::2], eps[1::2])[0, 1]) < 5 / math.sqrt(len(eps) / 2)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_near_duplicates_share_half_of_it(name: str) -> None:
    picture = photograph(name)
    flipped = picture.copy()
    flipped[7, 9, 1] ^= 1
    for near in (flipped, again(picture, 95)):
        assert record.coarse(near) == record.coarse(picture) and record.exact(near) != record.exact(picture)
        assert np.corrcoef(noise(picture), noise(near))[0, 1] == pytest.approx(0.5, abs=0.03)


def test_many_near_duplicates_are_worth_less_than_two_releases() -> None:
    picture, many = photograph(), 32
    drawn = []
    for place in range(many):
        near = picture.copy()
        near[place, 0, 0] ^= 1
        drawn.append(noise(near))
    variance = np.stack(drawn).mean(0).var()
    assert variance == pytest.approx((1 + (many - 1) / 2) / many, rel=0.05) and variance > 0.5


def test_photographs_have_coarse_codes_and_noise_of_their_own() -> None:
    pictures = [photograph(name) for name in PHOTOGRAPHS]
    assert len({record.coarse(picture) for picture in pictures}) == len(pictures)
    drawn = np.corrcoef([noise(picture) for picture in pictures])
    assert np.abs(drawn - np.eye(len(pictures))).max() < 5 / math.sqrt(20_000)


@steady
@given(seed=st.integers(0, 999), shape=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_what_is_no_picture_has_the_exact_code_alone(seed: int, shape: list[int]) -> None:
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    assert record.coarse(x) == record.exact(x) == record.exact(np.asfortranarray(x))
    assert record.exact(x) != record.exact(x.astype(np.float64)) != record.exact(x.reshape(-1, 1, 1, 1, 1))


def test_releases_repeat_to_the_byte_alone_and_in_any_batch() -> None:
    made = obfuscator(Shape(channels=6, k=5, bound=2.0, c_ref=7.5, context=4, block=3))
    sender = Protected(nn.Identity(), made, Classification(), DIGEST, noise=Keyed(KEY))
    z = torch.randn(3, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    together = sender.obfuscate(z, 0.5).tensor
    for i in range(3):
        assert torch.equal(sender.obfuscate(z[i : i + 1], 0.5).tensor[0], together[i])
    assert not torch.equal(together[0], together[1])
    named = sender.obfuscate(z[:1], 0.5, records=[photograph()]).tensor
    assert torch.equal(named, sender.obfuscate(z[:1], 0.5, records=[photograph()]).tensor)
    assert not torch.equal(named[0], together[0])


@pytest.mark.parametrize(("key", "epoch"), [(b"", 0), (bytes(31), 0), (bytes(33), 0), (KEY, -1)])
def test_a_wrong_key_or_epoch_is_refused(key: bytes, epoch: int) -> None:
    with pytest.raises(RequestError) as error:
        Keyed(key, epoch)
    assert error.value.wanted


def test_it_does_not_show_its_key_and_is_for_one_record() -> None:
    source = Keyed(KEY)
    assert KEY.hex() not in repr(source) and repr(KEY) not in repr(source.of(photograph(), DIGEST, 0.5))
    with pytest.raises(RequestError):
        source.of(photograph(), DIGEST, 0.5).normals(2, (3,))
    one, two = source.of(photograph(), DIGEST, 0.5), source.of(photograph("coffee"), DIGEST, 0.5)
    assert len(one.draw) == 16 and one.draw == source.of(photograph(), DIGEST, 0.5).draw != two.draw
