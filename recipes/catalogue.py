"""What there is to choose from, read from the registries themselves: methods, spaces, outputs, adapters."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from orthoft.errors import unknown
from orthoft.merging import METHODS, OUTPUTS, READERS, SPACES
from orthoft.merging.parameters import Parameters
from orthoft.merging.reports.card import about, papers
from orthoft.merging.statistics import STATISTICS_OF
from orthoft.recipes.table import Table

WIDTH = 118
Entry = dict[str, Any]


def catalogue(kind: str) -> dict[str, Entry]:
    """Return what there is of a kind, by name: what it does, its paper, its parameters with defaults and choices.

    Args:
        kind: "methods", "spaces", "outputs" or "adapters".
    """
    return {name: {"says": about(thing), "arxiv": papers(thing)} | _words(kind, name) for name, thing in _of(kind)}


def explained(kind: str, name: str) -> str:
    """Return all that a docstring says of one of a kind: its formula and what its parameters mean.

    Raises:
        ValueError: there is nothing of this name.
    """
    things, found = dict(_of(kind)), catalogue(kind)
    if name not in things:
        raise unknown(kind.removesuffix("s"), name, things)
    head = _lines(name, _texts(found[name], found[name].get("parameters", {})), len(name) + 2)
    return "\n".join([*head, "", inspect.getdoc(things[name]) or ""])


def listed(kind: str) -> Table:
    """Return what there is of a kind as a table: what it does and its defaults."""
    found = catalogue(kind)
    wide = max(map(len, found)) + 2
    each = [entry.get("parameters", {}) for entry in found.values()]
    common = {key: value for key, value in each[0].items() if all((key, value) in one.items() for one in each[1:])}
    lines: list[str] = []
    rows = [(kind.removesuffix("s"), "what it does", "parameters")]
    for (name, entry), parameters in zip(found.items(), each, strict=True):
        says, *rest = _texts(entry, {key: parameters[key] for key in parameters if key not in common})
        lines += _lines(name, [says, *rest], wide)
        rows.append((name, says, "; ".join(rest)))
    notes = [*_wrapped(f"all take: {_assigned(common, {})}", 2)] if common else []
    if kind == "adapters":
        notes += ["", *_wrapped(f"formats of adapters that merge reads: {', '.join(READERS)}", 2)]
    notes += ["", f"more on one: orthoft {kind} NAME"]
    shown = rows if any(row[2] for row in rows[1:]) else [row[:2] for row in rows]
    return Table("\n".join([*lines, *([""] if common else []), *notes]), shown, words=3, notes="\n".join(notes).strip())


def _of(kind: str) -> list[tuple[str, Any]]:
    """Return the names and the functions or classes of a kind; only that of adapters loads PEFT."""
    if kind == "methods":
        return [(name, METHODS[name].merge) for name in sorted(METHODS)]  # registered in the order of imports
    if kind == "spaces":
        return [(name, space.encode) for name, space in SPACES.items()]
    if kind == "outputs":
        return list(OUTPUTS.items())
    from orthoft.adapters import ADAPTERS

    return list(ADAPTERS.items())


def _words(kind: str, name: str) -> Entry:
    """Return the parameters of one of a kind, and the statistics that a method takes."""
    if kind == "adapters":
        return {"parameters": _fields(dict(_of(kind))[name])}
    if kind == "outputs":
        return {}
    parameters = METHODS[name].parameters if kind == "methods" else SPACES[name].parameters
    statistics = {"statistics": STATISTICS_OF[name]} if name in STATISTICS_OF else {}
    return {"parameters": _defaults(parameters), "choices": _all_choices(parameters)} | statistics


def _defaults(parameters: Parameters) -> dict[str, Any]:
    return {name: None if value is inspect.Parameter.empty else value for name, value in parameters.defaults.items()}


def _all_choices(parameters: Parameters) -> dict[str, list[str]]:
    return {name: words for name, kind in parameters.types.items() if (words := list(_choices(kind)))}


def _choices(kind: Any) -> Iterable[str]:
    """Give the words that a parameter may be, none where it is a number."""
    if get_origin(kind) is Literal:
        yield from get_args(kind)
    elif any(get_origin(option) is Literal for option in get_args(kind)):
        for option in get_args(kind):
            yield from ["none"] if option is NoneType else _choices(option)


def _fields(config: type[Any]) -> dict[str, Any]:
    """Return the fields that a config class adds to PEFT's, with their defaults."""
    from peft import PeftConfig

    common = {field.name for field in fields(PeftConfig)}
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(config)
        if field.name not in common and field.init
    }


def _texts(entry: Entry, parameters: Mapping[str, Any]) -> list[str]:
    """Return what one does, its parameters if it has any, and the statistics it takes if it takes some."""
    papers = "".join(f" (arXiv {paper})" for paper in entry.get("arxiv", ()))
    texts = [entry["says"] + papers]
    if parameters:
        texts.append(_assigned(parameters, entry.get("choices", {})))
    if "statistics" in entry:
        texts.append(f"takes {entry['statistics']} statistics from data")
    return texts


def _lines(name: str, texts: Sequence[str], wide: int) -> list[str]:
    lines = [line for text in texts for line in _wrapped(text, wide)]
    return [f"{name:{wide}}{lines[0].lstrip()}", *lines[1:]]


def _assigned(parameters: Mapping[str, Any], choices: Mapping[str, list[str]]) -> str:
    return ", ".join(
        f"{key}={str(value).lower() if value is None else value}"
        + (f" (or {', '.join(word for word in choices[key] if word != str(value).lower())})" if key in choices else "")
        for key, value in parameters.items()
    )


def _wrapped(text: str, indent: int) -> list[str]:
    space = " " * indent
    return textwrap.wrap(text, WIDTH, initial_indent=space, subsequent_indent=space, break_on_hyphens=False)
