"""``statistics``: numbers from data, which some methods merge with."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from orthoft.cli.app import Device, Dtype, Overrides, RecipeFile, app
from orthoft.cli.commands import MERGE
from orthoft.cli.output import Output


class Kind(StrEnum):
    fisher = "fisher"
    gram = "gram"
    second_moment = "second_moment"


@app.command(rich_help_panel=MERGE)
def statistics(
    out: Output,
    recipe: RecipeFile,
    kind: Annotated[
        Kind, typer.Option(help="fisher for fisher; gram for regmean and frank_wolfe; second_moment for ota.")
    ] = Kind.fisher,
    task: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this task; may be repeated.")] = None,
    examples: Annotated[int, typer.Option(help="Of each train split.")] = 256,
    only: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Only weights that match; may be repeated.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="`statistics` in the recipe's output unless given.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    set_: Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
) -> None:
    """Measure a recipe's experts for merges that use numbers from data.

    Each expert, trained before by `orthoft finetune` or `orthoft run`, sees examples of its own train split; a file
    for each is written, and beside them the merge that uses them. What is printed last is the command that does it.

    Example: orthoft statistics recipes/configs/minilm.yaml --kind fisher

    Example: orthoft statistics recipes/configs/minilm.yaml --kind gram --examples 1000 --only "*attention*"

    In Python: orthoft.recipes.measure.measure("recipes/configs/minilm.yaml", kind="gram", examples=1000)
    """
    from orthoft.recipes.measure import measure

    done = measure(
        recipe,
        out.overrides(set_, device=device, dtype=dtype),
        kind.value,
        tasks=task or None,
        examples=examples,
        only=only or ("*",),
        out=folder,
        overwrite=overwrite,
        say=out.say,
    )
    out.show(done, done["command"])
