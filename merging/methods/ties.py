"""TIES: trim, elect a sign, merge those that agree. arXiv 2306.01708."""

from __future__ import annotations

import torch
from torch import Tensor

from orthoft.merging.methods.registry import method, weighted


@method("ties")
def ties(x: Tensor, weights: Tensor, *, density: float = 0.2) -> Tensor:
    """Return the mean of the entries whose sign is that of the sum, after trimming each task to its largest entries.

    With ``y_t = w_t trim(x_t)`` and the elected sign ``s = sign(sum_t y_t)``, the result is, entry by entry, the mean
    of the ``y_t`` whose sign is ``s``, and 0 where ``s = 0``. ``trim`` keeps the ``int(density p q)`` entries, at least
    one, largest in magnitude, and all that equal the smallest of them. The weights scale the tasks before the election
    and are not divided out: equal weights w give w times the unweighted result.

    Entrywise, hence different in each space.

    Raises:
        ValueError: ``density`` is outside (0, 1].
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density is the share of entries kept, in (0, 1], got {density}")
    y = weighted(torch.stack([trim(task, density) for task in x]), weights)
    agrees = y.sign() == y.sum(0).sign()
    agrees &= y != 0
    return (y * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def trim(x: Tensor, density: float) -> Tensor:
    """Return ``x`` with only the share ``density`` of its entries that is largest in magnitude."""
    size = x.abs().flatten()
    kept = max(1, int(density * size.numel()))
    threshold = torch.kthvalue(size, size.numel() - kept + 1).values
    return torch.where(x.abs() >= threshold, x, 0.0)
