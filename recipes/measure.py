"""Statistics of a recipe's experts, a file for each: what fisher, regmean, frank_wolfe and ota merge with.

measure("recipe.yaml", "fisher")
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from orthoft.errors import unknown
from orthoft.recipes.layout import STATISTICS, statistics_of
from orthoft.recipes.load import load
from orthoft.recipes.schema import Measured, Recipe

Statistic = Literal["fisher", "gram", "second_moment"]


def measure(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    kind: Statistic = "fisher",
    *,
    tasks: Sequence[str] | None = None,
    examples: int = 256,
    only: Sequence[str] = ("*",),
    out: str | Path | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write the statistics of each expert of a recipe on rows of its own train split.

    Returns ``files`` by task, and ``command``, the line of `orthoft merge` that uses them by ``merge-KIND.yaml``.

    Args:
        recipe, overrides: see `orthoft.recipes.run`.
        kind: "fisher" or "gram", see `orthoft.recipes.statistics.collect`, or "second_moment", see `adam_moments`.
        tasks: names of the experts to measure, all unless given.
        examples: how many, the first of the train split in the recipe's order, each by itself where rows are packed.
        only: glob patterns of the base's names of weights, of which one has to match.
        out: the folder of the files ``TASK-KIND.safetensors``; ``statistics`` in the recipe's output unless given.
        overwrite: replace files that exist.
        say: is told what happens, line by line.

    Raises:
        RecipeError: a ValueError with one line per mistake in the recipe.
        ValueError: an unknown kind or task, an expert that is not there, or no weight that matches.
        FileExistsError: a file exists.
    """
    if kind not in get_args(Statistic):
        raise unknown("kind of statistics", kind, get_args(Statistic))
    if examples < 1:
        raise ValueError(f"examples is a number above 0, got {examples}")
    checked = load(recipe, overrides)
    folder = Path(checked.output, STATISTICS) if out is None else Path(out).expanduser()
    files = {name: statistics_of(folder, name, kind) for name in _chosen(checked, tasks)}
    if taken := [str(file) for file in files.values() if file.exists() and not overwrite]:
        raise FileExistsError(f"statistics exist: {', '.join(taken)}: give --overwrite, or choose another folder")
    from orthoft.recipes.measuring import measure_experts  # torch comes in here, after the recipe is known to be sound

    job = measure_experts(checked, kind, files, folder, Measured(examples=examples, only=list(only) or ["*"]), say)
    told = {name: str(file) for name, file in files.items()}
    return {"kind": kind, "files": told, "command": shlex.join(["orthoft", "merge", str(job)])}


def _chosen(recipe: Recipe, tasks: Sequence[str] | None) -> list[str]:
    names = [task.name for task in recipe.tasks]
    for name in tasks or ():
        if name not in names:
            raise unknown("task", name, names)
    return [name for name in names if tasks is None or name in tasks]
