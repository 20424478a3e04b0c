"""Identity linkage: an embedding e(seen) learned on releases; are two releases of one person nearer than of two?

    L = 1 - cos(e, t) + InfoNCE(e, t),  t the recogniser's embedding of the clear picture

Three embeddings are had: a network trained on L; the ridge regression from `seen`, or from its middle, to t in closed
form, the best linear one there is; and both side by side. The one that does best on people held out of the training is
scored. Needs: white box, releases of pictures of people it can name (train), a recogniser of its own to learn from
(knowledge distillation; without one, t is learned for every training person). Scored by verification on people never
seen. Sources: arXiv 1807.03748 section 2.3 (InfoNCE), arXiv 1503.02531 (distillation).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from sfumato.attack.base import Effort, Outcome, Prey, Tap, batches, learnable, standardised
from sfumato.attack.recogniser import Recogniser, verification

Part = Callable[[Tensor], Tensor]
_EMBEDDING = 128
_TEMPERATURE = 0.1
_RIDGES = (0.1, 1.0, 10.0)  # relative to a record's mean power
_MOST = 6000  # records the closed form looks at: its cost grows with their cube
_CHECKS = 8
FEWEST_PAIRS = 20  # of one person: of fewer, a single one would decide
_SCENE = "auc without the middle"  # of the picture: where people are shown in one place, that is no face
ANCHORS = {"auc": 0.5, "tar at far 1e-2": 0.01, "tar at far 1e-3": 0.001}


class Embedding(nn.Module):
    """Features [N, c, h, w] -> unit vectors [N, 128]."""

    def __init__(self, channels: int, sites: tuple[int, int], w: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels, w, 1)
        self.near = nn.ModuleList(nn.Conv2d(w, w, 3, padding=1) for _ in range(3))
        self.down = nn.Conv2d(w, w, 3, 2, 1)
        self.far = nn.ModuleList(nn.Conv2d(w, w, 3, padding=1) for _ in range(2))
        height, width = (-(-side // 2) for side in sites)
        self.drop = nn.Dropout(0.3)
        self.leave = nn.Linear(w * height * width, _EMBEDDING)

    def forward(self, seen: Tensor) -> Tensor:
        x = F.relu(self.enter(seen))
        for layer in self.near:
            x = x + F.relu(layer(x))
        x = F.relu(self.down(x))
        for layer in self.far:
            x = x + F.relu(layer(x))
        return F.normalize(self.leave(self.drop(x.flatten(1))), dim=1)


@dataclass(frozen=True)
class Linkage:
    """Two releases: the same person or not?"""

    recogniser: Recogniser | None = None
    width: int = 128
    name: str = "identity linkage"
    needs: str = "white box, releases of people it can name"

    def missing(self, prey: Prey) -> str | None:
        if prey.people is None:
            return "the data does not say who is who: one folder a person, 20 or more, and no image beside them"
        plain = prey.train[: len(prey.train) - prey.mirrored]
        for rows, kind in ((plain, "train"), (prey.test, "test")):
            shown = np.unique(prey.people[rows], return_counts=True)[1]
            if (shown * (shown - 1) // 2).sum() < FEWEST_PAIRS:
                return f"fewer than {FEWEST_PAIRS} pairs of pictures of one person to {kind} on"
        return None

    def attack(self, prey: Prey, tap: Tap, effort: Effort) -> Outcome:
        """Figures auc, tar at far 1e-2 and 1e-3, rank-1; chance beside them."""
        assert prey.people is not None
        torch.manual_seed(prey.seed)
        see, met = standardised(learnable(tap), prey, prey.train), standardised(tap, prey, prey.train)
        targets, numbers = self._targets(prey)
        held, rows = _held_out(prey)
        model, curve = _fit(prey, see, targets, numbers, effort, self.width, held, rows)
        wanted = targets(torch.from_numpy(numbers)).detach().numpy()
        linear = _Linear(see, prey, rows, held, wanted)

        def embedded(see: Callable[[Tensor], Tensor], rows: np.ndarray) -> list[np.ndarray]:
            ways = [_embed(model, see, prey, rows), linear(see, prey, rows)]
            return [*ways, np.concatenate(ways, 1) / np.sqrt(2)]

        tested = prey.test[: effort.tested]
        reached = [verification(e, prey.people[held]).get("auc", 0.5) for e in embedded(see, held)]
        figures = verification(embedded(met, tested)[int(np.argmax(reached))], prey.people[tested])
        around = _Linear(see, prey, rows, held, wanted, (_around,))
        scene = verification(around(met, prey, tested), prey.people[tested]).get("auc", 0.5)
        return Outcome(self.name, tap.name, tap.alpha, figures | {_SCENE: scene}, ANCHORS | {_SCENE: 0.5}, curve)

    def _targets(self, prey: Prey) -> tuple[nn.Embedding, np.ndarray]:
        """Vectors to learn, and which of them each record has: the recogniser's of its picture, or its person's."""
        assert prey.people is not None
        if self.recogniser is None:
            names, numbers = np.unique(prey.people, return_inverse=True)
            return nn.Embedding(len(names), _EMBEDDING), numbers
        known = torch.from_numpy(self.recogniser.embed(prey.pictures))
        return nn.Embedding.from_pretrained(known), np.arange(len(known))


def _fit(
    prey: Prey,
    see: Callable[[Tensor], Tensor],
    targets: nn.Embedding,
    numbers: np.ndarray,
    effort: Effort,
    width: int,
    held: np.ndarray,
    rows: np.ndarray,
) -> tuple[Embedding, list[float]]:
    """The embedding and its AUC on people held out of training along the way."""
    assert prey.people is not None
    first = see(prey.cut(rows[:2]))
    model = Embedding(first.shape[1], (first.shape[2], first.shape[3]), width)
    head = nn.Linear(_EMBEDDING, targets.embedding_dim)
    learned = [*model.parameters(), *head.parameters(), *(p for p in targets.parameters() if p.requires_grad)]
    optimiser = torch.optim.AdamW(learned, lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=effort.steps + 1, pct_start=0.1)
    draw, curve = np.random.default_rng(prey.seed), list[float]()
    every = max(1, effort.steps // _CHECKS)
    for step in tqdm(range(effort.steps), "identity", disable=effort.quiet, leave=False):
        chosen = rows[draw.integers(len(rows), size=2 * effort.batch)]
        model.train()
        e = F.normalize(head(model(see(prey.cut(chosen)))), dim=1)
        ids, places = np.unique(numbers[chosen], return_inverse=True)
        t = F.normalize(targets(torch.from_numpy(ids)), dim=1)
        where = torch.from_numpy(places)
        loss = (1 - (e * t[where]).sum(1)).mean() + F.cross_entropy(e @ t.T / _TEMPERATURE, where)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if (step + 1) % every == 0 or step + 1 == effort.steps:
            curve.append(verification(_embed(model, see, prey, held), prey.people[held]).get("auc", 0.5))
    return model, curve


def _held_out(prey: Prey) -> tuple[np.ndarray, np.ndarray]:
    """Training rows of some people who are shown twice, without mirror images; rows of all other people."""
    assert prey.people is not None
    plain = prey.train[: len(prey.train) - prey.mirrored]
    owners, shown = np.unique(prey.people[plain], return_counts=True)
    twice = owners[shown > 1]
    some = twice[:: max(8, len(twice) // 40)]
    return plain[np.isin(prey.people[plain], some)][:200], prey.train[~np.isin(prey.people[prey.train], some)]


class _Linear:
    """The ridge regression from a part of `seen` to the targets, by its dual: as many unknowns as records.

    w = X' (X X' + r I)^-1 T, features X [n, c h w] and targets T centred; the part and r are the best of some on people
    held out. Parts are the middle of the picture, where a portrait has its face, or all of it.
    """

    best = -1.0

    def __init__(
        self, see: Callable[[Tensor], Tensor], prey: Prey, rows: np.ndarray, held: np.ndarray, wanted: np.ndarray,
        parts: Sequence[Part] = (),
    ) -> None:  # fmt: skip
        assert prey.people is not None
        rows = rows[:_MOST]
        targets = torch.from_numpy(wanted[rows])
        centred, eye = (targets - targets.mean(0)).double(), torch.eye(len(rows), dtype=torch.float64)
        for part in parts or _PARTS:
            x, near = _flat(see, prey, rows, part), _flat(see, prey, held, part)
            mean = x.mean(0)
            x -= mean
            gram = (x @ x.T).double()
            for ridge in _RIDGES:
                solved = torch.linalg.solve(gram + ridge * gram.diagonal().mean() * eye, centred)
                weights = x.T @ solved.float()
                found = F.normalize((near - mean) @ weights, dim=1).numpy()
                reached = verification(found, prey.people[held]).get("auc", 0.5)
                if reached > self.best:
                    self.best, self.part, self.mean, self.weights = reached, part, mean, weights

    def __call__(self, see: Callable[[Tensor], Tensor], prey: Prey, rows: np.ndarray) -> np.ndarray:
        """Unit vectors [n, d]."""
        seen = _flat(see, prey, rows, self.part) - self.mean
        found: np.ndarray = F.normalize(seen @ self.weights, dim=1).numpy()
        return found


def _middle(seen: Tensor, share: float) -> tuple[slice, slice]:
    """Rows and columns of the middle of [n, c, h, w], `share` of each side."""
    edges = [(side - max(1, round(share * side))) // 2 for side in seen.shape[2:]]
    return slice(edges[0], seen.shape[2] - edges[0]), slice(edges[1], seen.shape[3] - edges[1])


def _around(seen: Tensor) -> Tensor:
    """All but the middle half: what the place tells, and the clothes."""
    apart = seen.clone()
    apart[(..., *_middle(seen, 0.5))] = 0
    return apart


_PARTS: tuple[Part, ...] = (lambda seen: seen, lambda seen: seen[(..., *_middle(seen, 0.5))])


@torch.no_grad()
def _flat(see: Callable[[Tensor], Tensor], prey: Prey, rows: np.ndarray, part: Part) -> Tensor:
    """What is seen of the part of each record as one row [n, c h w]."""
    return torch.cat([part(see(prey.cut(some))).flatten(1) for some in batches(rows, 64)])


@torch.no_grad()
def _embed(model: Embedding, see: Callable[[Tensor], Tensor], prey: Prey, rows: np.ndarray) -> np.ndarray:
    model.eval()
    return torch.cat([model(see(prey.cut(part))) for part in batches(rows, 64)]).numpy()
