"""What the entrywise methods share: exact selection by magnitude, random numbers by row, the sign consensus of TIES."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Consensus = Literal["mean", "weighted_mean", "sum"]


def require_density(density: float) -> None:
    """Raise a ValueError for a share of entries that is not in (0, 1]."""
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density is the share of entries kept, in (0, 1], got {density}")


def kth_largest(values: Tensor, k: int) -> Tensor:
    """Return the ``k``-th largest of the values, a scalar tensor, exact; 0 where there are none."""
    return _select(values.detach().flatten().clone(), k)


def kth_magnitude(x: Tensor, k: int) -> Tensor:
    """Return the ``k``-th largest ``|x|``, a scalar tensor, exact; 0 where ``x`` has no entries."""
    return _select(x.detach().abs().flatten(), k)


def _select(own: Tensor, k: int) -> Tensor:
    """Return the ``k``-th largest of a contiguous vector, and leave the vector in another order."""
    if own.numel() == 0:
        return own.new_zeros(())
    place = own.numel() - k
    if own.device.type != "cpu":
        return own.kthvalue(place + 1).values
    own.numpy().partition(place)  # in place; this selection is vectorised, torch's on the CPU is not
    return own[place].clone()


def threshold(x: Tensor, *, density: float, **params: object) -> Tensor:
    """Return the smallest magnitude that `trim` keeps of one task (p, q): what TIES prepares."""
    return kth_magnitude(x, max(1, int(density * x.numel())))


def trim(x: Tensor, density: float, prepared: Tensor | None) -> Tensor:
    """Return the tasks (T, p, q) with 0 for all but the ``int(density p q)`` entries of each largest in magnitude.

    At least one is kept, and all that equal the smallest of them. ``prepared`` (T,) is the `threshold` of each.
    """
    if prepared is None:
        prepared = torch.stack([threshold(task, density=density) for task in x])
    return torch.where(x.abs() >= prepared.to(x).reshape(-1, 1, 1), x, 0.0)


def uniform(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return numbers in [0, 1) for the entries of ``x`` (T, p, q), float32, drawn row after row.

    Rows one after the other draw what all at once would, so that with a generator on the CPU the result does not depend
    on the slices of rows. It is drawn on the generator's device, so that neither does it on that of ``x``.
    """
    tasks, rows, columns = x.shape
    drawn = torch.rand(rows, tasks, columns, generator=generator, dtype=torch.float32, device=generator.device)
    return drawn.transpose(0, 1).to(x.device)


def agree(y: Tensor, weights: Tensor, consensus: Consensus | None) -> Tensor:
    """Return the sign consensus of ``y_t = w_t x_t`` (T, p, q), entry by entry; without one ``sum_t y_t``.

    The elected sign is that of ``sum_t y_t``; a task agrees where its ``y_t`` has it, and zeros never do. "sum" adds up
    the agreeing entries, "mean" divides that by their number, "weighted_mean" by the sum of their weights; where no
    task agrees the result is 0.

    Raises:
        ValueError: a weighted mean with a negative weight.
    """
    if consensus is None:
        return y.sum(0)
    if consensus == "weighted_mean" and (weights < 0).any():
        raise ValueError(f"consensus 'weighted_mean' needs weights of 0 or more, got {weights.tolist()}: take 'mean'")
    sign, sizes = elected(y)
    total = sign * sizes.sum(0)
    if consensus == "sum":
        return total
    return total / votes(sizes, weights if consensus == "weighted_mean" else torch.ones_like(weights))


def elected(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sign (p, q) of ``sum_t y_t``, and ``|y_t|`` (T, p, q) where ``y_t`` has that sign, else 0."""
    sign = y.sum(0).sign()
    return sign, (y * sign).clamp_(min=0.0)


def votes(sizes: Tensor, weights: Tensor) -> Tensor:
    """Return the sum (p, q) of the weights of those whose size (T, p, q) is not 0, and 1 where there are none."""
    total = torch.einsum("t,tpq->pq", weights.to(sizes), sizes.sign())
    return torch.where(total > 0, total, 1.0)
