"""Who is it: a face recogniser the attacker owns, and the figures of verification.

TAR at a FAR: the share of pairs of one person accepted at the threshold that accepts that share of pairs of two; AUC
over all pairs; rank-1: how often the nearest other picture is of the same person. Chance is .5, the FAR itself, and
the share of the person's own pictures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from sklearn.metrics import roc_auc_score

from sfumato.core.errors import RequestError

SIDE = 112
_MEAN, _STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # ImageNet's, RGB
_FARS = (1e-2, 1e-3)


class Recogniser:
    """MobileFaceNet or another ONNX model [1, 3, 112, 112] (RGB, ImageNet-normalised) -> embeddings [N, d].

    Looks at the middle `crop` of a picture, where the photographs of an audit show the face. Raises RequestError for no
    such file or without ONNX Runtime.
    """

    def __init__(self, path: Path, crop: float = 0.55) -> None:
        if not path.is_file():
            raise RequestError(f"{path}: no such file", wanted="a face recogniser as ONNX", do="--recogniser FILE")
        try:
            import onnxruntime
        except ImportError as error:
            raise RequestError("ONNX Runtime is not installed", do="pip install 'sfumato[audit]'") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.input, self.crop = self.session.get_inputs()[0].name, crop

    def embed(self, pictures: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """Pictures [n, P, P, 3], or n of [P, P, 3] with a P of their own, uint8 BGR -> unit vectors [n, d]."""
        # One by one: published recognisers often have a fixed batch of one.
        faces = (self._face(picture)[None] for picture in pictures)
        found = np.concatenate([self.session.run(None, {self.input: face})[0] for face in faces])
        unit: np.ndarray = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)
        return unit

    def _face(self, picture: np.ndarray) -> np.ndarray:
        side = picture.shape[0]
        margin = round(side * (1 - self.crop) / 2)
        face = cv2.resize(picture[margin : side - margin, margin : side - margin, ::-1], (SIDE, SIDE))
        normal: np.ndarray = ((face / 255 - _MEAN) / _STD).transpose(2, 0, 1).astype(np.float32)
        return normal


def verification(embeddings: np.ndarray, people: np.ndarray) -> dict[str, float]:
    """auc, tar at two FARs and rank-1 of unit vectors [n, d] of persons [n]; empty where nobody is shown twice."""
    likeness = embeddings @ embeddings.T
    upper = np.triu_indices(len(people), 1)
    same, values = (people[:, None] == people)[upper], likeness[upper]
    if not same.any() or same.all():
        return {}
    genuine, impostor = values[same], np.sort(values[~same])
    figures = {"auc": float(roc_auc_score(same, values))}
    for far in _FARS:
        threshold = impostor[min(len(impostor) - 1, int(np.ceil((1 - far) * len(impostor))))]
        figures[f"tar at far {far:.0e}".replace("e-0", "e-")] = float((genuine > threshold).mean())
    twice = np.isin(people, [p for p, n in zip(*np.unique(people, return_counts=True), strict=True) if n > 1])
    np.fill_diagonal(likeness, -np.inf)
    figures["rank-1"] = float((people[likeness.argmax(1)] == people)[twice].mean())
    return figures
