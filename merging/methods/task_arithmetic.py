"""Task arithmetic. arXiv 2212.04089."""

from __future__ import annotations

from torch import Tensor

from orthoft.merging.methods.registry import method, weighted


@method("task_arithmetic", commutes=True)
def task_arithmetic(x: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum ``sum_t w_t x_t``."""
    return weighted(x, weights).sum(0)
