"""The weighted mean of the models. arXiv 2203.05482."""

from __future__ import annotations

from torch import Tensor

from orthoft.merging.methods.registry import method, weighted


@method("mean", commutes=True)
def mean(x: Tensor, weights: Tensor) -> Tensor:
    """Return ``sum_t w_t x_t / sum_t w_t``; a task that does not change the weight counts, as zero.

    Raises:
        ValueError: the weights sum to zero.
    """
    total = weights.sum()
    if total == 0:
        raise ValueError(f"method 'mean' divides by the sum of the weights, which is zero: {weights.tolist()}")
    return weighted(x, weights).sum(0) / total.to(x)
