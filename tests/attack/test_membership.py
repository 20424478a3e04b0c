"""AUC and interval are those of a slow oracle; a server that remembers its records is found out, another is not."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from sfumato.attack import membership
from sfumato.attack.base import Attacker, Clean, Effort, Outcome, Prey, Releases
from sfumato.attack.membership import Membership
from sfumato.core.obfuscator import Obfuscator, Shape
from sfumato.core.restorer import Restorer
from sfumato.outside.model import Outside
from sfumato.tasks.classification import Classification
from sfumato.trusted.protect import Protected

DIGEST = "ab" * 32
SHAPE = Shape(channels=6, k=5, context=4)
EFFORT = Effort(steps=0, tested=60)
PREY = Prey(np.zeros((2, 6, 8, 8), np.float16), np.zeros((2, 8, 8, 3), np.uint8), None, np.arange(1), np.arange(1, 2))


class Seeded:
    """The same figures on every run."""

    def __init__(self) -> None:
        self.draw = np.random.default_rng(7)

    def normals(self, records: int, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(self.draw.standard_normal((records, *shape), dtype=np.float32))


class Tail(nn.Module):
    """Logits that depend on the mean of every channel."""

    def forward(self, z: Tensor) -> Tensor:
        return z.mean((2, 3))


class Remembered(nn.Module):
    """A clean model that a server agrees with on the records of the fit, and on no others."""

    def __init__(self, members: np.ndarray, server: nn.Module) -> None:
        super().__init__()
        self.members, self.server = torch.from_numpy(members.astype(np.float32)), server

    def forward(self, z: Tensor) -> Tensor:
        known = torch.stack([(self.members == one).flatten(1).all(1).any() for one in z])
        strange = torch.tensor([9.0, -9, 9, -9, 9, -9])
        return torch.where(known[:, None], torch.zeros(6), strange)


def heads(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 6, 8, 8)).astype(np.float16)


def protected(reference: nn.Module | None) -> Protected:
    torch.manual_seed(0)
    outside = Outside(Restorer(SHAPE), Tail(), DIGEST)
    obfuscator = Obfuscator(SHAPE)
    return Protected(
        nn.Identity(), obfuscator, Classification(), DIGEST, outside=outside, reference=reference, noise=Seeded()
    )


def attacked(members: np.ndarray, others: np.ndarray, reference: nn.Module | None) -> Outcome:
    return Membership(members, others).attack(PREY, Releases(protected(reference), 0.8), EFFORT)


def test_it_is_an_attacker_that_says_what_it_lacks() -> None:
    attacker: Attacker = Membership()
    assert "give Membership(members=, others=)" in str(attacker.missing(PREY))
    assert "3 members or others" in str(Membership(heads(3, 0), heads(30, 1)).missing(PREY))
    assert Membership(heads(30, 0), heads(30, 1)).missing(PREY) is None


def test_a_server_that_never_saw_either_tells_them_not_apart() -> None:
    found = attacked(heads(80, 1), heads(70, 2), Tail())
    assert found.anchors == dict.fromkeys(found.figures, 0.5) and found.caught is None
    for name in ("membership auc by answer", "membership auc by features"):
        low, middle, high = (found.figures[f"{name}{end}"] for end in (", low", "", ", high"))
        assert low < middle < high and abs(middle - 0.5) < 0.2  # chance has a deviation of .053


def test_a_server_that_remembers_its_records_is_found_out_by_its_answers() -> None:
    members, others = heads(60, 1), heads(60, 2)
    found = attacked(members, others, Remembered(members, Tail())).figures
    assert found["membership auc by answer"] == found["membership auc by answer, low"] == 1
    assert abs(found["membership auc by features"] - 0.5) < 0.2


def test_a_restorer_that_knows_the_records_of_the_fit_is_found_out_by_its_features() -> None:
    """It answers with its mean, which is where the members lie."""
    others = heads(60, 2)
    made = protected(None)
    assert isinstance(made.outside, Outside)
    made.outside.restorer.mean.fill_(3.0)
    members = (3 + 0.1 * heads(60, 1)).astype(np.float16)
    found = Membership(members, others).attack(PREY, Releases(made, 0.8), EFFORT).figures
    assert found["membership auc by features"] == 1
    assert set(found) == {f"membership auc by features{end}" for end in ("", ", low", ", high")}, "no clean model"


def test_more_draws_mean_less_noise_in_a_score() -> None:
    """The spread of scores of ONE record repeated is noise alone; sixteen draws quarter it."""
    same = np.repeat(heads(1, 1), 40, 0)
    made = protected(Tail())
    assert isinstance(made.outside, Outside)
    one, sixteen = (
        Membership(same, same, draws=draws)._scores(Releases(made, 0.8), made.outside, same) for draws in (1, 16)
    )
    assert sixteen["membership auc by features"].std() < 0.5 * one["membership auc by features"].std()


def test_only_the_tested_number_of_records_is_used() -> None:
    counted: list[int] = []

    class Counting(Tail):
        def forward(self, z: Tensor) -> Tensor:
            counted.append(len(z))
            return super().forward(z)

    Membership(heads(90, 1), heads(90, 2), draws=1).attack(PREY, Releases(protected(Counting()), 0.8), EFFORT)
    assert sum(counted) == 2 * EFFORT.tested


def test_nothing_to_say_without_a_server_or_of_other_taps() -> None:
    attacker = Membership(heads(20, 1), heads(20, 2))
    bare = Protected(nn.Identity(), Obfuscator(SHAPE), Classification(), DIGEST)
    assert attacker.attack(PREY, Releases(bare, 0.8), EFFORT).figures == {}
    assert attacker.attack(PREY, Clean(), EFFORT).figures == {}
    assert Membership().attack(PREY, Releases(protected(Tail()), 0.8), EFFORT).figures == {}


@pytest.mark.parametrize("levels", [3, 1000])
def test_auc_and_interval_are_the_oracle_s(levels: int) -> None:
    draw = np.random.default_rng(levels)
    members, others = draw.integers(0, levels, 40) + levels // 3, draw.integers(0, levels, 30)
    truth, scores = np.r_[np.ones(40), np.zeros(30)], np.r_[members, others]
    middle, low, high = membership.interval(members, others, np.random.default_rng(5))
    assert middle == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    again = np.random.default_rng(5)
    one, two = (again.multinomial(n, np.full(n, 1 / n), membership.RESAMPLES) for n in (40, 30))
    slow = [roc_auc_score(truth, scores, sample_weight=np.r_[a, b]) for a, b in zip(one[:300], two[:300], strict=True)]
    assert [low, high] == pytest.approx(np.quantile(slow, (0.025, 0.975)), abs=0.03)
