import pytest
import torch

from sfumato.core.obfuscator import Obfuscator, Shape
from sfumato.core.restorer import Restorer
from sfumato.learn.start import initialise, sqrt_psd


def test_square_root_of_a_matrix() -> None:
    torch.manual_seed(0)
    a = torch.randn(6, 6, dtype=torch.float64)
    a = a @ a.T
    root = sqrt_psd(a)
    assert torch.allclose(root @ root, a)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("channels", [8, 24])
def test_start_restores_what_the_task_reads(channels: int, block: int) -> None:
    torch.manual_seed(0)
    shape = Shape(channels=channels, k=16, c_ref=96.0, context=4, block=block)
    obfuscator, restorer = Obfuscator(shape), Restorer(shape)
    mix = torch.randn(channels, 6)
    z = torch.einsum("cf,nfhw->nchw", mix, torch.randn(4, 6, 8, 8)) + 3.0
    initialise(obfuscator, restorer, z, torch.randn_like(z))
    alpha = torch.zeros(4)
    with torch.no_grad():
        y = obfuscator(z, alpha, torch.randn(4, *shape.codes((8, 8))))
        restored = restorer(y, alpha)
        spread = float(obfuscator.linear((z - obfuscator.mean[:, None, None]) / obfuscator.std[:, None, None]).std())
    error = (restored - z).square().mean() / z.var()
    assert float(error) < 0.05, "six factors fit into sixteen channels of six bits"
    assert 0.5 < spread < 1.2, "the signal neither saturates nor drowns"


def test_bits_follow_the_variances() -> None:
    torch.manual_seed(0)
    shape = Shape(channels=6, k=8, c_ref=12.0, context=4)
    obfuscator, restorer = Obfuscator(shape), Restorer(shape)
    deviation = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25])[:, None, None]
    z = torch.einsum("cf,nfhw->nchw", torch.linalg.qr(torch.randn(6, 6)).Q, deviation * torch.randn(8, 6, 32, 32))
    initialise(obfuscator, restorer, z, torch.randn_like(z))
    many, few = obfuscator.allocation(torch.tensor([0.0, 0.9])).detach()
    assert many[:6].diff().max() <= 0 and bool((many[:4] > 0).all()), "the stronger a channel, the more bits"
    assert int((few > 0).sum()) < int((many > 0).sum()), "with few bits the weak channels fall dry"
    assert many[6:].sum() == 0, "there are no more than six directions to send"


def test_a_smooth_picture_takes_fewer_bits_in_blocks() -> None:
    """At the same bits, what varies slowly from site to site comes back better when blocks are coded as one."""
    torch.manual_seed(0)
    noise = torch.randn(6, 6, 24, 24)
    z = torch.nn.functional.avg_pool2d(noise, 9, 1, 4)
    errors = []
    for block in (1, 8):
        shape = Shape(channels=6, k=6, c_ref=12.0, context=4, block=block)
        obfuscator, restorer = Obfuscator(shape), Restorer(shape)
        initialise(obfuscator, restorer, z, torch.randn_like(z))
        alpha = torch.full((6,), 0.5)
        with torch.no_grad():
            restored = restorer(obfuscator(z, alpha, torch.randn(6, *shape.codes((24, 24)))), alpha, (24, 24))
        errors.append(float((restored - z).square().mean() / z.var()))
    assert errors[1] < 0.6 * errors[0]
