"""The fields of an adapter's configuration that a reader uses, checked before the reader sees them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from itertools import takewhile
from math import inf
from typing import Any, NamedTuple

from orthoft.merging.files.header import shortened

# The parser of re, which has no public name: a second one would misread what this one accepts.
PARSER: Any = import_module("re._parser")
# An expression from a stranger's file is tried on the names of all modules. TRIES is what all of an object's together
# may take on one name: half a second at most, where each is of the slowest kind.
LONGEST_NAME = 200  # of a module: what an expression takes grows with a power of it
TRIES = 5e6
COUNTED = 50  # times that an expression may ask for
LETTER = 0.1  # of a try, which it takes to compare one


@dataclass(frozen=True)
class Field:
    """What a field holds, in words and as a test. A field that is missing or null has no value, unless ``required``."""

    described: str
    accepts: Callable[[Any], bool]
    required: bool = False
    offending: Callable[[Any], Any] = lambda value: value  # the part of a value it does not accept to show


def needed(field: Field) -> Field:
    """Return the field as one that has to be there."""
    return replace(field, required=True)


def count(limit: int = 2**31, least: int = 1) -> Field:
    """Return the field of a whole number from ``least`` to ``limit``."""
    described = f"a whole number from {least}" + (f" to {limit}" if limit < 2**31 else "")
    return Field(described, lambda value: type(value) is int and least <= value <= limit)


def choice(*words: str) -> Field:
    """Return the field of one of some words."""
    return Field("one of " + ", ".join(map(repr, words)), lambda value: isinstance(value, str) and value in words)


def patterns(field: Field) -> Field:
    """Return the field of an object from module names, or regular expressions for them, to such values."""

    def offending(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        tries = 0.0
        for key, item in value.items():
            tries += _tries(key)
            if tries > TRIES or not field.accepts(item):
                return {key: item}
        return None

    return Field(
        "an object from regular expressions, which may not nest repeats, line up many or refer to groups, "
        f"to {field.described}",
        lambda value: offending(value) is None,
        offending=offending,
    )


@lru_cache(2**15)
def expression(text: str) -> re.Pattern[str]:
    """Return the expression for the names of modules that a pattern stands for, or that end with it.

    It is PEFT's, ``(.*\\.)?(text)$``, without the prefix where that changes nothing and would be tried in vain.
    """
    return re.compile(f"({text})$" if _leads(PARSER.parse(text)) else rf"(.*\.)?({text})$")


def _tries(text: Any) -> float:
    """Return about how many tries an expression takes on a name at most; inf if it is none or they double with it."""
    if not isinstance(text, str):
        return inf
    try:
        re.compile(rf"(.*\.)?({text})$")  # as PEFT has it, where flags for the whole have no place
        return _tries_of(list(PARSER.parse(text)))
    except (re.error, OverflowError, RecursionError):
        return inf


def _tries_of(parts: list[Any]) -> float:
    if parts and _is_rest(parts[-1]):
        parts = parts[:-1]  # it cannot fail, so that nothing before it is tried again
    if _leads(parts):
        return _cost(parts, None, 0).tries
    word = "." + _word(parts)  # looked for at each place of the name
    places = LONGEST_NAME / _period(word)
    return LONGEST_NAME * (1 + LETTER * len(word)) + places * _cost(parts, None, 1).tries


def _leads(parts: Any) -> bool:
    """Say whether a parsed expression begins with ``.*`` or ``^``: then what stands before it makes no difference."""
    return len(parts) > 0 and (_is_rest(parts[0]) or str(parts[0][1]) == "AT_BEGINNING")


def _is_rest(part: Any) -> bool:
    """Say whether a part is ``.*``."""
    op, value = part
    return (
        str(op) == "MAX_REPEAT"
        and int(value[0]) == 0
        and value[1] == PARSER.MAXREPEAT
        and ([str(kind) for kind, _ in value[2]] == ["ANY"])
    )


class _Cost(NamedTuple):
    """Of a part: in how many ways it may match, how many tries they take, how many free repeats there were so far."""

    ways: float
    tries: float
    repeats: int


def _cost(parts: Any, after: Any, repeats: int) -> _Cost:
    """Return the cost of parts of a parsed expression in a row, before another part or None."""
    ways, tries, parts = 1.0, 1.0, list(parts)
    for at, (op, value) in enumerate(parts):
        if str(op) == "LITERAL":
            cost = _Cost(1, LETTER, repeats)
        else:
            cost = _cost_of(str(op), value, [*parts[at + 1 :], after], repeats)
        ways, tries, repeats = ways * cost.ways, tries + ways * cost.tries, cost.repeats
    return _Cost(ways, tries, repeats)


def _cost_of(op: str, value: Any, later: list[Any], repeats: int) -> _Cost:
    if op in ("ANY", "IN", "NOT_LITERAL", "AT"):
        return _Cost(1, 1, repeats)
    if op.endswith("_REPEAT"):
        return _cost_of_repeat(int(value[0]), int(value[1]), value[2], later, repeats)
    if op == "BRANCH":
        branches = [_cost(branch, later[0], repeats) for branch in value[1]]
        return _Cost(sum(b.ways for b in branches), sum(b.tries for b in branches), min(b.repeats for b in branches))
    if op == "SUBPATTERN":
        return _cost(value[-1], later[0], repeats)
    if op in ("ASSERT", "ASSERT_NOT", "ATOMIC_GROUP"):  # once such a one has matched, it is not entered again
        return _Cost(1, _cost(value if op == "ATOMIC_GROUP" else value[-1], None, 0).tries, repeats)
    return _Cost(inf, inf, repeats)


def _cost_of_repeat(least: int, most: int, body: Any, later: list[Any], repeats: int) -> _Cost:
    """Return the cost of a repeat; inf where it holds a choice: ``(a+)+``, ``(a|a)*``, ``(a?){40}``."""
    after = later[0]
    if most <= 1:
        cost = _cost(body, after, repeats)
        return _Cost(1 - least + cost.ways, 1 + cost.tries, repeats)
    inside = _cost(body, after if after is not None and len(body) and after == body[0] else None, repeats)
    if least > COUNTED or inside.ways > 1:
        return _Cost(inf, inf, repeats)
    if most < LONGEST_NAME:
        lengths = most - least + 1
        # Not 1 for one length: a repeat of it would be nested.
        return _Cost(1 if _takes_all(body, after) else max(lengths, 2), (most + 1) * inside.tries, repeats)
    # Those in a row share the name: n of them have its length to the n, by n!, ways. A word behind limits them to it.
    word = _word(later)
    places = LONGEST_NAME / (repeats + 1)
    tries = places * (inside.tries + LETTER * len(word))
    if _takes_all(body, after):
        return _Cost(1, tries, repeats)
    return _Cost(max(places / _period(word), 2), tries, repeats + 1)


def _word(later: list[Any]) -> str:
    """Return the letters that parts begin with."""
    return "".join(chr(part[1]) for part in takewhile(lambda part: part and str(part[0]) == "LITERAL", later)).lower()


def _period(word: str) -> int:
    """Return how far apart a word has to be from itself at least; 1 for no word."""
    return next((n for n in range(1, len(word)) if word[n:] == word[:-n]), max(len(word), 1))


def _takes_all(body: Any, after: Any) -> bool:
    """Say whether a repeat has to take all it can, as in ``\\d+\\.``: it is of characters before one that is none."""
    if len(body) != 1 or after is None or str(after[0]) != "LITERAL":
        return False
    (op, value), stop = body[0], after[1]
    if stop >= 128 or chr(stop).isalpha():  # that may have another case
        return False
    if str(op) == "NOT_LITERAL":
        return bool(value == stop)
    kinds = [str(kind) for kind in value] if str(op) == "IN" else []
    negated = kinds == ["(NEGATE, None)", f"(LITERAL, {stop})"]
    digits = kinds in (["(CATEGORY, CATEGORY_DIGIT)"], ["(RANGE, (48, 57))"]) and not chr(stop).isdigit()
    return negated or digits


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


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
            raise ValueError(
                f"{name!r} in its configuration is {field.described}, got {shortened(field.offending(value))}"
            )
