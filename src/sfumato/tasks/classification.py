"""Classification as a task: a model that answers [N, classes] logits.

distance = KL(softmax(teacher) || softmax(student))        per record
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.core.display import table
from sfumato.core.task import Image, Outputs

_SHOWN = 5  # classes in a notebook


@dataclass(frozen=True)
class Classified:
    """The most probable class, its name where names are known, and the probability of every class [classes]."""

    label: int
    name: str
    probabilities: np.ndarray

    def _repr_html_(self) -> str:
        best = np.argsort(-self.probabilities, kind="stable")[:_SHOWN]
        return table(
            ("class", "probability"), [(label, f"{self.probabilities[label]:.3f}") for label in best], title=self.name
        )


@dataclass(frozen=True)
class Classification:
    """Records [H, W] or [H, W, c] -> (x - mean) / std, channels first; `match` names tail stages to match."""

    mean: float = 0.0
    std: float = 1.0
    names: tuple[str, ...] = ()
    match: tuple[str, ...] = ()
    name: str = "classification"

    def views(self, record: Image, index: int) -> list[Image]:
        return [record]

    def preprocess(self, record: Image) -> Tensor:
        """[H, W] or [H, W, c] -> float [c, H, W]."""
        x = torch.from_numpy(np.atleast_3d(record).astype(np.float32))
        return ((x - self.mean) / self.std).permute(2, 0, 1)

    def outputs(self, raw: Any) -> Outputs:
        return (raw,)

    def postprocess(self, outputs: Outputs, size: tuple[int, int]) -> Classified:
        p = torch.softmax(outputs[0].detach().float().cpu(), -1).numpy()
        label = int(p.argmax())
        return Classified(label, self.names[label] if self.names else str(label), p)

    def distance(self, student: Outputs, teacher: Outputs) -> Tensor:
        log_p, log_q = F.log_softmax(student[0], -1), F.log_softmax(teacher[0], -1)
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    def agreement(self, student: Outputs, teacher: Outputs) -> float:
        """Share of records for which both name the same class."""
        return float((student[0].argmax(-1) == teacher[0].argmax(-1)).float().mean())

    def stages(self) -> tuple[str, ...]:
        return self.match
