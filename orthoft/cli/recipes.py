"""``recipes``: those that ship, and help to write another."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from orthoft.cli.app import Overrides, app

group = typer.Typer(rich_markup_mode=None)


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
def ls(json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the recipes that ship with orthoft.

    Example: orthoft recipes ls
    """
    from orthoft.recipes.shipped import shipped

    found = shipped()
    wide = max(map(len, found))
    typer.echo(json.dumps(found, indent=2) if json_ else "\n".join(f"{n:{wide}}  {line}" for n, line in found.items()))


@group.command()
def cp(
    name: Annotated[str, typer.Argument(help="One that `orthoft recipes ls` lists.")],
    dest: Annotated[
        Path | None, typer.Argument(metavar="[DEST]", help="A file or a folder; here unless given.")
    ] = None,
) -> None:
    """Copy a recipe, to change it; a file that exists is never replaced.

    Example: orthoft recipes cp minilm mine.yaml
    """
    from orthoft.recipes.shipped import copy

    typer.echo(str(copy(name, dest)))


@group.command()
def validate(
    file: Annotated[Path, typer.Argument(help="The YAML file of a recipe, or of `orthoft merge`.")],
    set_: Overrides = None,
) -> None:
    """Check a recipe or the YAML file of a merge before any work: "ok", or one line per mistake.

    Example: orthoft recipes validate mine.yaml --set merge.method=ties
    """
    from orthoft.recipes.shipped import validate as check

    typer.echo(f"ok, a {check(file, set_ or ())}")


@group.command()
def schema(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Where to write it; printed unless given.")
    ] = None,
    of: Annotated[Kind, typer.Option(help="Of recipes, or of the YAML files of `orthoft merge`.")] = Kind.recipe,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write the JSON Schema by which editors complete and check YAML.

    Many editors take it by a first line: # yaml-language-server: $schema=recipe.schema.json

    Example: orthoft recipes schema recipe.schema.json

    Example: orthoft recipes schema merge.schema.json --of merge
    """
    from orthoft.recipes.shipped import json_schema, write_schema

    text = json.dumps(json_schema(of.value), indent=2)
    if file is None:
        typer.echo(text)
    else:
        write_schema(text + "\n", file, overwrite)
        typer.echo(str(file))


app.add_typer(group, name="recipes")
