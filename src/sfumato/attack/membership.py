"""AUC = P(score of a member > score of another) + 1/2 P(equal): was a record among those the obfuscator was fitted to?

Two scores of a record with head output z, higher for likelier members: minus the task's distance between the server's
answer to a release and the clean model's answer to z (a fit makes members' distances small), and minus |z' - z| / |z|
of the restored z'. Each is the mean over `draws` releases: who asks holds the record and both artefacts, and draws
releases at will. The interval is the bootstrap over records, members and others resampled apart; the anchor is .5.

Shapes: members and others [n, ...] as the head gives them, one size. Needs: white box, the candidate records, the
clean model; records known to be of the fit and records known not to be, of one kind: of two kinds the AUC tells the
kinds apart and nothing else. Source: arXiv 1709.01604, section 3 (the loss threshold; here at every threshold).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sfumato.attack.base import Effort, Outcome, Prey, Releases, Tap, batches
from sfumato.core.sites import fold
from sfumato.outside.model import Outside
from sfumato.trusted.protect import Protected

RESAMPLES = 2000
_BATCH = 16
_FEWEST = 10  # of each kind; below, the interval is no interval


@dataclass(frozen=True, eq=False)
class Membership:
    """Head outputs of records of the fit, `members`, and of records that were not in it, `others`."""

    members: np.ndarray | None = None
    others: np.ndarray | None = None
    draws: int = 4
    name: str = "membership of the fit"
    needs: str = "white box, clean model, records known to be in the fit and others"

    def missing(self, prey: Prey) -> str | None:
        if self.members is None or self.others is None:
            return "nobody said which records were in the fit: give Membership(members=, others=) their head outputs"
        least = min(len(self.members), len(self.others))
        return None if least >= _FEWEST else f"{least} members or others; at least {_FEWEST} of each"

    def attack(self, prey: Prey, tap: Tap, effort: Effort) -> Outcome:
        """Up to `effort.tested` records of each kind. No figures without a server or of taps other than `Releases`."""
        empty = Outcome(self.name, tap.name, tap.alpha, {})
        if not isinstance(tap, Releases) or self.members is None or self.others is None:
            return empty
        if not isinstance(tap.protected.outside, Outside):
            return empty
        draw = np.random.default_rng([prey.seed, 1709])
        inside, beyond = (
            self._scores(tap, tap.protected.outside, z[np.sort(draw.permutation(len(z))[: effort.tested])])
            for z in (self.members, self.others)
        )
        figures: dict[str, float] = {}
        for name in inside:
            figures |= _named(name, interval(inside[name], beyond[name], draw))
        return Outcome(self.name, tap.name, tap.alpha, figures, dict.fromkeys(figures, 0.5))

    def _scores(self, tap: Releases, outside: Outside, z: np.ndarray) -> dict[str, np.ndarray]:
        """Name of the figure -> score [n] of every record; by answer only where there is a clean model."""
        parts = [
            torch.stack([_score(tap.protected, outside, part, tap.alpha or 0.0) for _ in range(self.draws)]).mean(0)
            for part in _parts(z, tap.protected.obfuscator.mean.device)
        ]
        answer, feature = torch.cat(parts, 1).cpu().double().numpy()
        return ({} if tap.protected.reference is None else {"membership auc by answer": answer}) | {
            "membership auc by features": feature
        }


@torch.inference_mode()
def _score(protected: Protected, outside: Outside, z: Tensor, alpha: float) -> Tensor:
    """[2, n]: closeness of the answers and of the features, by one release of each record."""
    release = protected.obfuscate(z, alpha)
    restored, clean = outside.restorer.restore(release.tensor, release.alpha, release.sites), fold(z)
    feature = (restored - clean).flatten(1).norm(dim=1) / clean.flatten(1).norm(dim=1).clamp_min(1e-12)
    answer = torch.zeros_like(feature)
    if protected.reference is not None:
        outputs = protected.task.outputs
        answer = protected.task.distance(outputs(outside(release)), outputs(protected.reference(z)))
    return -torch.stack([answer, feature])


def _parts(z: np.ndarray, device: torch.device) -> Iterator[Tensor]:
    for rows in batches(np.arange(len(z)), _BATCH):
        yield torch.from_numpy(z[rows].astype(np.float32)).to(device)


def interval(members: np.ndarray, others: np.ndarray, draw: np.random.Generator) -> tuple[float, float, float]:
    """AUC of scores [m] against scores [o], and its 95 % bootstrap interval."""
    wins = (members[:, None] > others).astype(float) + 0.5 * (members[:, None] == others)
    # A resample is how often each record was drawn: the AUC of all of them is two products.
    one, two = (draw.multinomial(n, np.full(n, 1 / n), RESAMPLES) for n in wins.shape)
    low, high = np.quantile(((one @ wins) * two).sum(1) / wins.size, (0.025, 0.975))
    return float(wins.mean()), float(low), float(high)


def _named(name: str, found: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip((name, f"{name}, low", f"{name}, high"), found, strict=True))
