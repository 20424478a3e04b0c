import numpy as np
import pytest
import torch
from torch import nn

from sfumato.core.errors import AlphaError, ImageError, ReleaseError
from sfumato.core.obfuscator import Obfuscator, Shape
from sfumato.core.release import Release
from sfumato.core.restorer import Restorer
from sfumato.outside.model import Outside
from sfumato.tasks.classification import Classification
from sfumato.trusted.protect import Protected

DIGEST = "ab" * 32


def made(size: int = 3, block: int = 1) -> Protected:
    torch.manual_seed(0)
    shape = Shape(channels=6, k=5, context=4, block=block)
    head, tail = nn.Conv2d(3, 6, 4, 4), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, size))
    outside = Outside(Restorer(shape), tail, DIGEST)
    return Protected(head.eval(), Obfuscator(shape), Classification(), DIGEST, outside=outside)


def picture(height: int = 16, width: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_one_line_gives_a_release_of_int8_codes() -> None:
    release = made()(picture(), alpha=0.8)
    assert isinstance(release, Release)
    assert release.tensor.dtype is torch.int8
    assert release.tensor.shape == (1, 5, 4, 6)
    assert float(release.bits[0]) == pytest.approx(0.2 * 64 * 24, rel=1e-4)


def test_every_release_of_a_record_has_noise_of_its_own() -> None:
    protected = made()
    one, two = protected(picture(), alpha=0.9), protected(picture(), alpha=0.9)
    assert not torch.equal(one.tensor, two.tensor)
    both = protected([picture(), picture()], alpha=0.9)
    assert not torch.equal(both.tensor[0], both.tensor[1])


def test_one_alpha_a_record() -> None:
    release = made()([picture(), picture()], alpha=[0.1, 0.9])
    assert release.alpha.tolist() == pytest.approx([0.1, 0.9])
    assert float(release.bits[0] / release.bits[1]) == pytest.approx(9.0, rel=1e-3)


@pytest.mark.parametrize("alpha", [1.0, -0.1, float("nan"), [0.1, 0.2, 0.3]])
def test_wrong_alpha_is_refused_before_anything_is_computed(alpha: float | list[float]) -> None:
    protected = made()
    protected.head = nn.Module()  # would fail if called
    with pytest.raises(AlphaError):
        protected([picture(), picture()], alpha=alpha)


def test_records_of_two_sizes_are_refused() -> None:
    with pytest.raises(ImageError, match="several input sizes"):
        made()([picture(), picture(20, 20)], alpha=0.5)


def test_the_outside_answers_only_its_own_obfuscator() -> None:
    protected = made()
    release = protected(picture(), alpha=0.5)
    assert protected.outside is not None
    result = protected.postprocess(protected.outside(release))
    assert result.probabilities.sum() == pytest.approx(1.0, abs=1e-5)
    foreign = Release(release.tensor, release.alpha, "cd" * 32, release.bits)
    with pytest.raises(ReleaseError, match="of obfuscator cdcd"):
        protected.outside(foreign)
    clean = Release(protected.cut([picture()]), release.alpha, DIGEST, release.bits)
    with pytest.raises(ReleaseError, match="int8"):
        protected.outside(clean)


def test_sites_that_fill_no_whole_block_count_whole() -> None:
    protected = made(block=4)
    release = protected(picture(20, 24), alpha=0.8)  # 5 x 6 sites in 2 x 2 blocks of 16
    assert release.tensor.shape == (1, 80, 2, 2) and release.sites == (5, 6)
    assert float(release.bits[0]) == pytest.approx(0.2 * 64 * 64, rel=1e-4)
    assert protected.outside is not None
    protected.outside(release)
    other = Release(release.tensor, release.alpha, DIGEST, release.bits, block=2, sites=(4, 4))
    with pytest.raises(ReleaseError, match=r"for \[4, 4\] sites"):
        protected.outside(other)


@pytest.mark.parametrize("block", [1, 4])
def test_the_release_survives_the_wire(block: int) -> None:
    protected = made(block=block)
    release = protected(picture(), alpha=0.5)
    assert protected.outside is not None
    there = Release.from_bytes(release.to_bytes())
    assert torch.equal(protected.outside(release), protected.outside(there))
