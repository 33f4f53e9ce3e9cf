"""What a user asks for, and what it means for one weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from orthoft.errors import unknown
from orthoft.merging.methods import Method, get_method
from orthoft.merging.parameters import plain
from orthoft.merging.spaces import Space, choose_space, get_space
from orthoft.merging.weightwise import Choice, Post, Rescale

Overrides = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Wish:
    """The words of `orthoft.merging.merge`, checked: what holds for all weights, and what for those of a pattern.

    Args:
        params: of the method and of the space, without their defaults.
        include: patterns of names (``*``, ``?``, ``[...]``): with some, what matches none stays as in the base.
        exclude: patterns of names: what matches one stays as in the base.
        overrides: by pattern, what holds there instead: ``scale``, ``space``, ``weights`` as {source: number}, or a
            parameter. Of several patterns that match, the last one says.
    """

    method: Method
    space: str
    params: Mapping[str, Any]
    weights: Tensor  # (T,)
    post: Post = field(default_factory=Post)
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    overrides: Overrides = field(default_factory=dict)

    def bound(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return all parameters of the method and all of the space, with their defaults ("auto" has none)."""
        return bind(self.method, get_space(self.space), self.params)

    def selects(self, name: str) -> bool:
        """Say whether a weight is to be merged at all."""
        wanted = not self.include or any(fnmatchcase(name, pattern) for pattern in self.include)
        return wanted and not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def of(self, name: str, sources: Sequence[str]) -> Wish:
        """Return what is wished for one weight: the overrides whose pattern it matches applied."""
        wish = self
        for pattern, words in self.overrides.items():
            if fnmatchcase(name, pattern):
                wish = wish._with(words, sources, pattern)
        return wish

    def _with(self, words: Mapping[str, Any], sources: Sequence[str], pattern: str) -> Wish:
        known = {key: words[key] for key in ("scale", "space", "weights") if key in words}
        weights = self.weights.clone()
        for source, number in known.get("weights", {}).items():
            if source not in sources:
                raise unknown(f"source in the weights of {pattern!r}", source, sources)
            weights[list(sources).index(source)] = finite_number(f"the weight of {source!r} in {pattern!r}", number)
        scale = finite_number(f"the scale of {pattern!r}", known.get("scale", self.post.scale))
        space = known.get("space", self.space)
        params = {**self._params_in(space), **{key: value for key, value in words.items() if key not in known}}
        return replace(self, space=space, params=params, weights=weights, post=replace(self.post, scale=scale))

    def _params_in(self, space: str) -> Mapping[str, Any]:
        """Return the parameters without those that only the space knows, if another one is taken."""
        old = get_space(self.space)
        if old is None or old is get_space(space):
            return self.params
        mine = old.parameters.types.keys() - self.method.parameters.types.keys()
        return {name: value for name, value in self.params.items() if name not in mine}

    def choice(self, ranks: Sequence[int | None], vector: bool) -> Choice:
        """Return how a weight is merged whose deltas have these ranks, None where one has no factors.

        The space holds where a delta has factors, and everywhere if it needs none; but never for vectors and for
        matrices that it cannot encode because all deltas are dense: these merge in the full space.

        Raises:
            ValueError: some deltas have factors, not all, and the space needs them; or the method does not work there.
        """
        params, of_space = self.bound()
        space, factored = get_space(self.space), all(rank is not None for rank in ranks)
        dense = all(rank is None for rank in ranks)
        here = "full" if space is not None and (vector or (dense and space.needs_factors)) else self.space
        commutes, entries = self.method.commutes(params), self.method.entries(params)
        where = choose_space(here, self.method.name, commutes=commutes, entries=entries, factored=factored)
        if not where.isometric and (self.post.isotropise or self.post.rescale == "weight"):
            raise ValueError(f"isotropise and rescale='weight' have no meaning in space {where.name!r}: leave them out")
        own = of_space if where is space else where.parameters.bind({})
        if commutes:
            own = {**own, **{name: value for name, value in where.commuting.items() if name not in self.params}}
        return Choice(self.method, params, where, own, self.weights, self.post)

    def refuse_space(self) -> None:
        """Raise the ValueError of a space that needs factors where nothing has any."""
        choose_space(self.space, self.method.name, commutes=False, entries=False, factored=False)


def wish_for(
    tasks: int,
    *,
    method: str,
    space: str = "auto",
    weights: Sequence[float] | None = None,
    isotropise: bool = False,
    rescale: Rescale = "none",
    scale: float = 1.0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Overrides | None = None,
    **params: Any,
) -> Wish:
    """Return the wish of these words, or raise what is wrong with them, before any file is opened.

    Raises:
        ValueError: an unknown method, space or parameter, or a value that the method refuses.
        TypeError: a parameter of another type.
    """
    chosen, numbers = get_method(method), task_weights(weights, tasks)
    params, overrides = plain(params), plain(overrides)
    post = Post(isotropise, rescale, finite_number("scale", plain(scale)))
    for words, what in ((include, "include"), (exclude, "exclude")):
        if isinstance(words, str):
            raise TypeError(f"{what} is a sequence of patterns, got {words!r}")
    wish = Wish(
        chosen,
        space,
        params,
        numbers,
        post,
        tuple(include),
        tuple(exclude),
        _checked({} if overrides is None else overrides),
    )
    for one in (wish, *(wish._with(_without_weights(words), (), pattern) for pattern, words in wish.overrides.items())):
        bound, _ = one.bound()
        chosen.rehearse(numbers, bound)
        choose_space(one.space, method, commutes=chosen.commutes(bound), entries=chosen.entries(bound), factored=True)
    return wish


def bind(method: Method, space: Space | None, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return all parameters of the method and all of the space (None: chosen automatically, without parameters)."""
    known = {} if space is None else space.parameters.types
    own = {name: value for name, value in given.items() if name in known and name not in method.parameters.types}
    rest = {name: value for name, value in given.items() if name not in own}
    return method.bind(rest), {} if space is None else space.parameters.bind(own)


def task_weights(weights: Sequence[float] | None, tasks: int) -> Tensor:
    """Return the tasks' weights as float64 (T,), ones by default; a ValueError if they do not fit."""
    if weights is None:
        return torch.ones(tasks, dtype=torch.float64)
    numbers = torch.tensor([float(weight) for weight in weights], dtype=torch.float64)
    if len(numbers) != tasks:
        raise ValueError(f"{len(numbers)} weights were given for {tasks} sources: give one each")
    if not torch.isfinite(numbers).all():
        raise ValueError(f"weights must be finite numbers, got {list(weights)}")
    return numbers


def finite_number(what: str, value: object) -> float:
    """Return a number, or raise a TypeError that says what it should have been."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{what} is a finite number, got {value!r}")
    return float(value)


def check_patterns(patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raise a ValueError for a pattern that matches none of the names."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(names[:4])
            raise ValueError(f"the pattern {pattern!r} matches no weight that a source changes, e.g. {shown}")


def _checked(overrides: object) -> Overrides:
    if not isinstance(overrides, Mapping):
        raise TypeError(f"overrides is a mapping from patterns to words, got {overrides!r}")
    for pattern, words in overrides.items():
        if not isinstance(words, Mapping):
            raise TypeError(f"the override of {pattern!r} is a mapping of words, got {words!r}")
        if not isinstance(words.get("weights", {}), Mapping):
            raise TypeError(
                f"the weights of {pattern!r} are a mapping from sources to numbers, got {words['weights']!r}"
            )
    return overrides


def _without_weights(words: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in words.items() if key != "weights"}
