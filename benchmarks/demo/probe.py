"""The rival that fine-tuning has to beat: logistic regression on the frozen model, solved to convergence."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)


def fit_probe(features: Tensor, labels: Tensor, *, folds: int = 5) -> nn.Linear:
    """The best linear classifier of frozen features, its ridge penalty chosen by cross-validation.

    `features`: `texts dim`, `labels`: `texts`, zero or one. Solved in fp64 on standardised features;
    returns a layer with an output for each label that takes the features as they are.
    """
    x = features.double()
    mean, std = x.mean(0), x.std(0)
    # a feature that hardly varies would get a weight that whatever is trained below it blows up
    std = std.clamp_min(1e-3 * float(std.median()))
    x = F.pad((x - mean) / std, (0, 1), value=1.0)
    y = labels.double()

    ridge = max(RIDGES, key=lambda ridge: cross_validated(x, y, ridge, folds))
    solution = logistic_regression(x, y, ridge)
    weight, bias = solution[:-1] / std, solution[-1] - (solution[:-1] * mean / std).sum()

    probe = nn.Linear(len(weight), 2, dtype=features.dtype)
    with torch.no_grad():
        probe.weight.copy_(torch.stack([-weight / 2, weight / 2]))
        probe.bias.copy_(torch.stack([-bias / 2, bias / 2]))
    return probe


def cross_validated(x: Tensor, y: Tensor, ridge: float, folds: int) -> float:
    """Accuracy over all texts, each judged by a solution that has not seen it."""
    fold = torch.arange(len(x)) % folds
    right = 0
    for held_out in range(folds):
        solution = logistic_regression(x[fold != held_out], y[fold != held_out], ridge)
        guess = x[fold == held_out] @ solution > 0
        right += int((guess == (y[fold == held_out] > 0)).sum())
    return right / len(x)


def logistic_regression(x: Tensor, y: Tensor, ridge: float, *, tolerance: float = 1e-9) -> Tensor:
    """Minimise `mean(log(1 + exp(∓x·w))) + ridge/2 |w|²` by Newton's method.

    The last column of `x` is the intercept, which is not penalised. Raises `RuntimeError` unless every
    entry of the gradient ends below `tolerance`: the problem is strictly convex, so that is its one minimum.
    """
    penalty = x.new_full((x.shape[1],), ridge)
    penalty[-1] = 0
    w = x.new_zeros(x.shape[1])
    for _ in range(50):
        p = torch.sigmoid(x @ w)
        gradient = x.T @ (p - y) / len(x) + penalty * w
        if gradient.abs().max() < tolerance:
            return w
        hessian = (x.T * (p * (1 - p))) @ x / len(x) + penalty.diag()
        w = w - torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky(hessian))[:, 0]
    raise RuntimeError(f"no convergence with ridge {ridge}")
