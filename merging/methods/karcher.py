"""Karcher mean: the direction nearest to those of all tasks on the sphere, at their mean norm. arXiv 2603.04972."""

from __future__ import annotations

import torch
from torch import Tensor

from orthoft.merging.methods.registry import method
from orthoft.merging.methods.sphere import (
    On,
    at_mean_norm,
    combine,
    cosines,
    direction,
    length_of,
    on_deltas,
    on_weights,
    shares,
)


@method("karcher", commutes=on_deltas, entries=on_weights)
def karcher(
    x: Tensor,
    weights: Tensor,
    *,
    on: On = "deltas",
    max_iter: int = 100,
    tol: float = 1e-8,
    base: Tensor | None = None,
) -> Tensor:
    """Return ``(sum_t v_t ||x_t||) m``, ``m`` the unit vector with the least ``sum_t v_t angle(m, x_t)^2``.

    From the mean direction, ``m <- exp_m(sum_t v_t log_m(u_t))`` with ``u_t = x_t / ||x_t||``, the shares ``v_t = w_t /
    sum w`` and ``log_m(u) = (u - <u, m> m) a / sin a``, ``cos a = <u, m>``; until the step is shorter than ``tol``
    (in radians), at most ``max_iter`` times. All of it in the coordinates of the ``u_t``, from their inner products.

    The weights are relative. A zero task has no direction and the norm 0. Where the directions cancel, the result is
    ``sum_t v_t x_t``. With ``on="weights"`` this is done to the fine-tuned weights ``base + x_t``, and the result is a
    delta again.

    Raises:
        ValueError: a weight is negative, all are zero, ``max_iter`` or ``tol`` is not positive, or the base is missing.
    """
    if max_iter < 1 or tol <= 0.0:
        raise ValueError(f"karcher takes max_iter from 1 on and tol (in radians) above 0, got {max_iter} and {tol}")
    v = shares(weights, "karcher")
    return combine(x, base, on, lambda products: nearest(products, v.to(products), max_iter, tol))


def nearest(products: Tensor, v: Tensor, max_iter: int, tol: float) -> Tensor:
    """Return the coefficients (T,) of the Karcher mean from inner products (T, T) and shares (T,)."""
    norms, cosine = cosines(products)
    a = direction(cosine, v)
    if a is None:
        return v
    directed = v * (norms > 0)
    for _ in range(max_iter):
        step = mean_log(cosine, a, directed / directed.sum())
        length = length_of(cosine, step)
        if length < tol:
            break
        a = length.cos() * a + length.sin() / length * step
        a = a / length_of(cosine, a)
    return at_mean_norm(a, norms, v)


def mean_log(cosine: Tensor, a: Tensor, v: Tensor) -> Tensor:
    """Return ``sum_t v_t log_m(u_t)`` at ``m = sum_t a_t u_t`` as coefficients (T,) on the ``u_t``."""
    dots = (cosine @ a).clamp(-1.0, 1.0)  # <u_t, m>
    angles = dots.acos()
    flat = angles.sin() < 1e-12  # at m itself, and opposite to it, where no direction is shortest
    pull = v * torch.where(flat, 1.0, angles / torch.where(flat, 1.0, angles.sin()))
    return pull - (pull @ dots) * a
