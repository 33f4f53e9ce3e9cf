"""PCB-Merging: entries compete within their task and balance against the other tasks. arXiv 2410.02396."""

from __future__ import annotations

import torch
from torch import Tensor

from orthoft.merging.methods.entrywise import kth_largest, require_density
from orthoft.merging.methods.registry import method, weighted

SLICE = 1 << 14  # entries of each task whose T x T comparisons are in memory at a time


@method("pcb", held=(6, 3))
def pcb(x: Tensor, weights: Tensor, *, density: float = 0.1, clip: float = 0.01) -> Tensor:
    """Return the mean of the tasks, each entry weighted by its score among the best of its task.

    ``y_t = w_t x_t``, its magnitudes clipped so that ``int(clip p q)`` of them change at either end;
    ``b_t = sign(y_t) o minmax(|y_t|)``; the score of a task is ``exp(T b_t^2) o sum_s tanh(b_t o b_s)``, and
    ``c_t = minmax(max(score, cut))`` with the cut just below the ``int(density p q)`` best scores, at least one. Where
    scores tie at the last of them, as the clipped entries of a task that stands alone do, the largest ``|y_t|`` before
    the clipping are the best, and all that equal the smallest of these; ``c_t = 0`` for the rest. The result is, entry
    by entry, ``sum_t c_t y_t / sum_t c_t``, and 0 where no task has a weight. ``minmax`` maps the values of a task to
    [0, 1]; if all are equal, to 1 when they are positive, else to 0.

    Of the authors' two scripts this is the one for vision models, in which the score does not depend on the scale of
    the deltas. They compare the entries of all weights together; here each weight of the model is for itself, as
    memory asks. Entrywise, hence different in each space.

    Raises:
        ValueError: ``density`` is outside (0, 1], or ``clip`` outside [0, 0.5).
    """
    require_density(density)
    if not 0.0 <= clip < 0.5:
        raise ValueError(f"clip is the share of entries clipped at either end, in [0, 0.5), got {clip}")
    whole = weighted(x, weights)
    y = torch.stack([clipped(task, clip) for task in whole])
    b = torch.stack([task.sign() * minmax(task.abs()) for task in y])
    kept = max(1, int(density * y[0].numel()))
    rows = max(1, SLICE // max(1, b.shape[-1]))
    scores = torch.cat([balance(part) for part in torch.split(b, rows, dim=1)], dim=1)
    c = torch.stack([shares(score, task.abs(), kept) for score, task in zip(scores, whole, strict=True)])
    total = c.sum(0)
    return (c * y).sum(0) / torch.where(total > 0, total, 1.0)


def balance(b: Tensor) -> Tensor:
    """Return the scores ``exp(T b_t^2) o sum_s tanh(b_t o b_s)`` (T, p, q)."""
    return torch.exp(len(b) * b.square()) * torch.tanh(b.unsqueeze(1) * b).sum(1)


def shares(score: Tensor, size: Tensor, kept: int) -> Tensor:
    """Return ``minmax(max(score, cut))`` (p, q) of the ``kept`` best, 0 elsewhere; ties are decided by ``size``."""
    last = kth_largest(score, kept)
    tied, above = score == last, int(torch.count_nonzero(score > last))
    reach = above + int(torch.count_nonzero(tied))
    c = minmax(score.clamp(min=kth_largest(score, min(reach + 1, score.numel()))))
    return torch.where(tied & (size < kth_largest(size[tied], kept - above)), 0.0, c)


def clipped(x: Tensor, share: float) -> Tensor:
    """Return ``x`` with magnitudes clipped to the range without the share at either end."""
    size, ends = x.abs(), int(share * x.numel())
    return x.sign() * size.clamp(kth_largest(size, x.numel() - ends), kth_largest(size, ends + 1))


def minmax(x: Tensor) -> Tensor:
    """Return ``(x - min) / (max - min)``; where all are equal, 1 if they are positive and else 0."""
    if x.numel() == 0:
        return x
    low, high = x.aminmax()
    return torch.where(high > low, (x - low) / torch.where(high > low, high - low, 1.0), (x > 0).to(x))
