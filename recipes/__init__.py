"""Recipes: a YAML file that names a base and tasks becomes experts, a merge of them, and a table.

run("recipe.yaml", ["merge.method=ties"])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from orthoft.recipes.load import RecipeError, load
from orthoft.recipes.schema import Again, Recipe

__all__ = ["Recipe", "RecipeError", "load", "run"]


def run(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    until: Literal["finetune"] | None = None,
    tasks: Sequence[str] | None = None,
    overwrite: bool = False,
    keep_experts: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Fine-tune each task of a recipe, evaluate, merge, export, evaluate the export; return ``results.json``.

    A run that was broken off takes up its finished experts, with ``save_steps`` the checkpoints of the last one, and
    the scores of base and experts. Under `accelerate launch` all processes train together; the first one does the rest
    and has the results.

    Args:
        recipe: a YAML file, or the same as a mapping.
        overrides: ``place=value`` each, as ``tasks.0.training.max_steps=5``.
        until: "finetune" stops when the experts are there.
        tasks: names of the tasks to do, all unless given; only with ``until="finetune"``.
        overwrite: start again where the output folder holds a run; with a choice of tasks, train these again alone.
        keep_experts: go on from a finished run, or from one of another recipe; experts are trained again only if their
            task, its data or the base changed.
        say: is told what happens, line by line.

    Raises:
        RecipeError: a ValueError with one line per mistake in the recipe, before anything is written.
        FileNotFoundError: a file it names is not there.
        FileExistsError: the output folder holds something else, a finished run, or a run of another recipe.
    """
    checked = load(recipe, overrides)
    if tasks is not None and until != "finetune":
        raise ValueError('a choice of tasks goes with until="finetune": a merge needs all of them')
    if overwrite and keep_experts:
        raise ValueError("overwrite starts again from nothing, keep_experts does not: give one of them")
    again: Again = "overwrite" if overwrite else "keep experts" if keep_experts else "no"
    from orthoft.recipes.pipeline import run_recipe  # torch comes in here, after the recipe is known to be sound

    return run_recipe(checked, until=until, tasks=tasks, again=again, say=say)
