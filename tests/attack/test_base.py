import numpy as np
import pytest
import torch

from sfumato.attack import base
from sfumato.attack.base import Clean, Outcome, Releases
from sfumato.core import channel
from sfumato.trusted.protect import Protected
from tests.attack.prey import prey, protected


def scale(guarded: Protected, size: int, releases: int = 1) -> torch.Tensor:
    """What the linear estimate multiplies y by."""
    ones = torch.ones(1, 3, size, size)
    return guarded.obfuscator.estimate(ones, torch.tensor([0.5]), (size, size), releases=releases).detach()


def test_releases_are_what_crosses_the_wire() -> None:
    guarded = protected()
    z = torch.randn(4, 3, 4, 4)
    seen = Releases(guarded, 0.5).see(z)
    step = guarded.obfuscator.allocation.steps(torch.full((4,), 0.5))
    codes = seen / scale(guarded, 4) / step
    assert torch.allclose(codes, codes.round(), atol=1e-3)
    assert not torch.equal(seen, Releases(guarded, 0.5).see(z)), "fresh noise at every look"


def test_the_mean_of_k_releases_has_a_kth_of_the_variance() -> None:
    guarded, z = protected(), torch.zeros(64, 3, 8, 8)
    tap = Releases(guarded, 0.5, repeats=16)
    rest = (tap.see(z) - tap.expected(z)) / scale(guarded, 8, 16)
    assert float(rest.var()) == pytest.approx(1 / 16, rel=0.1)
    once = Releases(guarded, 0.5)
    rest = (once.see(z) - once.expected(z)) / scale(guarded, 8)
    assert float(rest.var()) == pytest.approx(1, rel=0.1)


def test_expected_is_the_estimate_of_the_signal_and_has_a_gradient() -> None:
    guarded = protected()
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    got = Releases(guarded, 0.3).expected(z)
    a = torch.full((2,), 0.3)
    gain = channel.gain(guarded.obfuscator.allocation(a), 2.0)[:, :, None, None]
    assert torch.allclose(got, guarded.obfuscator.estimate(gain * guarded.obfuscator.signal(z, a), a, (4, 4)))
    got.sum().backward()
    assert z.grad is not None and bool((z.grad != 0).any())
    assert Clean().expected(z) is z


def test_nobody_is_in_both_parts() -> None:
    people = np.repeat(np.arange(50), 3)
    train, test = base.divided(people, 150, 0)
    assert not set(people[train]) & set(people[test]) and len(train) + len(test) == 150
    assert 0.2 < len(test) / 150 < 0.4
    alone = base.divided(None, 10, 0)
    assert sorted(np.concatenate(alone).tolist()) == list(range(10))


@pytest.mark.parametrize(
    ("curve", "converged"),
    [
        ([12, 13, 14, 15, 16, 17, 18, 19], False),
        ([12, 13, 14, 15, 16, 16, 16, 16], True),
        ([12.1, 12.1, 12.1, 12.1, 12.2, 12.2, 12.4, 12.4], False),  # little, but half of what it has
        ([12.1, 12.1, 12.1, 12.1, 12.1, 12.1, 12.11, 12.11], True),
        ([1], None),
    ],
)
def test_an_attacker_that_still_grows_had_not_converged(curve: list[float], converged: bool | None) -> None:
    assert Outcome("x", "y", 0.8, {}, {"psnr": 12.0}, curve).converged is converged
    assert Outcome("x", "y", 0.8, {}, {}, curve).converged is None


def test_standardised_channels() -> None:
    hunted = prey(protected())
    see = base.standardised(Clean(), hunted, hunted.train)
    seen = see(hunted.cut(hunted.train[:64])).transpose(0, 1).flatten(1)
    assert torch.allclose(seen.mean(1), torch.zeros(3), atol=1e-3)
    assert torch.allclose(seen.std(1), torch.ones(3), atol=1e-2)


def test_a_users_attacker_joins_and_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", {})

    class Mine:
        name, needs = "mine", "nothing"

        def missing(self, prey: base.Prey) -> str | None:
            return None

        def attack(self, prey: base.Prey, tap: base.Tap, effort: base.Effort) -> Outcome:
            return Outcome(self.name, tap.name, tap.alpha, {})

    first, second = Mine(), Mine()
    base.register(first)
    base.register(second)
    third = Mine()
    third.name = "other"
    assert base.with_registered([third]) == [third, second]
