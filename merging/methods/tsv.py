"""TSV-M: the leading singular vectors of the tasks, made orthogonal to each other. arXiv 2412.00081."""

from __future__ import annotations

from torch import Tensor

from orthoft.merging.methods.registry import method, weighted
from orthoft.merging.spectra import Range, participants, svd, whitened_product


@method(
    "tsv",
    commutes=lambda params: params["range"] == "numerical",
    entries=lambda params: params["range"] == "full",
    held=(5, 8),
)
def tsv(x: Tensor, weights: Tensor, *, range: Range = "numerical") -> Tensor:
    """Return ``polar([U_1 ... U_T]) diag(s_1 ... s_T) polar([V_1 ... V_T])^T`` from the leading triplets of each task.

    A task ``w_t x_t`` gives its first ``k = max(1, int(R / T))`` singular triplets, at most as many as its rank. R is
    the joint rank of the tasks (`joint_rank`): min(m, n) for full-rank tasks, as published, and the sum of the ranks
    for low-rank ones, as in Core Space. T counts the tasks that change the weight. Vectors (p = 1) are averaged.

    ``range="full"`` is the published form, with R = min(p, q) and whatever vectors lie outside of the range of a
    low-rank task: these turn the others when all are made orthogonal, and are arbitrary.
    """
    tasks = weighted(x, weights)
    if x.shape[1] == 1:
        return tasks.mean(0)
    changed, rank = participants(tasks, range)
    if not changed:
        return tasks[0]
    k = max(1, rank // len(changed))
    return whitened_product([svd(task, range, k) for task in changed], range)
