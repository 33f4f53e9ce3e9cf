"""``inspect`` and ``methods``: what there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from orthoft.cli.app import app


@app.command()
def inspect(
    path: Annotated[list[Path], typer.Argument(help="Folders of adapters or checkpoints.")],
    json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say what adapters or checkpoints hold.

    Example: orthoft inspect runs/minilm/experts/sarcasm runs/minilm/merged
    """
    from orthoft.recipes.describe import describe, described

    found = [describe(one) for one in path]
    typer.echo(json.dumps(found, indent=2) if json_ else "\n\n".join(described(one) for one in found))


@app.command()
def methods(json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List methods, spaces, outputs, adapters and their defaults.

    Example: orthoft methods
    """
    from orthoft.recipes.catalogue import catalogue, listed

    found = catalogue()
    typer.echo(json.dumps(found, indent=2, default=str) if json_ else listed(found))
