"""What a merge method is, and where methods are found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthoft.errors import unknown
from orthoft.merging.parameters import Parameters

Merge = Callable[..., Tensor]
Prepare = Callable[..., Tensor]
Finish = Callable[[float, list[float]], float]
Params = Mapping[str, Any]
Property = bool | Callable[[Params], bool]  # of a method as such, or of the method with these parameters


@dataclass(frozen=True)
class Method:
    """A pure function ``(x (T, p, q), weights (T,), *, params) -> (p, q)`` and what the engine has to know of it.

    ``x`` holds the tasks' deltas of one weight in the coordinates of a space; a task that does not change the weight is
    zero there; ``p = 1`` means a vector (a bias, a norm), not a matrix. The keyword-only parameters are the method's
    configuration, but for these, which the engine gives to methods that name them:

    * ``generator``: a random generator, seeded by (seed, name of the weight).
    * ``base``: the weight itself (p, q), in the full space only.
    * ``statistics``: numbers from data, one tensor per task (see `orthoft.merging.statistics`), None where a task has
      none of this weight; in the full space only.
    * ``prepared``: what ``prepare`` made of each whole task, stacked (T, ...); None if the method has to do it itself.

    Args:
        commutes: ``f(U x V) = U f(x) V`` for all matrices with orthonormal columns U, rows V: the space makes no
            difference, so that `space="auto"` takes the cheapest.
        entries: the method is about the entries of the weight itself, so that only the full space will do.
        rowwise: each row of the result depends on that row of ``x`` only (given ``prepared``), so that the engine may
            go through a large weight in slices of rows.
        prepare: ``(x_t (p, q), **params) -> Tensor``, what a row-wise method has to know of each whole task.
        coefficients: weights (T,) -> ``c`` (T,) of a linear method, ``sum_t c_t x_t``: of factors it is the factors
            side by side, in any coordinates.
        held: (a, b), of ``a T + b`` numbers that are in memory for each entry of the weight at the worst moment of a
            merge that does not go through slices, ``x`` among them: what a dry run says.
        finish: a scale of the whole merged model, (||merged||, [||w_t D_t||]) -> scale, from Frobenius norms over all
            weights together. The engine multiplies each merged weight by it after the last one is known.
    """

    name: str
    merge: Merge
    parameters: Parameters
    commutes: Callable[[Params], bool]
    entries: Callable[[Params], bool]
    rowwise: bool
    prepare: Prepare | None
    coefficients: Callable[[Tensor], Tensor] | None
    finish: Finish | None
    held: tuple[int, int] = (3, 2)

    def bind(self, given: Params) -> dict[str, Any]:
        """Return all parameters of the method, the defaults filled in; see `Parameters.bind`."""
        return self.parameters.bind(given)

    def needs(self, extra: str) -> bool:
        """Say whether the method takes this of the engine: generator, base, statistics or prepared."""
        return extra in self.parameters.extras

    def rehearse(self, weights: Tensor, params: Params) -> None:
        """Merge a few made-up numbers: values that the method refuses are told before any file is read."""
        x = torch.arange(len(weights) * 6.0).reshape(-1, 2, 3).cos()
        extras: dict[str, Any] = {"generator": torch.Generator(), "base": torch.ones(2, 3)}
        self.merge(x, weights, **params, **{name: extras[name] for name in extras if self.needs(name)})


METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    commutes: Property = False,
    entries: Property = False,
    rowwise: bool = False,
    prepare: Prepare | None = None,
    coefficients: Callable[[Tensor], Tensor] | None = None,
    finish: Finish | None = None,
    held: tuple[int, int] = (3, 2),
) -> Callable[[Merge], Merge]:
    """Register a pure function as the merge method of this name; see `Method`."""

    def register(merge: Merge) -> Merge:
        parameters = Parameters(f"method {name!r}", merge)
        METHODS[name] = Method(
            name, merge, parameters, _of(commutes), _of(entries), rowwise, prepare, coefficients, finish, held
        )
        return merge

    return register


def get_method(name: str) -> Method:
    """Return a method by name, or raise a ValueError that lists them and names the nearest."""
    if name not in METHODS:
        raise unknown("merge method", name, METHODS)
    return METHODS[name]


def weighted(x: Tensor, weights: Tensor) -> Tensor:
    """Return ``w_t x_t`` (T, p, q); ``x`` itself, uncopied, where all weights are 1: it is not to be written into."""
    return x if bool((weights == 1).all()) else x * weights.to(x).reshape(-1, 1, 1)


def combined(x: Tensor, coefficients: Tensor) -> Tensor:
    """Return ``sum_t c_t x_t`` (p, q), in one pass."""
    total: Tensor = torch.tensordot(coefficients.to(x), x, dims=1)
    return total


def _of(prop: Property) -> Callable[[Params], bool]:
    return prop if callable(prop) else lambda params: prop
