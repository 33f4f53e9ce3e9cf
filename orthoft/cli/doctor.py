"""``doctor``: what is installed, what it runs on, what is missing for what."""

from __future__ import annotations

from typing import Annotated

import typer

from orthoft.cli.app import app
from orthoft.cli.commands import START
from orthoft.cli.output import Output


@app.command(rich_help_panel=START)
def doctor(
    out: Output, online: Annotated[bool, typer.Option("--online", help="Also try to reach the Hub.")] = False
) -> None:
    """Say what is installed, what there is to compute on, and what is missing for what.

    Exits with 1 if a package that orthoft needs is missing, too old or broken; optional ones are only listed.

    Example: orthoft doctor

    Example: orthoft doctor --json --online

    In Python: orthoft.recipes.doctor.examine(online=True)
    """
    from orthoft.recipes.doctor import examine, told

    found = examine(online=online)
    out.show(found, told(found))
    for problem in found["problems"]:
        typer.echo(f"error: {problem}", err=True)
    if found["problems"]:
        raise typer.Exit(1)
