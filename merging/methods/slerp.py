"""SLERP: two tasks along the arc between them, not the chord. Shoemake, SIGGRAPH 1985."""

from __future__ import annotations

import torch
from torch import Tensor

from orthoft.merging.methods.registry import method
from orthoft.merging.methods.sphere import On, combine, cosines, on_deltas, on_weights, shares

PARALLEL = 0.9995  # beyond this cosine the arc is a line, and one of opposite directions is not unique


@method("slerp", commutes=on_deltas, entries=on_weights)
def slerp(
    x: Tensor, weights: Tensor, *, t: float | None = None, on: On = "deltas", base: Tensor | None = None
) -> Tensor:
    """Return ``(sin((1 - t) a) x_0 + sin(t a) x_1) / sin a`` with ``a`` the angle between the two tasks.

    The weights say where on the arc: ``t = w_1 / (w_0 + w_1)``, half way unless given; their scale has no effect.
    Instead ``t`` may be given, with equal weights. Where ``|cos a| > 0.9995``, or a task is zero and has no direction,
    the result is ``(1 - t) x_0 + t x_1``. With ``on="weights"`` the arc is that between the fine-tuned weights
    ``base + x_t``, which are mostly so near to each other that this is the line; the result is a delta either way.

    Raises:
        ValueError: there are not two tasks, ``t`` is outside [0, 1] or given with unequal weights, the weights are
            negative or all zero, or the base is missing.
    """
    if len(x) != 2:
        raise ValueError(f"method 'slerp' takes two sources, got {len(x)}: take 'multislerp' or 'karcher' for others")
    share = place(weights, t)
    return combine(x, base, on, lambda products: arc(products, share))


def place(weights: Tensor, t: float | None) -> float:
    """Return the share of the second task, by the weights or as given."""
    if t is None:
        return float(shares(weights, "slerp")[1])
    if not 0.0 <= t <= 1.0:
        raise ValueError(f"t is the place between the two sources, in [0, 1], got {t}")
    if weights[0] != weights[1]:
        raise ValueError(f"t and weights both say how far to go to the second source, got t = {t}: give one of them")
    return t


def arc(products: Tensor, t: float) -> Tensor:
    """Return the coefficients (2,) of SLERP from the inner products (2, 2) of the ends."""
    norms, cosine = cosines(products)
    ends = torch.tensor([1.0 - t, t], dtype=products.dtype, device=products.device)
    if cosine[0, 1].abs() > PARALLEL or not norms.all():
        return ends
    angle = cosine[0, 1].acos()
    return (ends * angle).sin() / angle.sin()
