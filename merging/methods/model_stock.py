"""Model Stock: as far from the base to the mean of the models as their directions agree. arXiv 2403.19522."""

from __future__ import annotations

import torch
from torch import Tensor

from orthoft.merging.methods.registry import method, weighted
from orthoft.merging.methods.sphere import cosines, gram

ROWS = 64  # in float64 at a time


@method("model_stock", commutes=lambda params: not params["filter_wise"])
def model_stock(x: Tensor, weights: Tensor, *, filter_wise: bool = False) -> Tensor:
    """Return ``t mean_t(w_t x_t)`` with ``t = T c / (1 + (T - 1) c)``, ``c`` the mean cosine of two of the T tasks.

    The paper has two models; the mean over all pairs extends it to T. One task alone has ``t = 1``. A zero task has no
    direction, so that ``t`` is that of the others; it counts in the mean. For ``c <= 0`` there is nothing that the
    tasks share, and ``t = 0``: the formula would go to the far side of the base, and to infinity. Nearly orthogonal
    deltas, as those of LoRA, give next to nothing.

    ``filter_wise``: a ratio for each row of the weight (an output), not one for the weight; different in each space.
    """
    y = weighted(x, weights)
    if not filter_wise:
        return ratio(gram(y)).to(y) * y.mean(0)
    rows = torch.split(y.transpose(0, 1), ROWS)  # (ROWS, T, q) each
    ratios = torch.cat([ratio(wide @ wide.mT) for part in rows for wide in [part.double()]])  # (p,)
    return ratios.to(y)[:, None] * y.mean(0)


def ratio(products: Tensor) -> Tensor:
    """Return ``t`` of Model Stock (...), in [0, 1], from inner products (..., T, T)."""
    norms, cosine = cosines(products)
    tasks = (norms > 0).sum(-1)
    pairs = cosine.sum((-2, -1)) - cosine.diagonal(dim1=-2, dim2=-1).sum(-1)
    c = pairs.clamp(min=0.0) / (tasks * (tasks - 1)).clamp(min=1)
    return torch.where(tasks > 1, tasks * c / (1.0 + (tasks - 1) * c), 1.0)
