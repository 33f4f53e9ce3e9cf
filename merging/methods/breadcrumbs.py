"""Model Breadcrumbs: neither the largest nor the smallest entries. arXiv 2312.06795."""

from __future__ import annotations

import torch
from torch import Tensor

from orthoft.merging.methods.entrywise import Consensus, agree, kth_magnitude, require_density
from orthoft.merging.methods.registry import method, weighted


def band(x: Tensor, *, density: float, gamma: float, **params: object) -> Tensor:
    """Return the smallest and the largest magnitude (2,) that are kept of one task (p, q)."""
    kept = max(1, int(density * x.numel()))
    outliers = min(int(gamma * x.numel()), max(0, x.numel() - kept))
    return torch.stack([kth_magnitude(x, outliers + kept), kth_magnitude(x, outliers + 1)])


@method("breadcrumbs", rowwise=True, prepare=band)
def breadcrumbs(
    x: Tensor,
    weights: Tensor,
    *,
    density: float = 0.9,
    gamma: float = 0.01,
    consensus: Consensus | None = None,
    prepared: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum of the tasks, each without its outliers and without its smallest entries.

    Of the ``p q`` entries of a task the ``int(gamma p q)`` largest in magnitude are dropped, then enough of the
    smallest to keep ``int(density p q)``, at least one; if ``density + gamma > 1`` fewer outliers are dropped. Entries
    that equal the first or the last one kept are kept too. With a ``consensus`` the pruned tasks are merged by the sign
    election of TIES: "mean", "weighted_mean" or "sum" over the tasks that agree.

    Entrywise, hence different in each space.

    Raises:
        ValueError: ``density`` is outside (0, 1], ``gamma`` outside [0, 1), or a weighted mean with a negative weight.
    """
    require_density(density)
    if not 0.0 <= gamma < 1.0:
        raise ValueError(f"gamma is the share of the largest entries dropped, in [0, 1), got {gamma}")
    if prepared is None:
        prepared = torch.stack([band(task, density=density, gamma=gamma) for task in x])
    smallest, largest = prepared.to(x).reshape(-1, 2, 1, 1).unbind(1)  # (T, 1, 1)
    size = x.abs()
    pruned = torch.where((size >= smallest) & (size <= largest), x, 0.0)
    return agree(weighted(pruned, weights), weights, consensus)
