from dataclasses import replace

import numpy as np
import pytest

from sfumato.attack.averaging import Averaging
from sfumato.attack.base import Clean, Releases
from sfumato.attack.inversion import Inversion
from sfumato.attack.reconstruction import Reconstruction, score
from tests.attack.prey import CAPACITIES, EFFORT, SIDE, prey, protected


def test_score_is_psnr_and_ssim() -> None:
    truth = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    assert score(truth, truth)["ssim"] == pytest.approx(1)
    moved = np.clip(truth.astype(int) + 10, 0, 255).astype(np.uint8)
    mse = [np.mean((a.astype(float) - b) ** 2) for a, b in zip(moved, truth, strict=True)]
    want = np.mean([10 * np.log10(255**2 / e) for e in mse])
    assert score(moved, truth)["psnr"] == pytest.approx(want, abs=1e-4)


def test_the_decoder_sees_through_the_clean_output_and_less_through_few_bits() -> None:
    guarded = protected(c_ref=6.0)
    hunted = prey(guarded)
    clean = Reconstruction(capacities=CAPACITIES).attack(hunted, Clean(), EFFORT)
    hidden = Reconstruction(capacities=CAPACITIES).attack(hunted, Releases(guarded, 0.95), EFFORT)
    assert clean.figures["psnr"] > clean.anchors["psnr"] + 4
    assert hidden.figures["psnr"] < clean.figures["psnr"] - 3
    assert clean.pictures is not None and clean.pictures.shape[1:] == (SIDE, SIDE, 3)
    assert len(clean.curve) > 3


def test_the_decoder_begins_with_the_best_line() -> None:
    """What is seen are the colours of patches, the picture is made of them: a line finds all, and one step keeps it."""
    guarded = protected()
    hunted = prey(guarded)
    one_step = replace(EFFORT, steps=1, batch=1)
    found = Reconstruction(capacities=CAPACITIES).attack(hunted, Clean(), one_step)
    assert found.curve[0] > 40, "a straight line from patch colours to pixels, in closed form"
    assert found.figures["psnr"] > 38, "and what a step of training spoils is not kept"
    nothing = Reconstruction(capacities=CAPACITIES).attack(hunted, Releases(guarded, 0.999), one_step)
    assert abs(nothing.curve[0] - nothing.anchors["psnr"]) < 1.5, "and of noise the best line is the mean picture"


def test_averaging_gains_with_every_release() -> None:
    guarded = protected(c_ref=6.0)
    hunted = prey(guarded)
    found = Averaging((1, 64), Reconstruction(capacities=CAPACITIES)).attack(hunted, Releases(guarded, 0.8), EFFORT)
    assert found.figures["psnr of 64"] > found.figures["psnr of 1"] + 0.5
    assert set(found.anchors) == set(found.figures)
    assert Averaging((1,)).attack(hunted, Clean(), EFFORT).figures == {}


def test_inversion_needs_no_pairs() -> None:
    guarded = protected()
    hunted = prey(guarded)
    found = Inversion(guarded, SIDE, records=3).attack(hunted, Releases(guarded, 0.0), EFFORT)
    blind = Inversion(guarded, SIDE, records=3).attack(hunted, Releases(guarded, 0.99), EFFORT)
    assert found.figures["psnr"] > found.anchors["psnr"] + 3
    assert found.figures["psnr"] > blind.figures["psnr"] + 2
    assert found.curve[-1] > found.curve[0]
    assert all(p.grad is None for p in guarded.obfuscator.parameters())
