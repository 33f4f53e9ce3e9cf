"""SCE: select the entries in which the tasks differ, calculate a weight for each task, erase minority signs.

arXiv 2408.07990.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orthoft.merging.methods.entrywise import elected, kth_magnitude, require_density, votes
from orthoft.merging.methods.registry import method, weighted


@method("sce", held=(3, 3))
def sce(x: Tensor, weights: Tensor, *, density: float = 1.0) -> Tensor:
    """Return the mean of the tasks over those that agree with the elected sign, weighted by their mean squares.

    With ``y_t = w_t x_t``, zero but for the selected entries, ``c_t = ||y_t||^2 / sum_s ||y_s||^2`` and the elected
    sign ``s = sign(sum_t y_t)``, the result is, entry by entry, ``sum_t c_t y_t / sum_t c_t`` over the tasks whose sign
    is ``s``, and 0 where ``s = 0``. Selected is the share ``density`` of the entries with the largest variance over the
    tasks, out of those that vary at all, at least one, and all that equal the smallest; all if none varies.

    Entrywise, hence different in each space; ``c_t`` belongs to one weight of the model.

    Raises:
        ValueError: ``density`` is outside (0, 1].
    """
    require_density(density)
    y = weighted(x, weights)
    if density < 1.0:
        y = torch.where(selected(y, density), y, 0.0)
    sizes = torch.linalg.vector_norm(y, dim=2).double().square().sum(1)  # (T,), row by row
    shares = sizes / sizes.max().clamp(min=torch.finfo(torch.float64).tiny)
    sign, agreeing = elected(y)
    return sign * weighted(agreeing, shares).sum(0) / votes(agreeing, shares)


def selected(y: Tensor, density: float) -> Tensor:
    """Return where the variance over the tasks is among the largest: (p, q), boolean."""
    if not y.numel():  # of which torch has no variance, and says so
        return torch.zeros(y.shape[1:], dtype=torch.bool, device=y.device)
    variance = y.var(0, correction=0)
    varying = int(torch.count_nonzero(variance))
    return variance >= kth_magnitude(variance, max(1, int(density * varying)))
