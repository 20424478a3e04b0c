"""Each transform is what its name says; a channel that shows the picture is found, chosen on training records only."""

from dataclasses import dataclass

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sfumato.attack import battery
from sfumato.attack.base import Attacker, Clean, Effort, Prey, Releases
from sfumato.attack.battery import Battery
from sfumato.core.obfuscator import Obfuscator, Shape
from sfumato.tasks.classification import Classification
from sfumato.trusted.protect import Protected

SIDE = 8
EFFORT = Effort(steps=0, tested=30)
TRAIN, TEST = np.arange(50), np.arange(50, 90)


def pictures(count: int = 90, seed: int = 0) -> np.ndarray:
    """Smooth ones, [n, 32, 32, 3]."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return np.stack([cv2.resize(one, (32, 32), interpolation=cv2.INTER_LINEAR) for one in coarse])


def prey(*channels: np.ndarray) -> Prey:
    """Channels [n, 8, 8] as head output."""
    z = np.stack(channels, 1).astype(np.float16)
    return Prey(z, pictures(), None, TRAIN, TEST)


def grey() -> np.ndarray:
    return battery.reduced(prey(np.zeros((90, SIDE, SIDE))), np.arange(90))


def noise(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((90, SIDE, SIDE))


def test_it_is_an_attacker_that_wants_a_picture() -> None:
    attacker: Attacker = Battery()
    assert attacker.missing(prey(noise())) is None
    assert "2 x 8 sites" in str(attacker.missing(prey(noise()[:, :2])))


def test_pictures_are_reduced_to_sites_by_area() -> None:
    shown = pictures()[3].astype(float) @ [0.114, 0.587, 0.299] / 255
    np.testing.assert_allclose(grey()[3], shown.reshape(8, 4, 8, 4).mean((1, 3)), atol=0.005)


def test_transforms_by_hand() -> None:
    p = np.arange(12, dtype=np.float32).reshape(3, 4)
    want = np.array([[2.5, 2.5, 4.5, 4.5], [2.5, 2.5, 4.5, 4.5], [8.5, 8.5, 10.5, 10.5]])
    np.testing.assert_allclose(battery.haar(p), want)
    np.testing.assert_allclose(battery.stretch(p), p / 11)
    np.testing.assert_allclose(battery.TRANSFORMS["gamma"](p), np.sqrt(p / 11), rtol=1e-6)
    assert battery.sobel(p)[1, 1] == pytest.approx(np.hypot(8 * 1, 8 * 4))  # 8 times the slope either way
    blurred = battery.TRANSFORMS["blur"](np.pad(np.ones((1, 1), np.float32), 4))
    assert blurred[4, 4] == pytest.approx(1 / (2 * np.pi), rel=0.02) and blurred.sum() == pytest.approx(1, rel=1e-3)
    flat = np.full((4, 4), 2.0, np.float32)
    assert all(np.isfinite(transform(flat)).all() for transform in battery.TRANSFORMS.values())


def test_the_line_is_least_squares() -> None:
    known = grey()[:50]
    y = (3 * known - noise()[:50]).astype(np.float32)
    line = battery._line(0, "identity", y, known)
    slope, offset = np.polyfit(y.ravel().astype(float), known.ravel(), 1)
    assert (line.slope, line.offset) == pytest.approx((slope, offset), rel=1e-6)
    assert line.error == pytest.approx(np.mean((slope * y + offset - known) ** 2), rel=1e-6)


@pytest.mark.parametrize("scale", [3.0, -0.5])
def test_a_channel_that_shows_the_picture_is_found(scale: float) -> None:
    shown = scale * grey() + 0.02 * noise(2) + 7
    found = Battery().attack(prey(noise(), shown, noise(3)), Clean(), EFFORT)
    assert found.figures["psnr"] > found.anchors["psnr"] + 8 and found.figures["ssim"] > 0.8
    assert found.pictures is not None and found.pictures.shape == (battery.SHOWN, SIDE, SIDE)
    np.testing.assert_allclose(found.pictures / 255, grey()[TEST[: battery.SHOWN]], atol=0.25)


def test_a_picture_that_only_a_transform_shows_is_found_through_it() -> None:
    """Its own contrast in every record, so that one line fits none but the stretched ones."""
    each = np.random.default_rng(4).uniform(0.01, 100, (90, 1, 1))
    stretched = np.stack([battery.stretch(one) for one in grey()])
    y = np.stack([noise(), each * stretched], 1).astype(np.float32)[:50]
    closest, _ = battery.chosen(y, stretched[:50])
    assert (closest.channel, closest.transform) == (1, "stretch") and closest.error < 1e-6


def test_without_information_it_does_no_better_than_the_mean_picture() -> None:
    found = Battery().attack(prey(noise(), noise(2), noise(3)), Clean(), EFFORT)
    assert found.figures["psnr"] < found.anchors["psnr"] + 0.3
    assert found.figures["ssim"] < 0.2


def test_the_choice_is_made_on_training_records() -> None:
    """Channel 0 shows test pictures only, channel 1 training pictures only: the second is chosen, and fails."""
    known = np.isin(np.arange(90), TRAIN)[:, None, None]
    shown, other = grey(), noise()
    found = Battery().attack(prey(np.where(known, other, shown), np.where(known, shown, other)), Clean(), EFFORT)
    assert found.figures["psnr"] < found.anchors["psnr"]


def test_psnr_and_ssim_by_hand() -> None:
    truth = grey()[:5]
    assert battery.psnr(truth + np.float32(0.1), truth) == pytest.approx(20, abs=1e-4)
    assert battery.ssim(truth, truth) == pytest.approx(1)
    assert battery.ssim(truth[:, :4, :3], truth[:, :4, :3]) == pytest.approx(1)  # a window that fits


@dataclass(frozen=True)
class Shouting:
    """A tap whose second channel counts ten times as much."""

    name: str = "shouting"
    alpha: float | None = None

    def see(self, z: Tensor) -> Tensor:
        return z * torch.tensor([1.0, 10.0])[:, None, None]

    def expected(self, z: Tensor) -> Tensor:
        return self.see(z)


def test_the_mean_of_channels_is_the_last_one() -> None:
    made = prey(noise(), noise(2))
    y = battery.seen(made, Shouting(), TRAIN)
    assert y.shape == (50, 3, SIDE, SIDE)
    np.testing.assert_allclose(y[:, 2], (y[:, 0] + y[:, 1]) / 2, atol=1e-5)


def test_of_releases_it_is_weighted_by_bits() -> None:
    obfuscator = Obfuscator(Shape(channels=2, k=2, context=2, c_ref=6))
    obfuscator.allocation.w.data.copy_(torch.tensor([0.0, 1.0]))
    sender = Protected(nn.Identity(), obfuscator, Classification(), "ab" * 32)
    y = battery.seen(prey(noise(), noise(2)), Releases(sender, 0.5), TRAIN)
    g = obfuscator.allocation(torch.tensor([0.5]))[0].detach().numpy()
    assert g[1] > 1.5 * g[0] > 0
    np.testing.assert_allclose(y[:, 2], (g[0] * y[:, 0] + g[1] * y[:, 1]) / g.sum(), atol=1e-4)


def test_releases_with_bits_to_spare_show_the_picture_and_others_do_not() -> None:
    obfuscator = Obfuscator(Shape(channels=2, k=2, context=2, c_ref=16))
    with torch.no_grad():
        obfuscator.linear.weight.copy_(torch.eye(2)[:, :, None, None])
        for parameter in [*obfuscator.context.parameters(), obfuscator.linear.bias]:
            assert parameter is not None
            parameter.zero_()
    sender = Protected(nn.Identity(), obfuscator, Classification(), "ab" * 32)
    made = prey(4 * grey() - 2, noise())
    low, high = (Battery().attack(made, Releases(sender, alpha), EFFORT) for alpha in (0.0, 0.99))
    assert low.figures["psnr"] > low.anchors["psnr"] + 8 and low.alpha == 0
    assert high.figures["psnr"] < high.anchors["psnr"] + 0.7
