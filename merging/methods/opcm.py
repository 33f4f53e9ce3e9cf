"""OPCM: tasks are added one after the other, each without what the merged model already holds. arXiv 2501.09522."""

from __future__ import annotations

import torch
from torch import Tensor

from orthoft.merging.methods.registry import method, weighted
from orthoft.merging.spectra import ABSENT, largest_norm, range_svd


def mean_task_norm(merged: float, tasks: list[float]) -> float:
    """Return the scale ``mean_t ||D_t|| / ||S_T||``, which is ``1 / l_T`` of OPCM: norms over the whole model."""
    return sum(tasks) / len(tasks) / merged if merged > 0 else 1.0


@method("opcm", commutes=True, finish=mean_task_norm, held=(1, 11))
def opcm(x: Tensor, weights: Tensor, *, alpha: float = 0.5) -> Tensor:
    """Return ``S_T``, the sum of the tasks ``D_t = w_t x_t``, each cleaned of what it shares with the sum before it.

    ``S_1 = D_1``; ``S_t = S_{t-1} + D_t - U (mask o (U^T D_t V)) V^T`` with the thin SVD ``S_{t-1} = U diag(s) V^T`` on
    its numerical range; ``mask`` is 1 on the whole diagonal and on the leading k x k block, k the 0-based index of the
    first singular value at which the cumulated share of ``s`` exceeds ``alpha`` (all of them if none does, so that
    ``alpha = 1`` removes everything within the range). Vectors (p = 1) are summed.

    The method then keeps the model at the mean norm of its tasks, ``M_t = S_t / l_t`` with the one scalar
    ``l_t = ||S_t|| / mean_{i <= t} ||D_i||`` over all weights. The next step projects on the singular vectors of
    ``M_t``, chosen by shares of its singular values: both are those of ``S_t``. And it accumulates ``l_t M_t = S_t``.
    So no ``l_t`` but the last has any effect, and it may wait until all weights are done: `mean_task_norm`.

    On low-rank deltas the published code also removes diagonal entries over the null space of ``S``, whose basis is
    arbitrary; on the range alone the result depends on the inputs only and commutes with changes of basis.

    Raises:
        ValueError: ``alpha`` is outside [0, 1].
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is a share of the singular values, in [0, 1], got {alpha}")
    tasks = weighted(x, weights)
    floor = ABSENT * largest_norm(tasks)
    merged = tasks[0]
    for task in tasks[1:]:
        merged = merged + (task if task.shape[0] == 1 else task - shared(task, merged, alpha, floor))
    return merged


def shared(task: Tensor, merged: Tensor, alpha: float, floor: float) -> Tensor:
    """Return what OPCM removes from ``task`` (p, q): ``U (mask o (U^T D V)) V^T`` over the range of ``merged``."""
    p, q = corner(merged)  # in triangular bases a sum of t tasks is zero outside of its first t r rows and columns
    U, s, Vh = range_svd(merged[:p, :q], floor)
    k = int((s.cumsum(0) <= alpha * s.sum()).sum()) if alpha < 1.0 else len(s)
    within, removed = task[:p, :q], torch.zeros_like(task)
    block = U[:, :k].mT @ within @ Vh[:k].mT  # (k, k)
    diagonal = ((U[:, k:].mT @ within) * Vh[k:]).sum(1)  # (r - k,)
    removed[:p, :q] = U[:, :k] @ (block @ Vh[:k]) + U[:, k:] * diagonal @ Vh[k:]
    return removed


def corner(matrix: Tensor) -> tuple[int, int]:
    """Return the number of leading rows and columns outside of which a matrix is zero, at least one of each."""
    rows, columns = (matrix != 0).any(1).nonzero(), (matrix != 0).any(0).nonzero()
    return (int(rows[-1]) + 1, int(columns[-1]) + 1) if len(rows) else (1, 1)
