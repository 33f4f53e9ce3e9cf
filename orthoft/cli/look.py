"""``inspect`` and ``methods``: what there is."""

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


@app.command()
def methods(json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List methods, spaces, outputs, adapters and their defaults.

    Example: orthoft methods
    """
    from orthoft.recipes.catalogue import catalogue, listed

    found = catalogue()
    typer.echo(json.dumps(found, indent=2, default=str) if json_ else listed(found))
