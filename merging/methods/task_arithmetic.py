"""Task arithmetic: the weighted sum of the changes. arXiv 2212.04089."""

from __future__ import annotations

from torch import Tensor

from orthoft.merging.methods.registry import combined, method


@method("task_arithmetic", commutes=True, rowwise=True, coefficients=lambda weights: weights)
def task_arithmetic(x: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum ``sum_t w_t x_t``."""
    return combined(x, weights)
