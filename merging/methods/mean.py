"""The weighted mean of the models. arXiv 2203.05482."""

from __future__ import annotations

from torch import Tensor

from orthoft.merging.methods.registry import combined, method

CANCELLED = 1e-12  # a sum below this share of what it adds up is rounding: .1 + .2 - .3 is not 0


def shares(weights: Tensor) -> Tensor:
    """Return ``w_t / sum_s w_s``, or raise a ValueError if the weights sum to zero, but for rounding."""
    total = weights.sum()
    if total.abs() <= CANCELLED * weights.abs().sum():
        raise ValueError(f"method 'mean' divides by the sum of the weights, which is zero: {weights.tolist()}")
    return weights / total


@method("mean", commutes=True, rowwise=True, coefficients=shares)
def mean(x: Tensor, weights: Tensor) -> Tensor:
    """Return ``sum_t w_t x_t / sum_t w_t``; a task that does not change the weight counts, as zero.

    Raises:
        ValueError: the weights sum to zero.
    """
    return combined(x, shares(weights))
