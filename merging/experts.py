"""Tensors that hold the matrices of several experts: each expert is merged by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from orthoft.delta import Delta, Dense
from orthoft.linalg import at_least_float32
from orthoft.merging.weightwise import Merged, Statistics

MergeOne = Callable[[Sequence[Delta], Tensor, Statistics | None], Merged]


def one_under_the_other(delta: Delta, weight: Tensor) -> Delta:
    """Return a change of E experts (E, p q), read before as one matrix, in the shape (E p, q) of the weight."""
    return delta if delta.shape == weight.shape else Dense(delta.dense().reshape(weight.shape))


def merge_experts(
    tasks: Sequence[Delta],
    weight: Tensor,
    statistics: Statistics | None,
    experts: int,
    inputs_first: bool,
    merge: MergeOne,
) -> Merged:
    """Return the merged change of E experts, dense and one under the other (E p, q), with norms over all of them.

    No more than one expert of each task is in memory.

    Args:
        tasks: the changes (E p, q), as is the ``weight``.
        statistics: numbers of each entry of the tasks, or None; others are left out.
        experts: E.
        inputs_first: the experts are stored as (inputs, outputs), and merged the other way round.
        merge: of the tasks, the weight and the statistics of one expert.
    """
    size = len(weight) // experts
    numbers = statistics and [_like(one, weight) for one in statistics]
    merged = at_least_float32(weight.new_empty(weight.shape))
    norms: list[list[float]] = []
    for start in range(0, len(weight), size):
        rows = slice(start, start + size)
        one = merge(
            [part.transposed() if inputs_first else part for part in (t.part(start, start + size) for t in tasks)],
            _turned(weight[rows], inputs_first),
            numbers and [None if own is None else _turned(own[rows], inputs_first) for own in numbers],
        )
        merged[rows] = _turned(one.delta.dense(), inputs_first)
        norms.append([one.norm, *one.task_norms])
    whole, *of_tasks = (math.hypot(*each) for each in zip(*norms, strict=True))
    return Merged(Dense(merged), whole, of_tasks)


def _turned(matrix: Tensor, inputs_first: bool) -> Tensor:
    return matrix.mT if inputs_first else matrix


def _like(numbers: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if numbers is None or numbers.numel() != weight.numel() else numbers.reshape(weight.shape)
