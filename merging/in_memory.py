"""The merge of deltas in memory, of one weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from orthoft.delta import Delta
from orthoft.merging.files.tensors import is_finite
from orthoft.merging.weightwise import Rescale, Statistics, merge_weight, weight_generator, weighted_norms
from orthoft.merging.wish import wish_for


def merge_deltas(
    deltas: Sequence[Delta],
    *,
    method: str,
    space: str = "auto",
    weights: Sequence[float] | None = None,
    base: Tensor | None = None,
    statistics: Statistics | None = None,
    isotropise: bool = False,
    rescale: Rescale = "none",
    scale: float = 1.0,
    seed: int = 0,
    **params: Any,
) -> Delta:
    """Return the merge of several changes of one weight, in float32 or more; factored where the space keeps factors.

    ``isotropise``, ``rescale`` and ``scale`` are those of `orthoft.merging.weightwise.Post`; the "model" is this one
    weight here.

    Args:
        deltas: one per task, in order, all (m, n).
        method: a name in `orthoft.merging.METHODS`; ``params`` are its parameters and those of the space.
        space: a name in `orthoft.merging.SPACES`, or "auto": core where the method provably gives the same there and
            all deltas have factors, else full.
        weights: one number per task, 1 each unless given; what they do is the method's definition.
        base: the (m, n) weight, for spaces and methods that need it.
        statistics: one tensor per task, or None, for methods that use numbers from data: see
            `orthoft.merging.statistics`.
        seed: of methods that draw.

    Raises:
        ValueError: an unknown method, parameter or space, deltas of different shapes, or NaN or Inf in one.
        TypeError: a parameter of another type.
    """
    if not deltas:
        raise ValueError("there is nothing to merge: no deltas were given")
    wish = wish_for(
        len(deltas),
        method=method,
        space=space,
        weights=weights,
        isotropise=isotropise,
        rescale=rescale,
        scale=scale,
        **params,
    )
    _check(deltas)
    deltas = [delta.upcast() for delta in deltas]
    choice = wish.choice([delta.rank() for delta in deltas], vector=False)
    if space not in ("auto", choice.space.name):
        wish.refuse_space()
    finish = choice.finish
    result = merge_weight(deltas, choice, base, weight_generator(seed, ""), statistics, 1.0 if finish else scale)
    if finish is None:
        return result.delta
    return result.delta.scaled(scale * finish(result.norm, weighted_norms(result, wish.weights)))


def _check(deltas: Sequence[Delta]) -> None:
    for index, delta in enumerate(deltas):
        if delta.shape != deltas[0].shape:
            raise ValueError(f"delta {index} has shape {delta.shape}, delta 0 has {deltas[0].shape}")
        if not all(is_finite(part) for part in delta.factors() or (delta.dense(),)):
            raise ValueError(f"delta {index} contains NaN or Inf")
