"""Fisher merging: each entry is weighed by how much the task's loss depends on it. arXiv 2111.09832."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orthoft.merging.methods.mean import mean
from orthoft.merging.methods.registry import method
from orthoft.merging.statistics import check_weights, complete, takes


@method("fisher", entries=True, rowwise=True)
@takes("fisher")
def fisher(
    x: Tensor, weights: Tensor, *, epsilon: float = 1e-6, statistics: Sequence[Tensor | None] | None = None
) -> Tensor:
    """Return ``sum_t w_t (F_t + epsilon) o x_t / sum_t w_t (F_t + epsilon)``, entry by entry.

    It is the minimum of ``sum_t w_t sum_ij (F_t + epsilon)_ij (X - x_t)_ij^2``; on deltas it is what it is on the
    models themselves, as the base is the same in all. ``F_t`` (p, q) is the diagonal of the Fisher information; the
    engine gives it in units of its root mean square over the whole model, so that the tasks differ by their weights
    alone, and ``epsilon`` is in these units: entries far below it are averaged. A weight that not all tasks have
    ``F_t`` of becomes the weighted mean.

    Raises:
        ValueError: a weight is negative, all are zero, or ``epsilon`` is not positive.
    """
    if epsilon <= 0:
        raise ValueError(f"epsilon is added to the Fisher information, above 0, got {epsilon}")
    check_weights("fisher", weights)
    information = complete(statistics)
    if information is None:
        return mean(x, weights)
    total, merged = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    for w, F, task in zip(weights.tolist(), information, x, strict=True):
        share = w * (F.to(x) + epsilon)  # (p, q)
        total += share
        merged += share * task
    return merged / total
