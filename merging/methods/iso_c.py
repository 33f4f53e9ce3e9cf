"""Iso-C: the sum of the tasks with equal singular values. arXiv 2502.04959."""

from __future__ import annotations

from torch import Tensor

from orthoft.merging.methods.registry import method, weighted
from orthoft.merging.spectra import Range, isotropised


@method(
    "iso_c",
    commutes=lambda params: params["range"] == "numerical",
    entries=lambda params: params["range"] == "full",
    held=(1, 11),
)
def iso_c(x: Tensor, weights: Tensor, *, range: Range = "numerical") -> Tensor:
    """Return ``mean(s) U V^T`` of the sum ``sum_t w_t x_t = U diag(s) V^T``, on its numerical range.

    Vectors (p = 1) are averaged. ``range="full"`` is the published form, over all min(p, q) singular values: of
    low-rank tasks it is full rank, most of its norm lies in arbitrary directions, and the mean is diluted.
    """
    tasks = weighted(x, weights)
    return tasks.mean(0) if x.shape[1] == 1 else isotropised(tasks.sum(0), range)
