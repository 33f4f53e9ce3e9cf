"""The fields of an adapter's configuration that a reader uses, checked before the reader sees them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from math import inf, prod
from typing import Any

from orthoft.merging.files.header import shortened

# The parser of re, which has no public name: a second one would misread what this one accepts.
PARSER: Any = import_module("re._parser")
# An expression from a stranger's file is tried on the names of all modules. With four `.*` that takes a third of a
# second on a name of 100 characters, with five 7 seconds. REACH is less than those: repeats in a row share them.
REACH = 50  # lengths among which a repeat may choose
WAYS = 5e7  # in which an expression may match at most


@dataclass(frozen=True)
class Field:
    """What a field holds, in words and as a test. A field that is missing or null has no value, unless ``required``."""

    described: str
    accepts: Callable[[Any], bool]
    required: bool = False


def needed(field: Field) -> Field:
    """Return the field as one that has to be there."""
    return Field(field.described, field.accepts, required=True)


def count(limit: int = 2**31, least: int = 1) -> Field:
    """Return the field of a whole number from ``least`` to ``limit``."""
    described = f"a whole number from {least}" + (f" to {limit}" if limit < 2**31 else "")
    return Field(described, lambda value: type(value) is int and least <= value <= limit)


def choice(*words: str) -> Field:
    """Return the field of one of some words."""
    return Field("one of " + ", ".join(map(repr, words)), lambda value: isinstance(value, str) and value in words)


def patterns(field: Field) -> Field:
    """Return the field of an object from module names, or regular expressions for them, to such values."""
    return Field(
        f"an object from regular expressions, which may not nest repeats or line up many, to {field.described}",
        lambda value: isinstance(value, dict) and all(_is_pattern(k) and field.accepts(v) for k, v in value.items()),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_pattern(text: Any) -> bool:
    if not isinstance(text, str):
        return False
    try:
        re.compile(rf"(.*\.)?({text})$")  # as `by_pattern` has it, where flags for the whole have no place
        return _ways(PARSER.parse(text)) <= WAYS
    except (re.error, OverflowError, RecursionError):
        return False


def _ways(parts: Any) -> float:
    """Return in how many ways the parts of a parsed expression may match a name, about; inf where they double with it.

    That is where a repeat holds something that has a choice itself, such as ``(a+)+``, ``(a|a)*`` or ``(a?){40}``.
    """
    return prod((_ways_of(str(op), value, after) for (op, value), after in _followed(parts)), start=1.0)


def _followed(parts: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each part, and what comes after it, None at the end."""
    return zip(parts, [*list(parts)[1:], None], strict=False)  # an empty expression has no parts


def _ways_of(op: str, value: Any, after: Any) -> float:
    if op.endswith("_REPEAT"):
        least, most, inside = int(value[0]), int(value[1]), _ways(value[2])
        if most <= 1:
            return (1 - least) + inside
        if least > REACH or inside > 1:
            return inf
        lengths = min(most, REACH) - least + 1
        return 2 if lengths < 2 or _only_digits(value[2], after) else lengths  # not 1: a repeat of it would be nested
    if op == "BRANCH":
        return sum(map(_ways, value[1]))
    if op in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
        return _ways(value[-1])
    if op == "ATOMIC_GROUP":
        return _ways(value)
    if op == "GROUPREF_EXISTS":
        return sum(_ways(choice or ()) for choice in value[1:])
    return 1


def _only_digits(body: Any, after: Any) -> bool:
    """Say whether a repeat is of digits up to a character that is none, as in ``\\d+\\.``: it has to take them all."""
    kinds = [str(kind) for kind in body[0][1]] if len(body) == 1 and str(body[0][0]) == "IN" else []
    digits = kinds in (["(CATEGORY, CATEGORY_DIGIT)"], ["(RANGE, (48, 57))"])
    return digits and after is not None and str(after[0]) == "LITERAL" and not chr(after[1]).isdigit()


COUNT = count()
SIZE = count(least=0)
SEED = Field("a whole number", lambda value: type(value) is int and abs(value) < 2**63)
TERMS = count(1000)  # of a polynomial: absurd ones would take for ever
POWER = Field(
    "a power of two from 2", lambda value: type(value) is int and 2 <= value <= 2**31 and not value & value - 1
)
NUMBER = Field("a finite number", _is_number)
FLAG = Field("true or false", lambda value: isinstance(value, bool))
COUNTS, NUMBERS = patterns(COUNT), patterns(NUMBER)


def check_fields(config: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    """Raise a ValueError in one line if a field of a configuration is missing or holds something else."""
    for name, field in fields.items():
        value = config.get(name)
        if value is None:
            if field.required:
                raise ValueError(f"its configuration lacks {name!r}, {field.described}")
        elif not field.accepts(value):
            raise ValueError(f"{name!r} in its configuration is {field.described}, got {shortened(value)}")
