"""``run`` and ``finetune``: recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orthoft.cli.app import Device, Dtype, Overrides, Overwrite, RecipeFile, app
from orthoft.cli.commands import TRAIN
from orthoft.cli.output import Output

KeepExperts = Annotated[
    bool,
    typer.Option("--keep-experts", help="Go on from a finished run, or another recipe's: train only what changed."),
]


@app.command(rich_help_panel=TRAIN)
def run(
    out: Output,
    recipe: RecipeFile,
    device: Device = None,
    dtype: Dtype = None,
    set_: Overrides = None,
    overwrite: Overwrite = False,
    keep_experts: KeepExperts = False,
) -> None:
    """Fine-tune, merge, export and evaluate as a recipe says.

    A run that was broken off takes up its finished experts, with `save_steps` the checkpoints of the last one, and the
    scores of base and experts. It ends with a table of scores, which results.json in the output folder holds, too.
    Under `accelerate launch` all processes train together.

    Example: orthoft run recipes/configs/minilm.yaml

    Example: orthoft run recipes/configs/minilm.yaml --set seed=1 --set output=runs/second --threads 2

    Example: orthoft run recipes/configs/minilm.yaml --set merge.method=ties --keep-experts

    In Python: orthoft.recipes.run("recipes/configs/minilm.yaml", ["seed=1", "output=runs/second"])
    """
    from orthoft import recipes
    from orthoft.recipes.layout import RESULTS
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
    keep_experts: KeepExperts = False,
) -> None:
    """Train the experts of a recipe; `run` takes them up later.

    In a run that is not finished, experts that are there are not trained again. One that is finished, or of another
    recipe, needs --keep-experts, which trains only what changed, or --overwrite, which begins anew or trains the chosen
    tasks again; both remove its merge and its results, for `run` to make anew. What is known of each expert stands in
    its expert.json.

    Example: orthoft finetune recipes/configs/minilm.yaml --task sarcasm

    Example: orthoft finetune recipes/configs/minilm.yaml --quiet --set seed=1 --set output=runs/second

    In Python: orthoft.recipes.run("recipes/configs/minilm.yaml", until="finetune", tasks=["sarcasm"])
    """
    from orthoft import recipes

    overrides = out.overrides(set_, device=device, dtype=dtype)
    again = {"overwrite": overwrite, "keep_experts": keep_experts}
    done = recipes.run(recipe, overrides, until="finetune", tasks=task or None, say=out.say, **again)
    lines = [f"{name}: {expert['folder']}" for name, expert in done["experts"].items()]
    out.show(done["experts"], "\n".join(lines))
