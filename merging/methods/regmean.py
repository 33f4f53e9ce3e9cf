"""RegMean: the weight whose outputs are nearest to those of all tasks on their own inputs. arXiv 2212.09849."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orthoft.merging.methods.mean import mean
from orthoft.merging.methods.registry import method
from orthoft.merging.statistics import by_inputs, check_weights, complete, takes


@method("regmean", entries=True)
@takes("gram")
def regmean(
    x: Tensor,
    weights: Tensor,
    *,
    reduce: float = 0.9,
    ridge: float = 1e-6,
    statistics: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Return ``(sum_t w_t x_t H_t) (sum_t w_t H_t)^-1``, the minimum of ``sum_t w_t tr((X - x_t) H_t (X - x_t)^T)``.

    ``H_t`` (n, n) is the Gram matrix of the task's inputs, off-diagonal entries times ``reduce``, and on the diagonal
    ``ridge`` times the mean diagonal entry over all tasks. The paper has no ridge, and then needs more inputs than n at
    ``reduce = 1``; as it is added to each task, directions that no input has are averaged. On deltas it is what it is
    on the models themselves: the base drops out. A weight that not all tasks have a Gram matrix of (a bias, a norm, an
    embedding) becomes the weighted mean. By Cholesky, in float64: one factorisation of (n, n).

    Raises:
        ValueError: a weight is negative or all are zero, ``reduce`` is outside [0, 1], ``ridge`` is not positive, or
            the matrices given are not positive semidefinite.
    """
    if not 0.0 <= reduce <= 1.0:
        raise ValueError(f"reduce scales the off-diagonal entries, in [0, 1], got {reduce}")
    if ridge <= 0:
        raise ValueError(f"ridge is a share of the mean diagonal entry, above 0, got {ridge}")
    check_weights("regmean", weights)
    grams = complete(statistics)
    if grams is None:
        return mean(x, weights)
    tasks, grams, inputs_first = by_inputs(x, grams)  # (T, m, n)
    shift = ridge * (sum(float(G.diagonal().double().mean()) for G in grams) / len(grams) or 1.0)
    total = x.new_zeros(tasks.shape[2], tasks.shape[2], dtype=torch.float64)
    known = torch.zeros_like(tasks[0], dtype=torch.float64)
    for w, G, task in zip(weights.tolist(), grams, tasks, strict=True):
        H = w * reduced(G.to(total), reduce, shift)  # (n, n)
        total += H
        known += task.double() @ H
    merged = _divided(known, total).to(x)
    return merged.mT if inputs_first else merged


def reduced(G: Tensor, reduce: float, shift: float) -> Tensor:
    """Return a Gram matrix with its off-diagonal entries times ``reduce`` and ``shift`` added to its diagonal."""
    return reduce * G + torch.diag((1 - reduce) * G.diagonal() + shift)


def _divided(known: Tensor, total: Tensor) -> Tensor:
    """Return ``known total^-1`` (m, n) for a positive definite (n, n)."""
    L, failed = torch.linalg.cholesky_ex(total)
    if failed:
        raise ValueError("the Gram matrices are not positive semidefinite: collect them again, or raise ridge")
    return torch.cholesky_solve(known.mT, L).mT
