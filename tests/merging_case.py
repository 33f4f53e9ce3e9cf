"""What the contract suite has to know of a merge method; each group of oracles exports ``CASES``, by method name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Case:
    """``oracle(deltas, weights, **params)``: the same merge by naive dense formulas in float64, all space-free.

    Args:
        settings: parameters to test with; the defaults are always among them.
        symmetric: the order of tasks and weights together does not matter.
        idempotent: parameters with which one source of weight 1 gives itself; None if there are none.
        homogeneous: scaling all deltas scales the result.
        tasks: how many tasks the method takes, None for any number.
        weights_scale: a weight has the effect of scaling its task, none is divided out.
        tolerance: relative, of float32 in the full space against the oracle.
    """

    oracle: Callable[..., Tensor]
    settings: tuple[dict[str, Any], ...] = ()
    symmetric: bool = True
    idempotent: dict[str, Any] | None = None
    homogeneous: bool = True
    tasks: int | None = None
    weights_scale: bool = True
    tolerance: float = 2e-5
