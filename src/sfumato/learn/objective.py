"""What a fit minimises, label-free: stay close to the clean model, and tell a linear attacker little.

    L = sqrt(1 - alpha) [distance(student, teacher) + lambda_f (1 - t) mean_s |f_s - f_s^T|^2 / |f_s^T|^2
                         - lambda_p max(0, 2 alpha - 1) min(e, 1)]

distance is the task's; f_s are the tail's features at the task's stages, t is the share of the fit that is done; e is
the relative error of the closed-form linear adversary, the ridge regression from what a release shows of a site to the
colours of the patch it covers (1: no better than the mean). With a recogniser, releases drawn beside these add
sqrt(1 - alpha) lambda_i max(0, 2 alpha - 1) times the e of `learn.identity`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_RIDGE = 1e-3  # relative to the release's mean power; keeps the solve well-conditioned


@contextmanager
def watched(tail: nn.Module, stages: Sequence[str]) -> Iterator[list[Tensor]]:
    """Outputs of the named submodules, in call order, of every forward inside the block."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen.append(output)

    handles = [tail.get_submodule(name).register_forward_hook(keep) for name in stages]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def feature_error(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over stages of |f - f^T|^2 / |f^T|^2 per record, [N]; 0 without stages."""
    errors = [
        (s - t).flatten(1).square().sum(1) / t.flatten(1).square().sum(1).clamp_min(1e-6)
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).mean(0) if errors else torch.zeros(())


def linear_adversary(shown: Tensor, patches: Tensor) -> Tensor:
    """Relative error of the best ridge regression from shown [N, k, h, w] to patches [N, p, h, w], per record, [N]."""
    release = shown.flatten(2).transpose(1, 2)
    target = patches.flatten(2).transpose(1, 2)
    release = release - release.mean(1, keepdim=True)
    target = target - target.mean(1, keepdim=True)
    gram = release.transpose(1, 2) @ release
    power = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    eye = torch.eye(gram.shape[1], device=shown.device)
    weights = torch.linalg.solve(gram + _RIDGE * power * eye, release.transpose(1, 2) @ target)
    left = (target - release @ weights).square().sum((1, 2))
    error: Tensor = left / target.square().sum((1, 2)).clamp_min(1e-6)
    return error
