"""Multi-SLERP: the mean direction of the tasks, at their mean norm."""

from __future__ import annotations

from torch import Tensor

from orthoft.merging.methods.registry import method
from orthoft.merging.methods.sphere import On, at_mean_norm, combine, cosines, direction, on_deltas, on_weights, shares


@method("multislerp", commutes=on_deltas, entries=on_weights)
def multislerp(x: Tensor, weights: Tensor, *, on: On = "deltas", base: Tensor | None = None) -> Tensor:
    """Return ``(sum_t v_t ||x_t||) m / ||m||`` with ``m = sum_t v_t x_t / ||x_t||``, shares ``v_t = w_t / sum w``.

    The step through the tangent space at ``m`` by which the method is known has no effect: the mean of the tangents at
    the mean direction, with the same weights, is zero. So this is the whole of it. The weights are relative. A zero
    task has no direction and the norm 0. Where the directions cancel, ``m = 0``, the result is ``sum_t v_t x_t``. With
    ``on="weights"`` this is done to the fine-tuned weights ``base + x_t``, and the result is a delta again.

    Raises:
        ValueError: the weights are negative or all zero, or the base is missing.
    """
    v = shares(weights, "multislerp")
    return combine(x, base, on, lambda products: mean_direction(products, v.to(products)))


def mean_direction(products: Tensor, v: Tensor) -> Tensor:
    """Return the coefficients (T,) of Multi-SLERP from inner products (T, T) and shares (T,)."""
    norms, cosine = cosines(products)
    a = direction(cosine, v)
    return v if a is None else at_mean_norm(a, norms, v)
