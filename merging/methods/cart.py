"""CART: the mean of the tasks, and the leading directions in which each differs from it. arXiv 2412.12153."""

from __future__ import annotations

import math

from torch import Tensor

from orthoft.linalg import frobenius_norm
from orthoft.merging.methods.registry import method, weighted
from orthoft.merging.spectra import RANGE, Range, joint_rank, largest_norm, svd


@method(
    "cart",
    commutes=lambda params: params["range"] == "numerical",
    entries=lambda params: params["range"] == "full",
    held=(3, 9),
)
def cart(
    x: Tensor, weights: Tensor, *, rank_fraction: float = 0.04, scaling: float = 0.1, range: Range = "numerical"
) -> Tensor:
    """Return ``c + scaling sum_t SVD_k(w_t x_t - c)`` with the mean ``c = sum_t w_t x_t / T``.

    ``SVD_k`` keeps the first ``k = ceil(rank_fraction R)`` singular triplets. R is the joint rank of the centred tasks
    (`joint_rank`): min(m, n) for full-rank tasks, as published, and the sum of the ranks for low-rank ones, as in Core
    Space, from whose code the defaults are; both are meant to be tuned, ``rank_fraction`` in .04 to .32. A task that
    does not change the weight counts, as zero. Vectors (p = 1) are averaged.

    ``range="full"`` takes R = min(p, q), as the published code does on low-rank tasks too.

    Raises:
        ValueError: ``rank_fraction`` is outside [0, 1].
    """
    if not 0.0 <= rank_fraction <= 1.0:
        raise ValueError(f"rank_fraction is a share of the rank, in [0, 1], got {rank_fraction}")
    tasks = weighted(x, weights)
    centre = tasks.mean(0)
    if x.shape[1] == 1:
        return centre
    centred, rank, floor = list(tasks - centre), min(x.shape[1:]), 0.0
    if range == "numerical":
        floor = RANGE * largest_norm(tasks)  # less is rounding of the centring
        centred = [rest for rest in centred if frobenius_norm(rest) > floor]
        rank = joint_rank(centred)
    for rest in centred:
        U, s, Vh = svd(rest, range, math.ceil(rank_fraction * rank), floor)
        centre = centre + scaling * (U * s @ Vh)
    return centre
