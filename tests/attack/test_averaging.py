"""Averages of releases: under fresh noise they tell more, under keyed noise nothing."""

import torch

from sfumato.attack.averaging import Averaging
from sfumato.attack.base import Effort, Releases
from sfumato.trusted.noise import Keyed
from tests.attack.prey import prey, protected

EFFORT = Effort(steps=8, batch=8, tested=16, quiet=True)


def test_under_keyed_noise_sixty_four_releases_are_one() -> None:
    guarded = protected(c_ref=6.0).with_noise(Keyed(bytes(range(32))))
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Releases(guarded, 0.5, 64).see(z), Releases(guarded, 0.5).see(z))
    found = Averaging((1, 4, 64)).attack(prey(guarded, 120), Releases(guarded, 0.5), EFFORT)
    assert found.figures["psnr of 1"] == found.figures["psnr of 4"] == found.figures["psnr of 64"]


def test_under_fresh_noise_sixty_four_tell_more_than_one() -> None:
    guarded = protected(c_ref=6.0)
    found = Averaging((1, 64)).attack(prey(guarded, 120), Releases(guarded, 0.5), EFFORT)
    assert found.figures["psnr of 64"] > found.figures["psnr of 1"] + 0.5
