"""The fields of an adapter's configuration that a reader uses, checked before the reader sees them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from orthoft.merging.files.header import shortened

NESTED = re.compile(r"\([^()]*[*+}][^()]*\)[*+{]")  # (a+)+ and the like: such patterns can take for ever to match


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
        f"an object from regular expressions to {field.described}",
        lambda value: isinstance(value, dict) and all(_is_pattern(k) and field.accepts(v) for k, v in value.items()),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_pattern(text: Any) -> bool:
    if not isinstance(text, str) or NESTED.search(text):
        return False
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


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
