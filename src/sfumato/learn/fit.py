"""Fit an obfuscator, a restorer and (where adapted) a tail to a trained model, with the model itself as the teacher.

Every batch draws its records, alphas and noise from a generator seeded by (seed, step), so a fit that is killed and
resumed from its checkpoint ends with the same tensors as one that was not. Alphas follow the sandwich rule (arXiv
1903.05134, section 3.1): the lowest, the highest, and random ones between, uniform in the logarithm of the bits.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from sfumato.core import channel
from sfumato.core.errors import RequestError
from sfumato.core.files import write_bytes
from sfumato.core.obfuscator import Obfuscator, Shape
from sfumato.core.restorer import Restorer
from sfumato.core.sites import unfold
from sfumato.core.task import Outputs, Task
from sfumato.learn.cache import Cache
from sfumato.learn.identity import Adversary, Subjects
from sfumato.learn.objective import feature_error, linear_adversary, watched
from sfumato.learn.start import initialise

VALIDATED_AT = (0.05, 0.6, 0.8, 0.95)
HIGHEST = 0.95
PRIVATE_FROM = 0.5
_SAMPLE = 48  # records the closed-form start looks at
_VALIDATION_NOISE = 4928


@dataclass(frozen=True)
class Settings:
    """How long and how hard to fit; the defaults are those of the shipped artefacts."""

    tail: Literal["adapted", "frozen"] = "adapted"
    steps: int = 5000
    batch: int = 8
    lr: float = 1.5e-3
    tail_lr: float = 2e-4
    features: float = 0.5
    privacy: float = 0.5
    identity: float = 10.0
    validations: int = 20
    patience: int = 20
    held_out: float = 0.1
    seed: int = 0


class Student(nn.Module):
    """Obfuscator, restorer and tail as one module, for the optimiser and the average of the weights."""

    def __init__(self, obfuscator: Obfuscator, restorer: Restorer, tail: nn.Module) -> None:
        super().__init__()
        self.obfuscator, self.restorer, self.tail = obfuscator, restorer, tail

    def release(self, z: Tensor, alpha: Tensor, noise: Tensor) -> Tensor:
        """y, with the allocation both sides share."""
        y: Tensor = self.obfuscator(z, alpha, noise)
        return y

    def forward(self, y: Tensor, alpha: Tensor, size: tuple[int, int], ndim: int) -> Any:
        return self.tail(unfold(self.restorer(y, alpha, size), ndim))


@dataclass
class Fitted:
    """The fit's result: modules in eval mode, and what happened."""

    obfuscator: Obfuscator
    restorer: Restorer
    tail: nn.Module
    scores: dict[str, float]
    steps: int
    history: list[dict[str, float]] = field(default_factory=list)


class Trainer:
    """One fit, resumable: `run()` goes from the last checkpoint in `folder` to the end."""

    def __init__(
        self,
        tail: nn.Module,
        task: Task,
        cache: Cache,
        folder: Path,
        settings: Settings,
        shape: Shape,
        *,
        device: torch.device,
        obfuscator: Obfuscator | None = None,
        restorer: Restorer | None = None,
        tail_state: dict[str, Tensor] | None = None,
        subjects: Subjects | None = None,
        keep: bool = False,
        quiet: bool = False,
    ) -> None:
        self.task, self.cache, self.folder, self.settings = task, cache, folder, settings
        self.device, self.quiet = device, quiet
        self.teacher = deepcopy(tail).to(device).eval().requires_grad_(requires_grad=False)
        self.train_rows, self.held_rows = _divide(cache, settings)
        student_tail = deepcopy(tail).to(device).eval().requires_grad_(settings.tail == "adapted")
        if tail_state:
            student_tail.load_state_dict(tail_state)
        self.given = keep
        with torch.random.fork_rng(devices=[]):  # the layers the closed-form start leaves as they are made
            torch.manual_seed(settings.seed)
            encoder = deepcopy(obfuscator) if obfuscator is not None else Obfuscator(shape)
            decoder = deepcopy(restorer) if restorer is not None else Restorer(encoder.shape)
        self.student = Student(encoder, decoder, student_tail).to(device)
        self.student.obfuscator.requires_grad_(not self.given)
        decoder.allocation = self.student.obfuscator.allocation
        if obfuscator is None or restorer is None:
            self._start()
        self.subjects = None if subjects is None else subjects.digest
        self.adversary: Adversary | None = None
        if subjects is not None and settings.identity and not keep:
            self.adversary = Adversary(subjects, cache, self.train_rows, encoder.shape.k).to(device)
        self.optimiser, self.schedule = self._optimiser()
        forgotten = max(1 - 0.999, min(1.0, 5 / settings.steps))  # of what the fit began from, e^-5 is left at its end
        self.average = AveragedModel(self.student, multi_avg_fn=get_ema_multi_avg_fn(1 - forgotten))
        self.step, self.whole = 0, True
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {"score": -1.0, "state": self.student.state_dict(), "since": 0}

    def run(self) -> Fitted:
        """Train to the end, to the early stop, or until interrupted; a checkpoint at every validation."""
        self._resume()
        every = max(1, self.settings.steps // self.settings.validations)
        total = self.settings.steps
        try:
            with tqdm(total=total, initial=self.step, desc="fit", disable=self.quiet, unit="step") as bar:
                while self.step < total and self.best["since"] < self.settings.patience:
                    loss = self._train_step()
                    bar.update()
                    if self.step % every == 0 or self.step == total:
                        self._validate(loss)
                        self._save()
                    self.whole = True
                    if self.step % 10 == 0:
                        bar.set_postfix_str(f"loss={loss:.3f} agreement={max(self.best['score'], 0):.3f}")
        except KeyboardInterrupt:
            if self.whole:
                self._save()
            raise
        return self._finish()

    def _train_step(self) -> float:
        self.student.train(mode=False)  # batch norm keeps the provider's statistics
        z, patch, alpha, noise = self._draw(self.step)
        teacher, teacher_features = self._teach(z)
        y = self.student.release(z, alpha, noise)
        with watched(self.student.tail, self.task.stages()) as seen:
            outputs = self.task.outputs(self.student(y, alpha, (z.shape[2], z.shape[3]), self.cache.ndim))
        # Features lead the way to the teacher's answers; where the bits do not suffice for both, the answers count.
        features = self.settings.features * (1 - self.step / self.settings.steps)
        loss = self.task.distance(outputs, teacher) + features * feature_error(seen, teacher_features)
        if patch is not None and self.settings.privacy and not self.given:
            shown = self.student.obfuscator.estimate(y, alpha, (z.shape[2], z.shape[3]))
            loss = loss - self.settings.privacy * _share(alpha) * linear_adversary(shown, patch).clamp(max=1.0)
        # The errors of few bits are many times those of many bits, which would never be learned beside them.
        mean = ((1 - alpha).sqrt() * loss).mean()
        self.whole = False  # an interrupt from here to the end of the step must not leave a checkpoint of half of it
        if self.adversary is not None:
            named, alpha = self.adversary(self.student.obfuscator, self.step, self._generator(self.step, stream=1))
            mean = mean + self.settings.identity * ((1 - alpha).sqrt() * _share(alpha) * named).mean()
        self.optimiser.zero_grad(set_to_none=True)
        mean.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 5.0)
        self.optimiser.step()
        self.schedule.step()
        self.average.update_parameters(self.student)
        self.step += 1
        return float(mean.detach())

    def _draw(self, step: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        generator, batch = self._generator(step), self.settings.batch
        rows = self.train_rows[torch.randint(len(self.train_rows), (batch,), generator=generator).numpy()]
        z, patch = self._moved(*self.cache.batch(rows, self.device), generator)
        between = 1 - (1 - HIGHEST) ** torch.rand(batch, generator=generator)
        between[0] = 0.0
        between[-1] = HIGHEST
        noise = torch.randn(batch, *self.student.obfuscator.shape.codes(z.shape[2:]), generator=generator)
        return z, patch, between.to(self.device), noise.to(self.device, memory_format=torch.channels_last)

    def _generator(self, step: int, stream: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed((self.settings.seed << 32) + (stream << 31) + step)

    def _moved(self, z: Tensor, patch: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Every record rolled by whole sites, half of them with a side of their neighbour's in the batch.

        The teacher answers for whatever z it is given, so new z cost nothing and a small collection goes further.
        """
        if self.cache.ndim != 4:  # tokens have places of their own
            return z, patch
        height, width = z.shape[2:]
        moves = torch.stack([torch.randint(n, (len(z),), generator=generator) for n in (height, width)], 1).tolist()
        edges = torch.randint(2 * width, (len(z),), generator=generator).tolist()
        both = [z] if patch is None else [z, patch]
        for tensor in both:
            for row, move in enumerate(moves):
                tensor[row] = tensor[row].roll(move, (1, 2))
            first = tensor[0].clone()
            for row, edge in enumerate(edges):
                if edge < width:
                    tensor[row, :, :, edge:] = (tensor[row + 1] if row + 1 < len(z) else first)[:, :, edge:]
        return z, patch

    def _teach(self, z: Tensor) -> tuple[Outputs, list[Tensor]]:
        with torch.no_grad(), watched(self.teacher, self.task.stages()) as seen:
            return self.task.outputs(self.teacher(unfold(z, self.cache.ndim))), list(seen)

    def _validate(self, loss: float) -> None:
        model: Any = self.average.module
        scores = {f"a{alpha:g}": self._agreement(model, alpha) for alpha in VALIDATED_AT}
        score = float(np.mean(list(scores.values())))
        self.history.append({"step": float(self.step), "loss": loss, "score": score, **scores})
        # Agreement knows nothing of identity, which only falls as the fit goes on: there the last state counts.
        better = self.adversary is not None or score > self.best["score"]
        if better:
            state = {k: v.detach().clone() for k, v in model.state_dict().items()}
            self.best = {"score": score, "state": state, "since": 0}
        else:
            self.best["since"] += 1

    @torch.no_grad()
    def _agreement(self, model: Student, alpha: float) -> float:
        generator = torch.Generator().manual_seed(_VALIDATION_NOISE)
        pairs = []
        for rows in _batches(self.held_rows, self.settings.batch):
            z, _ = self.cache.batch(rows, self.device)
            a = channel.as_alpha(alpha, len(z), self.device)
            shape = model.obfuscator.shape.codes(z.shape[2:])
            noise = torch.randn(len(z), *shape, generator=generator).to(self.device)
            y, size = model.release(z, a, noise), (z.shape[2], z.shape[3])
            student = self.task.outputs(model(y, a, size, self.cache.ndim))
            pairs.append((student, self._teach(z)[0]))
        student, teacher = (
            tuple(torch.cat(parts) for parts in zip(*side, strict=True)) for side in zip(*pairs, strict=True)
        )
        return self.task.agreement(student, teacher)

    def _start(self) -> None:
        rows = self.train_rows[np.linspace(0, len(self.train_rows) - 1, _SAMPLE).astype(int)]
        z, _ = self.cache.batch(rows, self.device)
        generator = torch.Generator().manual_seed(self.settings.seed)
        std = z.transpose(0, 1).flatten(1).std(1)[:, None, None]
        gradients = []
        for part in z.split(self.settings.batch):
            moved = part + 0.1 * std * torch.randn(part.shape, generator=generator).to(self.device)
            moved.requires_grad_()
            teacher, teacher_features = self._teach(part)
            with watched(self.teacher, self.task.stages()) as seen:
                outputs = self.task.outputs(self.teacher(unfold(moved, self.cache.ndim)))
            loss = self.task.distance(outputs, teacher) + self.settings.features * feature_error(seen, teacher_features)
            gradients.append(torch.autograd.grad(loss.sum(), moved)[0])
        initialise(self.student.obfuscator, self.student.restorer, z, torch.cat(gradients))

    def _optimiser(self) -> tuple[torch.optim.Optimizer, OneCycleLR]:
        s = self.settings
        own = [*self.student.restorer.parameters(), *self.student.obfuscator.parameters()]
        own = [p for p in dict.fromkeys(own) if p.requires_grad]
        tail = [p for p in self.student.tail.parameters() if p.requires_grad]
        groups = [{"params": own, "lr": s.lr}] + ([{"params": tail, "lr": s.tail_lr}] if tail else [])
        optimiser = torch.optim.AdamW(groups, weight_decay=1e-4)
        rates = [s.lr, s.tail_lr][: len(groups)]
        return optimiser, OneCycleLR(optimiser, rates, total_steps=s.steps + 1, pct_start=max(0.1, 2 / (s.steps + 1)))

    def _save(self) -> None:
        state = {
            "settings": asdict(self.settings),
            "data": self.cache.digest,
            "shape": self.student.obfuscator.shape.as_dict(),
            "step": self.step,
            "student": self.student.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "history": self.history,
            "best": self.best,
            "subjects": self.subjects,
            "adversary": None if self.adversary is None else self.adversary.state_dict(),
        }
        buffer = BytesIO()  # torch.save into a file answers a full disk with a RuntimeError that does not say so
        torch.save(state, buffer)
        write_bytes(self.folder / "checkpoint.pt", buffer.getvalue())

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        saved = torch.load(path, map_location=self.device, weights_only=True)
        now: dict[str, Any] = {"settings": asdict(self.settings), "data": self.cache.digest}
        now |= {"shape": self.student.obfuscator.shape.as_dict(), "subjects": self.subjects}
        if any(saved.get(name) != value for name, value in now.items()):
            raise RequestError(
                f"{path} belongs to a fit with other settings or other data",
                wanted="the same command as before",
                do=f"repeat it, or remove {path} to start anew",
            )
        self.student.load_state_dict(saved["student"])
        self.average.load_state_dict(saved["average"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.schedule.load_state_dict(saved["schedule"])
        if self.adversary is not None:
            self.adversary.load_state_dict(saved["adversary"])
        self.step, self.history, self.best = saved["step"], saved["history"], saved["best"]

    def _finish(self) -> Fitted:
        self.student.load_state_dict(self.best["state"])
        best = self.history[-1 - int(self.best["since"])]
        scores = {k: v for k, v in best.items() if k not in ("step", "loss")}
        student = self.student.eval().requires_grad_(requires_grad=False)
        restorer = student.restorer
        restorer.allocation = deepcopy(student.obfuscator.allocation)
        return Fitted(student.obfuscator, restorer, student.tail, scores, self.step, self.history)


def _share(alpha: Tensor) -> Tensor:
    """How much of an adversary counts: below PRIVATE_FROM too little is withheld to hold it off."""
    return ((alpha - PRIVATE_FROM) / (1 - PRIVATE_FROM)).clamp_min(0)


def _divide(cache: Cache, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on (every view) and to validate on (the plain view of every 1/held_out-th record)."""
    records = len(cache) // cache.views
    apart = max(2, round(1 / settings.held_out))
    held = np.arange(records) % apart == apart - 1
    if not held.any() or held.all():
        raise RequestError(f"{records} records", wanted=f"at least {apart}, to hold one out", do="give more data")
    every_view = np.arange(len(cache)).reshape(records, cache.views)
    return every_view[~held].ravel(), every_view[held][:, 0]


def _batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
