import numpy as np
import pytest
import torch

from sfumato.core.obfuscator import Obfuscator, Shape
from sfumato.core.restorer import Restorer
from sfumato.learn.start import _shares, initialise, sqrt_psd, water_filling


def test_square_root_of_a_matrix() -> None:
    torch.manual_seed(0)
    a = torch.randn(6, 6, dtype=torch.float64)
    a = a @ a.T
    root = sqrt_psd(a)
    assert torch.allclose(root @ root, a)


def test_shares_are_reverse_water_filling() -> None:
    # theta = 1/2 at 6 bits for variances 32, 8, 2: 1/2 log2 of 64, 16, 4 is 3, 2, 1 bits; .25 is under water
    assert _shares(np.array([32.0, 8.0, 2.0, 0.25]), 6.0).tolist() == pytest.approx([0.5, 1 / 3, 1 / 6, 0.0], abs=1e-6)


def test_fewer_channels_share_the_bits_as_alpha_rises() -> None:
    w, v = water_filling(np.geomspace(100, 0.01, 12), 12, 32.0)
    shares = [np.exp(w + a * v) / np.exp(w + a * v).sum() for a in (0.0, 0.95)]
    assert shares[1][0] > 2 * shares[0][0]
    assert w.sum() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("channels", [8, 24])
def test_start_restores_what_the_task_reads(channels: int) -> None:
    torch.manual_seed(0)
    shape = Shape(channels=channels, k=16, c_ref=96.0, context=4)
    obfuscator, restorer = Obfuscator(shape), Restorer(shape)
    mix = torch.randn(channels, 6)
    z = torch.einsum("cf,nfhw->nchw", mix, torch.randn(4, 6, 8, 8)) + 3.0
    initialise(obfuscator, restorer, z, torch.randn_like(z))
    alpha = torch.zeros(4)
    with torch.no_grad():
        y = obfuscator(z, alpha, torch.randn(4, 16, 8, 8))
        restored = restorer(y, alpha)
        spread = float(obfuscator.linear((z - obfuscator.mean[:, None, None]) / obfuscator.std[:, None, None]).std())
    error = (restored - z).square().mean() / z.var()
    assert float(error) < 0.05, "six factors fit into sixteen channels of six bits"
    assert 0.2 < spread < 0.7, "the signal neither saturates nor drowns"
