"""Iso-CTS: the leading directions of the sum and of what each task adds, all equally strong. arXiv 2502.04959."""

from __future__ import annotations

import torch
from torch import Tensor

from orthoft.linalg import frobenius_norm
from orthoft.merging.methods.registry import method, weighted
from orthoft.merging.spectra import RANGE, Range, Triplets, largest_norm, participants, svd, whitened_product


@method(
    "iso_cts",
    commutes=lambda params: params["range"] == "numerical",
    entries=lambda params: params["range"] == "full",
    held=(1, 15),
)
def iso_cts(x: Tensor, weights: Tensor, *, common_fraction: float = 0.8, range: Range = "numerical") -> Tensor:
    """Return ``mean(s) polar(U) polar(V)^T`` of the common triplets ``U_c, s_c, V_c`` and those specific to each task.

    Common: the first c triplets of ``sum_t w_t x_t``. Specific: the first k of ``w_t x_t - U_c U_c^T w_t x_t``.
    ``k = round((R - int(common_fraction R)) / T)`` and ``c = R - T k``, where R is the joint rank of the tasks
    (`joint_rank`; min(m, n) for full-rank tasks, as published) and T counts the tasks that change the weight; fewer
    where a rank is less. The mean is over all that were taken. Vectors (p = 1) are averaged.

    ``range="full"`` is the published form, with R = min(p, q) and arbitrary vectors outside of the tasks' range.

    Raises:
        ValueError: ``common_fraction`` is outside [0, 1].
    """
    if not 0.0 <= common_fraction <= 1.0:
        raise ValueError(f"common_fraction is a share of the rank, in [0, 1], got {common_fraction}")
    tasks = weighted(x, weights)
    if x.shape[1] == 1:
        return tasks.mean(0)
    changed, rank = participants(tasks, range)
    if not changed:
        return tasks[0]
    k = round((rank - int(common_fraction * rank)) / len(changed))
    common = svd(tasks.sum(0), range, max(0, rank - len(changed) * k), RANGE * largest_norm(tasks))
    parts = [*(specific(task, common[0], k, range) for task in changed), common]
    s = torch.cat([s for _, s, _ in parts])
    mean = s.sum() / max(1, len(s))
    return whitened_product([(U, mean.expand(len(s)), Vh) for U, s, Vh in parts], range)


def specific(task: Tensor, U: Tensor, k: int, range: Range) -> Triplets:
    """Return the first k triplets of what is left of a task (p, q) outside of the columns of ``U`` (p, c)."""
    floor = RANGE * float(frobenius_norm(task))  # less is rounding of the projection
    return svd(task - U @ (U.mT @ task), range, k, floor)
