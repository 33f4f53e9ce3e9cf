"""Search of a merge: Optuna proposes, each proposal is merged in memory and scored on the tuning splits.

search("recipe.yaml", trials=50)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orthoft.recipes.load import load
from orthoft.recipes.schema import MergeSearch, Objective

Say = Callable[[str], None]


def search(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    trials: int | None = None,
    minutes: float | None = None,
    methods: Sequence[str] | None = None,
    spaces: Sequence[str] | None = None,
    rows: int | None = None,
    objective: Objective | None = None,
    pareto: bool | None = None,
    equal_weights: bool | None = None,
    memory: float | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Search method, space, scale, weights and parameters for the experts of a recipe; return ``search.json``.

    The deltas are read once; a trial merges them in memory, is scored on the tuning splits, and is undone. The best
    alone is scored on the test splits, at the end. Each method starts with its defaults. A search that was broken off,
    or that is given more trials, goes on where it stopped. It is written to ``search`` in the recipe's output. What is
    not given is that of ``merge.search`` in the recipe, or else what stands below.

    Args:
        recipe: a YAML file, or the same as a mapping.
        overrides: ``place=value`` each, as for `orthoft.recipes.run`.
        trials: how many in all, earlier ones included; 50 unless a number or minutes are given.
        minutes: how long this call may begin new trials.
        methods: only these.
        spaces: only these.
        rows: of each tuning split, all unless given.
        objective: "gain", the default, is the share of the experts' whole gain that is kept, "score" the mean score
            (accuracy, or the negative loss), "loss" the mean negative loss.
        pareto: let Optuna look for the whole front between the tasks, not for the best mean alone.
        equal_weights: leave the tasks' weights at 1.
        memory: GB that the weights, deltas and one merge may take beside the model, 8 unless given.
        seed: of the trials, the recipe's unless given; methods that draw take the recipe's.
        overwrite: start again.

    Raises:
        RecipeError: a ValueError with one line per mistake in the recipe.
        ValueError: an expert is not there, a method cannot be tried, or Optuna is not installed.
        FileExistsError: there is a search of something else.
    """
    for name, number in (("trials", trials), ("minutes", minutes), ("rows", rows), ("memory", memory)):
        if number is not None and not number > 0:
            raise ValueError(f"{name} is a number above 0, got {number}")
    checked = load(recipe, overrides)
    given: dict[str, Any] = {
        **({} if trials is None and minutes is None else {"trials": trials, "minutes": minutes}),
        **_given(methods=_listed(methods), spaces=_listed(spaces), rows=rows, objective=objective, pareto=pareto),
        **_given(equal_weights=equal_weights, memory=memory, seed=seed),
    }
    words = ((checked.merge.search if checked.merge else None) or MergeSearch()).model_copy(update=given)
    from orthoft.recipes.search_study import (
        search_experts,
    )  # torch comes in here, after the recipe is known to be sound

    return search_experts(checked, words, overwrite, say).to_dict()


def _given(**words: Any) -> dict[str, Any]:
    return {key: one for key, one in words.items() if one is not None}


def _listed(names: Sequence[str] | None) -> list[str] | None:
    return list(names) if names else None
