"""``search``: which merge of a recipe's experts is best."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from orthoft.cli.app import Device, Dtype, Overrides, RecipeFile, app
from orthoft.cli.commands import MERGE
from orthoft.cli.output import Output


class Objective(StrEnum):
    gain = "gain"
    score = "score"
    loss = "loss"


@app.command(rich_help_panel=MERGE)
def search(
    out: Output,
    recipe: RecipeFile,
    trials: Annotated[int | None, typer.Option(help="Merges to try in all; 50 unless given.")] = None,
    minutes: Annotated[float | None, typer.Option(help="How long to begin new ones.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Try this one only; may be repeated.")
    ] = None,
    space: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Try this one only; may be repeated.")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of each tuning split; all unless given.")] = None,
    objective: Annotated[
        Objective | None,
        typer.Option(
            help="The share of the experts' gain that is kept (gain, the default), the mean score, or negative loss."
        ),
    ] = None,
    pareto: Annotated[
        bool, typer.Option("--pareto", help="Look for the front between tasks, not the best mean.")
    ] = False,
    equal_weights: Annotated[bool, typer.Option("--equal-weights", help="Leave the tasks' weights at 1.")] = False,
    memory: Annotated[
        float | None, typer.Option(help="GB that weights and deltas may take beside the model; 8 unless given.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the trials; the recipe's unless given.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    set_: Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget the trials of an earlier search.")] = False,
) -> None:
    """Find the best merge of a recipe's experts.

    Method, space, scale, weights and parameters are tried on the tuning splits. The experts are read once; each trial
    merges them in memory. The best is scored on the test splits, once. A search that was interrupted, or is given more
    trials, goes on where it stopped. What is not given is that of merge.search in the recipe, by which `orthoft run`
    searches before it merges.

    Example: orthoft search recipes/configs/minilm.yaml --trials 50

    Example: orthoft search recipes/configs/minilm.yaml --minutes 10 --method ties --method opcm --equal-weights

    In Python: orthoft.recipes.search.search("recipes/configs/minilm.yaml", trials=50)
    """
    from orthoft.recipes.search import search as search_merge

    found = search_merge(
        recipe,
        out.overrides(set_, device=device, dtype=dtype),
        trials=trials,
        minutes=minutes,
        methods=method or None,
        spaces=space or None,
        rows=rows,
        objective=None if objective is None else objective.value,
        pareto=pareto or None,
        equal_weights=equal_weights or None,
        memory=memory,
        seed=seed,
        overwrite=overwrite,
        say=out.say,
    )
    from orthoft.recipes.search_report import call  # which imports torch, as the search has done

    out.show(found, call(found["merge"]), said=True)
