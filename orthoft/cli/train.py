"""``run`` and ``finetune``: recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orthoft.cli.app import Device, Dtype, Overrides, Overwrite, RecipeFile, app
from orthoft.cli.commands import TRAIN
from orthoft.cli.output import Output


@app.command(rich_help_panel=TRAIN)
def run(
    out: Output,
    recipe: RecipeFile,
    device: Device = None,
    dtype: Dtype = None,
    set_: Overrides = None,
    overwrite: Overwrite = False,
    keep_experts: Annotated[
        bool, typer.Option("--keep-experts", help="Do a finished run again, but train only what changed.")
    ] = False,
) -> None:
    """Fine-tune, merge, export and evaluate as a recipe says.

    A run that was broken off goes on where it stopped. It ends with a table of scores, which results.json in the
    output folder holds, too. Under `accelerate launch` all processes train together.

    Example: orthoft run recipes/configs/minilm.yaml

    Example: orthoft run recipes/configs/minilm.yaml --set seed=1 --set output=runs/second --threads 2

    Example: orthoft run recipes/configs/minilm.yaml --set merge.method=ties --keep-experts

    In Python: orthoft.recipes.run("recipes/configs/minilm.yaml", ["seed=1", "output=runs/second"])
    """
    from orthoft import recipes
    from orthoft.recipes.prepare import RESULTS
    from orthoft.recipes.table import results_table

    overrides = out.overrides(set_, device=device, dtype=dtype)
    results = recipes.run(recipe, overrides, overwrite=overwrite, keep_experts=keep_experts, say=out.say)
    file = Path(results["recipe"]["output"], RESULTS)
    out.show(results, f"{results_table(results)}\n\nresults: {file}", said=True)


@app.command(rich_help_panel=TRAIN)
def finetune(
    out: Output,
    recipe: RecipeFile,
    task: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this task; may be repeated.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    set_: Overrides = None,
    overwrite: Overwrite = False,
) -> None:
    """Train the experts of a recipe; `run` takes them up later.

    Experts that are finished are not trained again. What is known of each stands in its expert.json.

    Example: orthoft finetune recipes/configs/minilm.yaml --task sarcasm

    Example: orthoft finetune recipes/configs/minilm.yaml --quiet --set seed=1 --set output=runs/second

    In Python: orthoft.recipes.run("recipes/configs/minilm.yaml", until="finetune", tasks=["sarcasm"])
    """
    from orthoft import recipes

    overrides = out.overrides(set_, device=device, dtype=dtype)
    done = recipes.run(recipe, overrides, until="finetune", tasks=task or None, overwrite=overwrite, say=out.say)
    lines = [f"{name}: {expert['folder']}" for name, expert in done["experts"].items()]
    out.show(done["experts"], "\n".join(lines))
