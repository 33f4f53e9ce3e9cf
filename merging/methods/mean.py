"""The weighted mean of the models. arXiv 2203.05482."""

from __future__ import annotations

from torch import Tensor

from orthoft.merging.methods.registry import combined, method


def shares(weights: Tensor) -> Tensor:
    """Return ``w_t / sum_s w_s``, or raise a ValueError if the weights sum to zero."""
    total = weights.sum()
    if total == 0:
        raise ValueError(f"method 'mean' divides by the sum of the weights, which is zero: {weights.tolist()}")
    return weights / total


@method("mean", commutes=True, rowwise=True, coefficients=shares)
def mean(x: Tensor, weights: Tensor) -> Tensor:
    """Return ``sum_t w_t x_t / sum_t w_t``; a task that does not change the weight counts, as zero.

    Raises:
        ValueError: the weights sum to zero.
    """
    return combined(x, shares(weights))
