"""What there is to choose from, read from the registries themselves: methods, spaces, outputs, formats, adapters."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from typing import Any

from peft import PeftConfig

from orthoft.adapters import ADAPTERS
from orthoft.merging import METHODS, OUTPUTS, READERS, SPACES
from orthoft.merging.parameters import Parameters


def catalogue() -> dict[str, Any]:
    """Return every method, space, output and adapter with its first sentence and its parameters with their defaults."""
    return {
        "methods": {
            name: {"says": first_sentence(method.merge), "parameters": _defaults(method.parameters)}
            for name, method in METHODS.items()
        },
        "spaces": {
            name: {"says": first_sentence(space.encode), "parameters": _defaults(space.parameters)}
            for name, space in SPACES.items()
        },
        "outputs": {name: {"says": first_sentence(output)} for name, output in OUTPUTS.items()},
        "adapters": {
            name: {"says": first_sentence(config), "parameters": own_fields(config)}
            for name, config in ADAPTERS.items()
        },
        "formats": list(READERS),
    }


def _defaults(parameters: Parameters) -> dict[str, Any]:
    return {name: None if value is inspect.Parameter.empty else value for name, value in parameters.defaults.items()}


def own_fields(config: type[Any]) -> dict[str, Any]:
    """Return the fields that a config class adds to PEFT's, with their defaults."""
    common = {field.name for field in fields(PeftConfig)}
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(config)
        if field.name not in common and field.init
    }


def first_sentence(thing: object) -> str:
    """Return the first sentence of a docstring, on one line."""
    text = " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())
    return re.split(r"(?<!\.)\. ", text, maxsplit=1)[0].removesuffix(".")  # an ellipsis ends no sentence


def listed(found: dict[str, Any]) -> str:
    """Return the catalogue as text."""
    lines: list[str] = []
    for kind in ("methods", "spaces", "outputs", "adapters"):
        lines.append(f"{kind}:")
        for name, entry in found[kind].items():
            lines.append(f"  {name}: {entry['says']}")
            if entry.get("parameters"):
                lines.append("    " + ", ".join(f"{key}={value}" for key, value in entry["parameters"].items()))
    lines.append(f"adapter formats that can be merged: {', '.join(found['formats'])}, and checkpoints")
    return "\n".join(lines)
