"""``doctor``: what is installed, what it runs on, what is missing for what."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from orthoft.cli.app import app


@app.command()
def doctor(
    online: Annotated[bool, typer.Option("--online", help="Also try to reach the Hub.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say which versions are installed, what there is to compute on, and what is missing for what.

    Exits with 1 if a package that orthoft needs is missing, too old or broken; optional ones are only listed.

    Example: orthoft doctor

    Example: orthoft doctor --json --online
    """
    from orthoft.recipes.doctor import examine, told

    found = examine(online=online)
    typer.echo(json.dumps(found, indent=2) if json_ else told(found))
    for problem in found["problems"]:
        typer.echo(f"error: {problem}", err=True)
    if found["problems"]:
        raise typer.Exit(1)
