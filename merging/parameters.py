"""Keyword-only parameters of a registered function, as a configuration: names, types and defaults."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from orthoft.errors import unknown

EXTRAS = ("generator", "base", "statistics", "prepared")  # what the engine gives a method, not the user


class Parameters:
    """The keyword-only parameters of a function, without those that the engine gives (``extras``)."""

    def __init__(self, owner: str, function: Callable[..., Any]) -> None:
        hints = get_type_hints(function)
        keywords = {
            parameter.name: parameter
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        self.owner = owner
        self.extras = frozenset(name for name in EXTRAS if name in keywords)
        self.types = {name: hints[name] for name in keywords if name not in EXTRAS}
        self.defaults = {name: keywords[name].default for name in self.types}

    def bind(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return all parameters, the defaults filled in.

        Raises:
            ValueError: a name is not a parameter, or a word is not one of its choices.
            TypeError: a parameter without default is missing, or a value has another type.
        """
        for name, value in given.items():
            if name not in self.types:
                raise self._unknown(name)
            if not _matches(value, self.types[name]):
                raise self._mismatch(name, value)
        bound = self.defaults | dict(given)
        for name, value in bound.items():
            if value is inspect.Parameter.empty:
                raise TypeError(f"{self.owner} needs the parameter {name!r}")
        return bound

    def _unknown(self, name: str) -> ValueError:
        if not self.types:
            return ValueError(f"{self.owner} has no parameters, got {name!r}")
        return unknown(f"parameter of {self.owner}", name, self.types)

    def _mismatch(self, name: str, value: object) -> ValueError | TypeError:
        expected = self.types[name]
        if get_origin(expected) is Literal and isinstance(value, str):
            return unknown(f"value of parameter {name!r} of {self.owner}", value, get_args(expected))
        return TypeError(f"parameter {name!r} of {self.owner} is {_described(expected)}, got {value!r}")


def plain(word: Any) -> Any:
    """Return a word of a merge as Python's own: numbers and arrays of numpy and torch, tuples, words of other kinds.

    So it is checked, made the key of what is finished, and written to report and card as what a YAML file could say.
    """
    if isinstance(word, Mapping):
        return {plain(key): plain(value) for key, value in word.items()}
    if isinstance(word, list | tuple):
        return [plain(value) for value in word]
    if hasattr(word, "tolist"):
        return word.tolist()
    return str.__str__(word) if isinstance(word, str) else word


def _matches(value: object, expected: Any) -> bool:
    if get_origin(expected) in (Union, UnionType):
        return any(_matches(value, option) for option in get_args(expected))
    if get_origin(expected) is Literal:
        return value in get_args(expected)
    if expected in (float, int):
        kinds = int if expected is int else int | float
        return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, expected)


def _described(expected: Any) -> str:
    if get_origin(expected) in (Union, UnionType):
        return " or ".join(_described(option) for option in get_args(expected))
    if get_origin(expected) is Literal:
        return "one of " + ", ".join(map(repr, get_args(expected)))
    return "none" if expected is NoneType else f"a {expected.__name__}"
