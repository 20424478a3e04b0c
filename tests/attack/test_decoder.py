from pathlib import Path

import numpy as np
import pytest

from sfumato.attack import decoder as attack
from sfumato.core.errors import ArtefactError
from sfumato.trusted.protect import Protected
from tests.attack.prey import DIGEST
from tests.attack.prey import protected as easy


@pytest.fixture(scope="module")
def protected() -> Protected:
    """A head that only averages 8x8 patches, and an obfuscator with bits to spare: easy prey."""
    return easy()


def photographs(count: int, seed: int) -> list[np.ndarray]:
    """Flat colours in halves: what an average over patches tells nearly whole."""
    draw = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        picture = np.empty((32, 32, 3), np.uint8)
        picture[:, :16], picture[:, 16:] = draw.integers(0, 256, (2, 3))
        pictures.append(picture)
    return pictures


@pytest.fixture(scope="module")
def trained(protected: Protected) -> attack.Decoder:
    return attack.train(protected, photographs(64, 1), steps=120, batch=8, highest=0.3, quiet=True)


def test_a_decoder_learns_where_there_is_something_to_learn(protected: Protected, trained: attack.Decoder) -> None:
    unseen = photographs(16, 2)
    low, high = (attack.score(protected, trained, unseen, alpha) for alpha in (0.05, 0.98))
    assert low["psnr"] > low["anchor_psnr"] + 3
    assert high["psnr"] < low["psnr"] - 2, "with two bits in a hundred left it must do worse"
    assert low["photographs"] == 16


def test_reconstruction_has_the_photographs_size(protected: Protected, trained: attack.Decoder) -> None:
    picture = trained.reconstruct(protected(photographs(1, 3)[0], alpha=0.1), (50, 70))
    assert picture.shape == (50, 70, 3)
    assert picture.dtype == np.uint8


def test_saved_it_gives_the_same_pictures_and_belongs_to_one_obfuscator(
    protected: Protected, trained: attack.Decoder, tmp_path: Path
) -> None:
    attack.save(trained, tmp_path / "decoder.safetensors", DIGEST)
    again = attack.load(tmp_path / "decoder.safetensors", protected)
    release = protected(photographs(1, 4)[0], alpha=0.1)
    one, two = (d.reconstruct(release, (32, 32)).astype(int) for d in (trained, again))
    assert np.abs(one - two).max() <= 2
    other = Protected(protected.head, protected.obfuscator, protected.task, "cd" * 32)
    with pytest.raises(ArtefactError, match="of obfuscator"):
        attack.load(tmp_path / "decoder.safetensors", other)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name in ("broken.safetensors", "none.safetensors"):
        with pytest.raises(ArtefactError, match="no decoder"):
            attack.load(tmp_path / name, protected)


def test_psnr_by_hand() -> None:
    # An error of 10 everywhere: 10 log10(255^2 / 100) = 28.13 dB
    a = np.full((4, 4, 3), 100, np.uint8)
    assert attack.psnr(a, a + 10) == pytest.approx(28.13, abs=0.01)
