"""``recipes``: those that ship, and help to write another."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from orthoft.cli.app import Overrides, app
from orthoft.cli.commands import START, Commands
from orthoft.cli.output import Output

group = Commands()


class Kind(StrEnum):
    recipe = "recipe"
    merge = "merge"


@group.callback()
def recipes() -> None:
    """List and copy the recipes that ship; check one; help an editor to complete them.

    Example: orthoft recipes cp minilm mine.yaml

    Example: orthoft recipes validate mine.yaml
    """


@group.command()
def ls(out: Output) -> None:
    """List the recipes that ship with orthoft.

    Example: orthoft recipes ls

    In Python: orthoft.recipes.shipped.shipped()
    """
    from orthoft.recipes.shipped import shipped
    from orthoft.recipes.table import Table

    found = shipped()
    wide = max(map(len, found))
    text = "\n".join(f"{name:{wide}}  {line}" for name, line in found.items())
    out.show(found, Table(text, [("recipe", "what it shows"), *found.items()], words=2))


@group.command()
def cp(
    out: Output,
    name: Annotated[str, typer.Argument(help="One that `orthoft recipes ls` lists.")],
    dest: Annotated[str | None, typer.Argument(metavar="[DEST]", help="A file or a folder; here unless given.")] = None,
) -> None:
    """Copy a recipe, to change it; a file that exists is never replaced.

    Example: orthoft recipes cp minilm mine.yaml

    In Python: orthoft.recipes.shipped.copy("minilm", "mine.yaml")
    """
    from orthoft.recipes.shipped import copy

    file = str(copy(name, dest))
    out.show({"file": file}, file)


@group.command()
def validate(
    out: Output,
    file: Annotated[Path, typer.Argument(help="The YAML file of a recipe, or of `orthoft merge`.")],
    set_: Overrides = None,
) -> None:
    """Check a recipe, or the YAML file of a merge, before any work: "ok", or one line per mistake.

    Of a recipe: its words, its files, and its device, adapters, training arguments and merge as `run` takes them on
    this machine. What depends on the base and on the rows `run` checks before it trains.

    Example: orthoft recipes validate mine.yaml --set merge.method=ties

    In Python: orthoft.recipes.shipped.validate("mine.yaml", ["merge.method=ties"])
    """
    from orthoft.recipes.shipped import validate as check

    kind = check(file, set_ or ())
    out.show({"file": str(file), "kind": kind}, f"ok, a {kind}")


@group.command()
def schema(
    out: Output,
    file: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="Where to write it; printed unless given.")
    ] = None,
    of: Annotated[Kind, typer.Option(help="Of recipes, or of the YAML files of `orthoft merge`.")] = Kind.recipe,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write the JSON Schema by which editors complete and check YAML.

    Many editors take it by a first line: # yaml-language-server: $schema=recipe.schema.json

    Example: orthoft recipes schema recipe.schema.json

    Example: orthoft recipes schema merge.schema.json --of merge

    In Python: orthoft.recipes.shipped.json_schema("merge")
    """
    from orthoft.recipes.shipped import json_schema, write_schema

    found = json_schema(of.value)
    text = json.dumps(found, indent=2)
    if file is None:
        out.show(found, text)
    else:
        write_schema(text + "\n", file, overwrite)
        out.show({"file": file}, file)


app.add_typer(group, name="recipes", rich_help_panel=START)
