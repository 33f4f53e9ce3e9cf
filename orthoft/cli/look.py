"""``inspect``: what is in a folder. ``methods``, ``spaces``, ``outputs``, ``adapters``: what there is to choose."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from orthoft.cli.app import app
from orthoft.cli.commands import LOOK
from orthoft.cli.output import Output, check_file


@app.command(rich_help_panel=LOOK)
def inspect(
    out: Output,
    path: Annotated[
        list[str],
        typer.Argument(metavar="PATH", help="Adapters, checkpoints: folders, or org/name[@state[/folder]]."),
    ],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Their base: measure what they would do to each other.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="With --base: a page of pictures, too.")] = None,
) -> None:
    """Say what adapters or checkpoints hold, or how they stand to each other before a merge.

    With the base: norms, ranks, cosines, overlaps of subspaces, sign conflicts, and advice on method and space with its
    reasons.

    Example: orthoft inspect runs/minilm/experts/sarcasm runs/minilm/merged

    Example: orthoft inspect runs/a runs/b --base bert --html sources.html

    In Python: orthoft.recipes.describe.describe("runs/a")

    In Python: orthoft.merging.inspect_sources("bert", ["runs/a", "runs/b"])
    """
    if base is None:
        if html is not None:
            raise ValueError("--html draws how sources stand to each other, which needs their --base")
        from orthoft.recipes.describe import describe, described

        found = [describe(one) for one in path]
        out.show(found, "\n\n".join(described(one) for one in found))
        return
    from orthoft.merging import inspect_sources

    if html is not None:
        check_file(html)
    report = inspect_sources(base, path, progress=sys.stderr.isatty())
    out.show(report.to_dict(), str(report))
    if html is not None:
        report.to_html(html)


Name = Annotated[str | None, typer.Argument(metavar="[NAME]", help="All about this one: its formula, its parameters.")]


@app.command(rich_help_panel=LOOK)
def methods(out: Output, name: Name = None) -> None:
    """List the merge methods and their parameters, or explain one.

    Example: orthoft methods

    Example: orthoft methods ties

    In Python: orthoft.recipes.catalogue.catalogue("methods")
    """
    show(out, "methods", name)


@app.command(rich_help_panel=LOOK)
def spaces(out: Output, name: Name = None) -> None:
    """List the spaces to merge in, or explain one.

    Example: orthoft spaces knots

    In Python: orthoft.recipes.catalogue.catalogue("spaces")
    """
    show(out, "spaces", name)


@app.command(rich_help_panel=LOOK)
def outputs(out: Output, name: Name = None) -> None:
    """List what a merge can write, or explain one.

    Example: orthoft outputs

    In Python: orthoft.recipes.catalogue.catalogue("outputs")
    """
    show(out, "outputs", name)


@app.command(rich_help_panel=LOOK)
def adapters(out: Output, name: Name = None) -> None:
    """List the adapters to train, their fields, and the formats that merge.

    Example: orthoft adapters oftv2

    In Python: orthoft.recipes.catalogue.catalogue("adapters")
    """
    show(out, "adapters", name)


def show(out: Output, kind: str, name: str | None) -> None:
    """Print what there is of a kind, or all about one of it."""
    from orthoft.recipes.catalogue import catalogue, explained, listed

    if name is None:
        out.show(catalogue(kind), listed(kind))
    else:
        text = explained(kind, name)  # refuses an unknown name
        out.show({name: catalogue(kind)[name]}, text)
