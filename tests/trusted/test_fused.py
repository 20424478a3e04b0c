"""The fused step gives what the obfuscator's definition says, for any size, block and alpha."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sfumato.core import channel
from sfumato.core.obfuscator import Obfuscator, Shape
from sfumato.tasks.classification import Classification
from sfumato.trusted.fused import Fused
from sfumato.trusted.protect import Protected

ALONE = Shape(channels=6, k=5, bound=2.0, c_ref=7.5, context=4)
BLOCKS = Shape(channels=6, k=5, bound=2.0, c_ref=7.5, context=4, block=3)
steady = settings(derandomize=True, deadline=None, max_examples=60)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def obfuscator(shape: Shape, seed: int = 0) -> Obfuscator:
    """Learned-like: no weight at its starting value, and channels without bits at high alpha."""
    made = Obfuscator(shape).eval().requires_grad_(False)
    for number, tensor in enumerate(made.state_dict().values()):
        tensor.copy_(0.5 * random(*tensor.shape, seed=seed + number))
    made.std.abs_().add_(0.1)
    return made


class Given:
    """Normals from a seed, and what was asked for."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []

    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        self.drawn.append(random(records, *shape, seed=len(self.drawn)))
        return self.drawn[-1]


@steady
@given(
    shape=st.sampled_from([ALONE, BLOCKS]), n=st.integers(1, 3), alpha=st.floats(0, 0.999), seed=st.integers(0, 99),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)), last=st.booleans(),
)  # fmt: skip
def test_it_gives_the_codes_of_the_definition(
    shape: Shape, n: int, alpha: float, seed: int, size: tuple[int, int], last: bool
) -> None:
    made, source = obfuscator(shape, seed), Given()
    z = random(n, 6, *size, seed=seed)
    fused = Fused(made, alpha)
    codes = fused(z.contiguous(memory_format=torch.channels_last) if last else z, source.normals)
    a = channel.as_alpha(alpha, n)
    noise = torch.zeros(n, *shape.codes(size))
    noise[:, fused.carrying] = source.drawn[0].permute(0, 3, 1, 2)
    want = made.codes(z, a, noise)
    assert codes.dtype == torch.int8 and codes.shape == want.shape
    assert int((codes.int() - want.int()).abs().max()) <= 1 and float((codes != want).float().mean()) < 0.02
    assert fused.bits_per_site == pytest.approx(float(made.bits_per_site(alpha)[0]), rel=1e-5)


def test_as_many_normals_are_drawn_as_are_sent() -> None:
    made, source = obfuscator(BLOCKS), Given()
    codes = Fused(made, 0.9)(random(2, 6, 6, 9), source.normals)
    carrying = made.allocation.carrying(torch.tensor([0.9]))
    assert source.drawn[0].shape == (2, 2, 3, len(carrying)) and len(carrying) < BLOCKS.sent
    assert int(codes.ne(0).any(0).flatten(1).any(1).sum()) == len(carrying)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_leaves_no_mark(bad: float) -> None:
    made, source = obfuscator(BLOCKS), Given()
    z = random(1, 6, 8, 8)
    z[0, 3, 4, 4] = bad
    fused = Fused(made, 0.5)
    one, two = fused(z, source.normals), fused(z, source.normals)
    carrying = fused.carrying
    assert float((one != two)[:, carrying].float().mean()) > 0.9  # noise touches the codes
    most = made.shape.bound * channel.gain(made.allocation(torch.tensor([0.5])), made.shape.bound)[0, carrying]
    y = one[:, carrying] * made.allocation.steps(torch.tensor([0.5]))[:, carrying]
    assert bool((y - source.drawn[0].permute(0, 3, 1, 2)).abs().amax((0, 2, 3)).le(most + 0.1).all())


def test_every_record_of_a_mixed_batch_is_as_alone() -> None:
    alphas = [0.2, 0.9, 0.2]
    together, alone = Given(), Given()
    made = obfuscator(BLOCKS)
    z = random(3, 6, 6, 6)
    both = Protected(nn.Identity(), made, Classification(), "ab" * 32, noise=together).obfuscate(z, alphas)
    sender = Protected(nn.Identity(), made, Classification(), "ab" * 32, noise=alone)
    for i, alpha in enumerate(alphas):
        one = sender.obfuscate(z[i : i + 1], alpha)
        assert torch.equal(both.tensor[i], one.tensor[0]) and both.bits[i] == one.bits[0]
    assert len({drawn.shape for drawn in together.drawn}) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu() -> None:
    z = random(2, 6, 30, 30)
    here = Fused(obfuscator(BLOCKS), 0.5)(z, Given().normals)
    there = Fused(obfuscator(BLOCKS).cuda(), 0.5)(z.cuda(), Given().normals).cpu()
    assert int((here.int() - there.int()).abs().max()) <= 1 and float((here != there).float().mean()) < 0.01
