"""What a merge method is, and where methods are found by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from orthoft.errors import unknown

Merge = Callable[..., Tensor]
Finish = Callable[[float, list[float]], float]


@dataclass(frozen=True)
class Method:
    """A pure function ``(x (T, p, q), weights (T,), *, params) -> (p, q)`` and what the engine has to know of it.

    ``x`` holds the tasks' deltas of one weight in the coordinates of a space; a task that does not change the weight is
    zero there; ``p = 1`` means a vector (a bias, a norm), not a matrix. The keyword-only parameters are the method's
    configuration; one named ``generator`` is not: the engine gives it a generator seeded by (seed, name of the weight).

    Args:
        commutes: ``f(U x V) = U f(x) V`` for all matrices with orthonormal columns U, rows V: the space makes no
            difference, so that `space="auto"` takes the cheapest.
        finish: a scale of the whole merged model, (||merged||, [||w_t D_t||]) -> scale, from Frobenius norms over all
            weights together. The engine multiplies each merged weight by it after the last one is known.
    """

    name: str
    merge: Merge
    commutes: bool
    finish: Finish | None
    parameters: Mapping[str, inspect.Parameter]
    draws: bool

    def bind(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return all parameters of the method, the defaults filled in.

        Raises:
            ValueError: a name is not a parameter of this method.
            TypeError: a parameter without default is missing, or a number was expected and something else came.
        """
        for name, value in given.items():
            if name not in self.parameters:
                raise self._unknown(name)
            expected = self.parameters[name].annotation
            if expected in ("float", "int") and not _is_number(value, expected):
                raise TypeError(f"parameter {name!r} of method {self.name!r} is a {expected}, got {value!r}")
        bound = {name: given.get(name, parameter.default) for name, parameter in self.parameters.items()}
        for name, value in bound.items():
            if value is inspect.Parameter.empty:
                raise TypeError(f"method {self.name!r} needs the parameter {name!r}")
        return bound

    def _unknown(self, name: str) -> ValueError:
        if not self.parameters:
            return ValueError(f"method {self.name!r} has no parameters, got {name!r}")
        return unknown(f"parameter of method {self.name!r}", name, self.parameters)


METHODS: dict[str, Method] = {}


def method(name: str, *, commutes: bool = False, finish: Finish | None = None) -> Callable[[Merge], Merge]:
    """Register a pure function as the merge method of this name; see `Method`."""

    def register(merge: Merge) -> Merge:
        keywords = {
            parameter.name: parameter
            for parameter in inspect.signature(merge).parameters.values()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        draws = keywords.pop("generator", None) is not None
        METHODS[name] = Method(name, merge, commutes, finish, keywords, draws)
        return merge

    return register


def get_method(name: str) -> Method:
    """Return a method by name, or raise a ValueError that lists them and names the nearest."""
    if name not in METHODS:
        raise unknown("merge method", name, METHODS)
    return METHODS[name]


def weighted(x: Tensor, weights: Tensor) -> Tensor:
    """Return ``w_t x_t`` (T, p, q)."""
    return x * weights.to(x).reshape(-1, 1, 1)


def _is_number(value: object, expected: str) -> bool:
    kinds = int if expected == "int" else int | float
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
