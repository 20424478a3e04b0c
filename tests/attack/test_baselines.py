import numpy as np
import pytest
import torch

from sfumato.attack.baselines import PlainNoise, blurred, pixelated


def test_plain_noise_is_of_its_strength_on_standardised_outputs() -> None:
    std = torch.tensor([1.0, 10.0])
    z = torch.randn(8, 2, 16, 16) * std[:, None, None]
    tap = PlainNoise(0.5, std)
    rest = tap.see(z) - tap.expected(z)
    assert rest.std((0, 2, 3)).tolist() == pytest.approx([0.5, 0.5], rel=0.05)
    assert (tap.restored(z) - z).std((0, 2, 3)).tolist() == pytest.approx([0.5, 5.0], rel=0.05)


def test_blur_and_pixelation() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert blurred(picture, 0) is picture and pixelated(picture, 1) is picture
    assert blurred(picture, 3).std() < picture.std() / 2
    coarse = pixelated(picture, 8)
    assert len(np.unique(coarse.reshape(-1, 3), axis=0)) == 16 and coarse.shape == picture.shape
    assert pixelated(picture, 1000).std((0, 1)).max() == 0
