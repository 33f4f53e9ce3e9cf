"""The subspaces of a recipe's tasks: rows of all of them through the base, choices for each, in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from orthoft.recipes.data import Example, batches, read_file, require, task_data
from orthoft.recipes.finetune import load_model
from orthoft.recipes.initialise import NEEDS_INPUTS, choose, covariances, weights_of
from orthoft.recipes.rehearse import adapter_ranks
from orthoft.recipes.schema import Classification, Recipe


def save_subspaces(recipe: Recipe, base: Path, tokenizer: Any, folder: Path) -> None:
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
    pad = tokenizer.pad_token_id or 0

    def seen(examples: Sequence[Example], what: str) -> dict[str, Tensor]:
        return covariances(model, batches(examples, recipe.evaluate.batch_size, pad, f"{what} inputs"), names)

    inputs, general = [], None
    if wanted.method in NEEDS_INPUTS:
        splits = [(task.name, task_data(task, tokenizer, recipe.seed).train) for task in recipe.tasks]
        inputs = [seen(train[: wanted.rows], name) for name, train in splits]
        general = None if wanted.general is None else seen(_texts(recipe, tokenizer, wanted.general), "general")
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


def _texts(recipe: Recipe, tokenizer: Any, file: str) -> list[Example]:
    """Return token ids of general texts, as long as those of the tasks."""
    assert recipe.train_to_merge is not None
    rows = read_file(Path(file))[: recipe.train_to_merge.rows]
    require(rows, ["text"], "train_to_merge.general")
    longest = max(t.max_length if isinstance(t, Classification) else t.block_size for t in recipe.tasks)
    ids = tokenizer([str(row["text"]) for row in rows], truncation=True, max_length=longest)["input_ids"]
    return [{"input_ids": each} for each in ids if each]
