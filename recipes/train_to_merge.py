"""The subspaces of a recipe's tasks: rows of all of them through the base, choices for each, in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from orthoft.recipes.data import read_file, require
from orthoft.recipes.initialise import NEEDS_INPUTS, choose, covariances, weights_of
from orthoft.recipes.keep_away import KeepAway, root
from orthoft.recipes.kinds import Example, Kind, kind_of
from orthoft.recipes.models import load_model
from orthoft.recipes.rehearse import adapter_ranks
from orthoft.recipes.schema import Recipe, TrainToMerge
from orthoft.recipes.subspaces import mean_of_others


def save_subspaces(recipe: Recipe, base: Path, folder: Path) -> None:
    """Write ``NAME.safetensors`` for each task: by the base's names of the weights, the rows that its adapter reads.

    With a penalty, ``NAME.others.safetensors`` holds the roots of the other tasks' covariances.

    Raises:
        ValueError: ranks that do not fit side by side, or a layer whose inputs cannot be seen.
    """
    wanted = recipe.train_to_merge
    assert wanted is not None
    found = [adapter_ranks(task, base, to_merge=True) for task in recipe.tasks]
    ranks = [{f"{module}.weight": r for module, r in own.items() if r is not None} for own in found]
    names = list(dict.fromkeys(name for own in ranks for name in own))
    model = load_model(recipe.tasks[0].kind, base, recipe.dtype)
    kinds = [kind_of(task, base) for task in recipe.tasks]

    def seen(kind: Kind[Any], examples: Sequence[Example], what: str) -> dict[str, Tensor]:
        batches = kind.batches(examples, recipe.evaluate.batch_size, f"{what} inputs")
        return covariances(model, (kind.inputs(model, batch) for batch in batches), names)

    inputs, general = [], None
    if wanted.method in NEEDS_INPUTS or wanted.penalty is not None:
        inputs = [seen(kind, kind.data(recipe.seed).train[: wanted.rows], kind.task.name) for kind in kinds]
        if wanted.general is not None:
            general = seen(kinds[0], kinds[0].texts(_texts(wanted.general, wanted.rows)), "general")
    folder.mkdir(parents=True, exist_ok=True)
    if wanted.penalty is not None:
        for place, task in enumerate(recipe.tasks):
            save_file(_roots(inputs, place, general), folder / f"{task.name}.others.safetensors")
    if wanted.method is None:
        return
    chosen = choose(
        wanted.method,
        ranks,
        weights_of(model, names),
        inputs,
        general=general,
        ridge=wanted.ridge,
        seed=recipe.seed,
        rotations=recipe.tasks[0].adapter.type == "psoft",
    )
    for task, rows in zip(recipe.tasks, chosen, strict=True):
        save_file(rows, folder / f"{task.name}.safetensors", {"method": wanted.method})


def read_subspace(wanted: TrainToMerge, folder: Path, name: str) -> tuple[dict[str, Tensor] | None, list[KeepAway]]:
    """Return the rows that were chosen for a task, if some were, and the callback of the penalty, if there is one."""
    rows = None if wanted.method is None else load_file(folder / f"{name}.safetensors")
    if wanted.penalty is None:
        return rows, []
    return rows, [KeepAway(load_file(folder / f"{name}.others.safetensors"), wanted.penalty)]


def _roots(
    inputs: Sequence[Mapping[str, Tensor]], place: int, general: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Return by weight the root of the covariance of the others' inputs of a task."""
    made: dict[tuple[int, ...], Tensor] = {}  # layers that share their inputs share the root
    found = {}
    for name in inputs[place]:
        own = [each[name] for each in inputs]
        key = tuple(map(id, own))
        if key not in made:
            made[key] = root(mean_of_others(own, place, None if general is None else general[name]))
        found[name] = made[key].clone()
    return found


def _texts(file: str, rows: int) -> list[str]:
    """Return the first texts of a file."""
    found = read_file(Path(file))[:rows]
    require(found, ["text"], "train_to_merge.general")
    return [text for row in found if (text := str(row["text"]))]
