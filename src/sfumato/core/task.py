"""The protocol a task fills: what a model is for, in seven methods. Two tasks ship: detection and classification."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

Image = np.ndarray  # [H, W, 3] uint8, BGR as OpenCV reads it
Outputs = tuple[Tensor, ...]  # what the model returns, batch first


@runtime_checkable
class Task(Protocol):
    """What a fit and a client need to know of a model beside its tensors."""

    @property
    def name(self) -> str:
        """What the task is called in artefacts."""
        ...

    def views(self, record: Image, index: int) -> list[Image]:
        """The record and the variations of it that a fit should see; as many for every record."""
        ...

    def preprocess(self, record: Image) -> Tensor:
        """One record -> the model's input without batch axis."""
        ...

    def outputs(self, raw: Any) -> Outputs:
        """What the model returned -> a tuple of tensors, batch first."""
        ...

    def postprocess(self, outputs: Outputs, size: tuple[int, int]) -> Any:
        """Outputs of ONE record (no batch axis), with the record's (height, width) -> the task's result."""
        ...

    def distance(self, student: Outputs, teacher: Outputs) -> Tensor:
        """Label-free loss per record, [N]: how far the student's outputs are from the teacher's."""
        ...

    def agreement(self, student: Outputs, teacher: Outputs) -> float:
        """Validation score in [0, 1]: how well the student's decisions repeat the teacher's over a batch."""
        ...

    def stages(self) -> tuple[str, ...]:
        """Names of tail submodules whose features are matched while fitting; () where none."""
        ...


@runtime_checkable
class WithSubjects(Task, Protocol):
    """A task that can say where a record shows those whose identity a fit is to hide."""

    def subjects(self, outputs: Outputs, size: tuple[int, int]) -> np.ndarray:
        """Outputs of ONE record -> boxes [n, 4] x1 y1 x2 y2 in pixels of (height, width), the surest first."""
        ...
