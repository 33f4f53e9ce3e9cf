"""A hook of mkdocs: pages made from what the code says of itself, the help of all commands and the keys of a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import typer

WIDTH = 84  # of the help, as wide as a page
KINDS = {"string": "text", "integer": "whole number", "boolean": "true or false", "object": "mapping", "array": "list"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page with what is made in the places for it, and any other page as it is."""
    for place, make in {"<!-- commands -->": commands, "<!-- recipe -->": recipe_keys}.items():
        if place in markdown:
            markdown = markdown.replace(place, "\n\n".join(make()))
    return markdown


def commands() -> Iterator[str]:
    """Yield a section with the help of each command, groups before what is in them."""
    from orthoft.cli import app

    program = typer.main.get_command(app)
    yield from _commands(program, typer.Context(program, info_name="orthoft", terminal_width=WIDTH))


def _commands(command: Any, context: Any) -> Iterator[str]:
    yield f"## {context.command_path}\n\n```text\n{command.get_help(context).strip()}\n```"
    for name, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            yield from _commands(inner, type(context)(inner, info_name=name, parent=context, terminal_width=WIDTH))


def recipe_keys() -> Iterator[str]:
    """Yield a table of keys for each mapping of a recipe, the recipe first, but those of transformers' own classes."""
    from orthoft.recipes.shipped import json_schema

    schema = json_schema("recipe")
    others = {
        name: part for name, part in schema["$defs"].items() if name != "TrainingArguments" and "enum" not in part
    }
    for name, part in {"Recipe": schema, **others}.items():
        lines = [
            f"| `{key}` | {said(value)} | {_default(key, value, part)} |" for key, value in part["properties"].items()
        ]
        told = "\n\n".join(" ".join(text.split()) for text in part.get("description", "").split("\n\n"))
        table = "\n".join(["| key | takes | unless given |", "|---|---|---|", *lines])
        yield f"### {name}\n\n{told}\n\n{table}"


def said(schema: Mapping[str, Any]) -> str:
    """Return in words what a value of a JSON Schema may be."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return "transformers' own" if name == "TrainingArguments" else f"[{name}](#{name.lower()})"
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return " or ".join(said(one) for one in schema[choice] if one.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = KINDS.get(schema.get("type", ""), schema.get("type", "anything"))
    inner = schema.get("items") or schema.get("additionalProperties")
    return f"{kind} {'to' if kind == 'mapping' else 'of'} {said(inner)}" if isinstance(inner, dict) and inner else kind


def _default(key: str, value: Mapping[str, Any], part: Mapping[str, Any]) -> str:
    if key in part.get("required", ()):
        return "**needed**"
    default = value.get("default")
    return "" if default is None or default == [] or isinstance(default, dict) else f"`{json.dumps(default)}`"
