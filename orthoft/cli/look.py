"""``inspect``: what is in a folder. ``methods``, ``spaces``, ``outputs``, ``adapters``: what there is to choose."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from orthoft.cli.app import app


@app.command()
def inspect(
    path: Annotated[list[Path], typer.Argument(help="Folders of adapters or checkpoints.")],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Their base: measure what they would do to each other.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="With --base: a page of pictures, too.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say what adapters or checkpoints hold, or with --base how they stand to each other before a merge.

    With the base: norms, ranks, cosines, overlaps of subspaces, sign conflicts, and advice on method and space with its
    reasons.

    Example: orthoft inspect runs/minilm/experts/sarcasm runs/minilm/merged

    Example: orthoft inspect runs/a runs/b --base bert --html sources.html
    """
    if base is None:
        if html is not None:
            raise ValueError("--html draws how sources stand to each other, which needs their --base")
        from orthoft.recipes.describe import describe, described

        found = [describe(one) for one in path]
        typer.echo(json.dumps(found, indent=2) if json_ else "\n\n".join(described(one) for one in found))
        return
    from orthoft.merging import inspect_sources

    report = inspect_sources(base, path, progress=sys.stderr.isatty())
    if html is not None:
        report.to_html(html)
    typer.echo(json.dumps(report.to_dict(), indent=2) if json_ else str(report))


Name = Annotated[str | None, typer.Argument(metavar="[NAME]", help="All about this one: its formula, its parameters.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


@app.command()
def methods(name: Name = None, json_: AsJson = False) -> None:
    """List the merge methods and their parameters, or explain one.

    Example: orthoft methods

    Example: orthoft methods ties
    """
    show("methods", name, json_)


@app.command()
def spaces(name: Name = None, json_: AsJson = False) -> None:
    """List the spaces to merge in, or explain one.

    Example: orthoft spaces knots
    """
    show("spaces", name, json_)


@app.command()
def outputs(name: Name = None, json_: AsJson = False) -> None:
    """List what a merge can write, or explain one.

    Example: orthoft outputs
    """
    show("outputs", name, json_)


@app.command()
def adapters(name: Name = None, json_: AsJson = False) -> None:
    """List the adapters to train, their fields, and the formats that merge.

    Example: orthoft adapters oftv2
    """
    show("adapters", name, json_)


def show(kind: str, name: str | None, as_json: bool) -> None:
    """Print what there is of a kind, or all about one of it."""
    from orthoft.recipes.catalogue import catalogue, explained, listed

    if as_json:
        found = catalogue(kind)
        if name is not None:
            explained(kind, name)  # refuses an unknown name
            found = {name: found[name]}
        typer.echo(json.dumps(found, indent=2, default=str))
        return
    typer.echo(listed(kind) if name is None else explained(kind, name))
