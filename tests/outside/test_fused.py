"""The fused restorer gives what the restorer's definition says, for any size, block and alpha."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sfumato.core import channel
from sfumato.core.errors import ReleaseError
from sfumato.core.obfuscator import Shape
from sfumato.core.release import Release
from sfumato.core.restorer import Restorer
from sfumato.outside.fused import Fused
from sfumato.outside.model import Outside

ALONE = Shape(channels=6, k=5, bound=2.0, c_ref=7.5, context=4)
BLOCKS = Shape(channels=6, k=5, bound=2.0, c_ref=7.5, context=4, block=3)
steady = settings(derandomize=True, deadline=None, max_examples=60)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def restorer(shape: Shape, seed: int = 0) -> Restorer:
    made = Restorer(shape).eval().requires_grad_(False)
    for number, tensor in enumerate(made.state_dict().values()):
        tensor.copy_(0.3 * random(*tensor.shape, seed=seed + number))
    return made


def sent(shape: Shape, n: int, alpha: float, size: tuple[int, int], made: Restorer, seed: int = 0) -> Tensor:
    """Codes as they leave: 0 where there are no bits."""
    codes = (40 * random(n, *shape.codes(size), seed=seed)).round().clamp(-127, 127)
    bits = made.allocation(channel.as_alpha(alpha, n))[:, :, None, None]
    return torch.where(bits > 0, codes, 0).to(torch.int8)


@steady
@given(
    shape=st.sampled_from([ALONE, BLOCKS]), n=st.integers(1, 3), alpha=st.floats(0, 0.999), seed=st.integers(0, 99),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)), last=st.booleans(),
)  # fmt: skip
def test_it_gives_what_the_restorer_gives(
    shape: Shape, n: int, alpha: float, seed: int, size: tuple[int, int], last: bool
) -> None:
    made = restorer(shape, seed)
    codes = sent(shape, n, alpha, size, made, seed)
    z = Fused(made, alpha)(codes.contiguous(memory_format=torch.channels_last) if last else codes, size)
    want = made.restore(codes, channel.as_alpha(alpha, n), size)
    assert z.shape == (n, 6, *size)
    torch.testing.assert_close(z, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def test_the_outside_treats_every_record_by_its_own_alpha() -> None:
    made, alphas = restorer(BLOCKS), [0.2, 0.9, 0.2]
    outside = Outside(made, nn.Identity(), "ab" * 32)
    codes = torch.cat([sent(BLOCKS, 1, alpha, (5, 7), made, seed) for seed, alpha in enumerate(alphas)])
    release = Release(codes, torch.tensor(alphas), "ab" * 32, torch.zeros(3), 4, 3, (5, 7))
    want = made.restore(codes, torch.tensor(alphas), (5, 7))
    torch.testing.assert_close(outside(release), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("n", "sites"), [(1, (3000, 3000)), (65, (2, 2))])
def test_few_bytes_do_not_make_much_work(n: int, sites: tuple[int, int]) -> None:
    codes = torch.zeros(n, 5, 1, 1, dtype=torch.int8).expand(n, 5, *sites)
    release = Release(codes, torch.linspace(0, 0.9, n), "ab" * 32, torch.zeros(n), 4, 1, sites)
    with pytest.raises(ReleaseError, match="must not make much work"):
        Outside(restorer(ALONE), nn.Identity(), "ab" * 32)(release)


def test_many_alphas_do_not_fill_the_memory() -> None:
    made = restorer(ALONE)
    outside = Outside(made, nn.Identity(), "ab" * 32)
    for alpha in torch.linspace(0, 0.9, 200).tolist():
        codes = sent(ALONE, 1, alpha, (2, 2), made)
        outside(Release(codes, torch.tensor([alpha]), "ab" * 32, torch.zeros(1)))
    assert 1 <= len(outside._fused) <= 64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu() -> None:
    made = restorer(BLOCKS)
    codes = sent(BLOCKS, 2, 0.5, (30, 30), made)
    here, there = Fused(made, 0.5)(codes, (30, 30)), Fused(restorer(BLOCKS).cuda(), 0.5)(codes.cuda(), (30, 30)).cpu()
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-3)
