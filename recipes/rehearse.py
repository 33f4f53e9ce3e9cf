"""A recipe on shapes alone: each adapter on the base without its weights, and the plan of the merge that follows."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoConfig

from orthoft.merging.files.tensors import TensorFolder
from orthoft.merging.formats.ours import get_reader
from orthoft.merging.sources.names import match_names
from orthoft.recipes.load import RecipeError
from orthoft.recipes.models import adapter_config, auto_class
from orthoft.recipes.prepare import wished
from orthoft.recipes.schema import Export, Merge, Recipe
from orthoft.recipes.task_schema import Task

Ranks = Mapping[str, int | None]  # of a task's factors, by the adapted matrix; None for a matrix without factors


def rehearse(recipe: Recipe, base: Path) -> None:
    """Put every adapter on the base, as shapes without storage, and plan the merge of what training would save.

    Raises:
        RecipeError: one line per adapter that does not fit the base, or for a merge or an export they do not allow.
    """
    mistakes: list[str] = []
    ranks: dict[str, Ranks] = {}
    for i, task in enumerate(recipe.tasks):
        try:
            ranks[task.name] = adapter_ranks(task, base, to_merge=recipe.merge is not None)
        except (ValueError, TypeError) as error:
            mistakes.append(f"tasks[{i}].adapter: {' '.join(str(error).split())}")
    if recipe.merge is not None and not mistakes:
        mistakes += misnamed(base, ranks)
        mistakes += merge_mistakes(recipe.merge, recipe.export, ranks)
    if mistakes:
        raise RecipeError("\n".join(mistakes))


def adapter_ranks(task: Task, base: Path, to_merge: bool) -> Ranks:
    """Return the matrices that a task's expert will change, with the ranks of its factors; none unless ``to_merge``.

    Raises:
        ValueError: the adapter fits no module of the base, or uses what cannot be merged.
    """
    config = adapter_config(task.adapter, task.kind)
    with torch.device("meta"):
        model: Any = auto_class(task.kind).from_config(AutoConfig.from_pretrained(str(base), trust_remote_code=False))
        try:
            model = peft.get_peft_model(model, config)
        except NotImplementedError:  # an adapter that starts from the weights' values: it cannot be built without them
            return {}
    if not to_merge:
        return {}
    reader = get_reader(config.to_dict())
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    whole: list[str] = []  # modules_to_save, and the like
    for key, tensor in peft.get_peft_model_state_dict(model).items():
        module, own, rest = key.removeprefix("base_model.model.").partition(f".{reader.prefix}")
        if own:
            modules.setdefault(module, {})[reader.prefix + rest] = tuple(tensor.shape)
        elif tensor.ndim == 2:
            whole.append(module.removesuffix(".weight"))
    adapted = {module: reader.extent(config.to_dict(), shapes).rank for module, shapes in modules.items()}
    return {**dict.fromkeys(whole), **adapted}


def misnamed(base: Path, ranks: Mapping[str, Ranks]) -> list[str]:
    """Return a line if none of the adapted weights has a name in the base's files that a merge could find."""
    wanted = [f"{module}.weight" for module in dict.fromkeys(chain.from_iterable(ranks.values()))]
    stored = TensorFolder(base)
    try:
        naming = match_names(wanted, stored, lambda own, theirs: True)
    except ValueError:  # ambiguous without shapes: the merge has them, and decides
        return []
    if not wanted or any(naming.to_base(name) in stored for name in wanted):
        return []
    return [
        f"base: transformers loads its weights under other names than {base} has ({wanted[0]} is not there), which no "
        "merge can follow: load it, and save it with save_pretrained(folder, save_original_format=False)"
    ]


def merge_mistakes(merge: Merge, export: Export, ranks: Mapping[str, Ranks]) -> list[str]:
    """Return what forbids the merge's space or the LoRA export, as one line, or nothing."""
    wish = wished(merge, len(ranks))
    exact = export.lora is not None and export.lora.rank is None
    for module in dict.fromkeys(chain.from_iterable(ranks.values())):
        found = {task: own[module] for task, own in ranks.items() if module in own}
        dense = [task for task, rank in found.items() if rank is None]
        try:
            space = wish.of(f"{module}.weight", list(ranks)).choice(list(found.values()), vector=False).space
        except ValueError as error:
            return [f"merge: {module}: {error} (no factors: {', '.join(dense)})"]
        if exact and not (space.keeps_factors and not dense):
            who = f"the adapters of {', '.join(dense)} have" if dense else f"a {merge.method!r} merge in full space has"
            return [f"export.lora: a rank is needed, {who} no low-rank factors: set export.lora.rank"]
    return []
