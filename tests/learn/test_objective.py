import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from torch import nn

from sfumato.learn.objective import feature_error, linear_adversary, watched


def test_adversary_agrees_with_least_squares() -> None:
    torch.manual_seed(0)
    y, target = torch.randn(2, 5, 12, 10), torch.randn(2, 3, 12, 10)
    target = target + y[:, :3]
    for row, error in enumerate(linear_adversary(y, target)):
        x, t = (v[row].flatten(1).T.numpy() for v in (y, target))
        left = t - LinearRegression().fit(x, t).predict(x)
        assert float(error) == pytest.approx(np.sum(left**2) / np.sum((t - t.mean(0)) ** 2), rel=1e-3)


def test_adversary_reads_what_is_there_and_nothing_from_noise() -> None:
    torch.manual_seed(1)
    patches = torch.randn(1, 4, 32, 32)
    assert float(linear_adversary(patches[:, [2, 0, 3, 1]], patches)) < 1e-4
    assert float(linear_adversary(torch.randn(1, 4, 32, 32), patches)) > 0.97


def test_adversary_has_a_gradient() -> None:
    y = torch.randn(1, 3, 8, 8, requires_grad=True)
    linear_adversary(y, y.detach() * 2 + torch.randn(1, 3, 8, 8)).sum().backward()
    assert y.grad is not None
    assert float(y.grad.abs().sum()) > 0


def test_feature_error_is_relative_and_per_record() -> None:
    t = torch.ones(2, 3, 4, 4)
    s = torch.stack([t[0], 1.5 * t[1]])
    # (0.5)^2 / 1^2 for the second record, at both stages
    assert feature_error([s, 10 * s], [t, 10 * t]).tolist() == pytest.approx([0.0, 0.25])
    assert float(feature_error([], [])) == 0.0


def test_watched_sees_named_stages_and_leaves_no_hook() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with watched(model, ("0", "2")) as seen:
        model(torch.zeros(4, 2))
    model(torch.zeros(4, 2))
    assert [tuple(t.shape) for t in seen] == [(4, 3), (4, 1)]
    assert not any(m._forward_hooks for m in model.modules())
