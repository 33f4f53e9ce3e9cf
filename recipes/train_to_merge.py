"""The subspaces of a recipe's tasks: rows of all of them through the base, choices for each, in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from orthoft.recipes.data import read_file, require
from orthoft.recipes.initialise import NEEDS_INPUTS, choose, covariances, weights_of
from orthoft.recipes.kinds import Example, Kind, kind_of
from orthoft.recipes.models import load_model
from orthoft.recipes.rehearse import adapter_ranks
from orthoft.recipes.schema import Recipe


def save_subspaces(recipe: Recipe, base: Path, folder: Path) -> None:
    """Write ``NAME.safetensors`` for each task: by the base's names of the weights, the rows that its adapter reads.

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
    if wanted.method in NEEDS_INPUTS:
        inputs = [seen(kind, kind.data(recipe.seed).train[: wanted.rows], kind.task.name) for kind in kinds]
        if wanted.general is not None:
            general = seen(kinds[0], kinds[0].texts(_texts(wanted.general, wanted.rows)), "general")
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
    folder.mkdir(parents=True, exist_ok=True)
    for task, rows in zip(recipe.tasks, chosen, strict=True):
        save_file(rows, folder / f"{task.name}.safetensors", {"method": wanted.method})


def _texts(file: str, rows: int) -> list[str]:
    """Return the first texts of a file."""
    found = read_file(Path(file))[:rows]
    require(found, ["text"], "train_to_merge.general")
    return [text for row in found if (text := str(row["text"]))]
