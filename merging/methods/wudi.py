"""WUDI: the merge that disturbs the tasks least on the inputs that they react to. arXiv 2503.08099."""

from __future__ import annotations

import torch
from torch import Tensor

from orthoft.merging.methods.registry import method, weighted
from orthoft.merging.spectra import RANGE, changing


@method("wudi", commutes=True, held=(3, 14))
def wudi(x: Tensor, weights: Tensor) -> Tensor:
    """Return the X of least norm that minimises ``sum_t ||(X - D_t) D_t^T||^2 / ||D_t||^2`` with ``D_t = w_t x_t``.

    ``X = (sum_t D_t G_t) (sum_t G_t)^+`` with ``G_t = D_t^T D_t / ||D_t||^2`` (q, q), in float64, on the joint row
    range of the tasks, each with norm 1. The published code takes 300 Adam steps from the sum of the tasks, which is in
    the same range, and stops short of it. Zero tasks drop out. Vectors (p = 1) are averaged.
    """
    tasks = weighted(x, weights)
    if x.shape[1] == 1:
        return tasks.mean(0)
    gram = x.new_zeros(x.shape[2], x.shape[2], dtype=torch.float64)
    target = torch.zeros_like(tasks[0], dtype=torch.float64)
    for task in changing(tasks.double()):
        unit = task / torch.linalg.vector_norm(task)
        of_task = unit.mT @ unit
        gram += of_task
        target += task @ of_task
    squares, V = torch.linalg.eigh(gram)
    kept = squares > RANGE**2 * squares[-1:]
    squares, V = squares[kept], V[:, kept]
    merged: Tensor = (target @ V / squares) @ V.mT
    return merged.to(x.dtype)
