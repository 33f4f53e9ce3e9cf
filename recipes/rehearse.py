"""A recipe on shapes alone: each adapter on the base without its weights, and the plan of the merge that follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoConfig

from orthoft.errors import NeedsWeights
from orthoft.merging import READERS
from orthoft.merging.files.tensors import TensorFolder
from orthoft.merging.formats.ours import get_reader
from orthoft.merging.formats.registry import Extent
from orthoft.merging.formats.tokens import TOKENS
from orthoft.merging.sources.adapter import open_source
from orthoft.merging.sources.expert_inputs import ROTATIONS, first_matrices, stored_experts
from orthoft.merging.sources.names import match_names
from orthoft.merging.sources.orientation import is_stacked
from orthoft.merging.sources.parameters import INNER
from orthoft.merging.sources.renames import loaded_model
from orthoft.merging.statistics import STATISTICS_OF
from orthoft.merging.wish import Wish, check_patterns
from orthoft.recipes.elsewhere import folder_of, refuse_others_tensors
from orthoft.recipes.load import RecipeError
from orthoft.recipes.models import auto_class, config_of
from orthoft.recipes.prepare import wished
from orthoft.recipes.schema import Export, Merge, Recipe
from orthoft.recipes.sources import ranks_of_others
from orthoft.recipes.statistics import refuse_unknown
from orthoft.recipes.task_schema import Task

Ranks = Mapping[str, int | None]  # of a task's factors, by the adapted matrix; None for a matrix without factors
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Saved:
    """What a task's expert will hold, by the names that its model has for them; ``complete`` unless there may be more.

    Extents of adapters by module, the modules whose bias changes, shapes of tensors that replace the base's
    (``modules_to_save``, biases), weights of which some rows are new, and whether the adapter rotates inputs.
    """

    extents: Mapping[str, Extent] = field(default_factory=dict)
    biased: Sequence[str] = ()
    beside: Mapping[str, Shape] = field(default_factory=dict)
    tokens: Sequence[str] = ()
    complete: bool = True
    rotates: bool = False

    @cached_property
    def ranks(self) -> Ranks:
        """The matrices that change, with the ranks of their factors."""
        whole = [name.removesuffix(".weight") for name, shape in self.beside.items() if len(shape) == 2]
        return {**dict.fromkeys(whole), **{module: extent.rank for module, extent in self.extents.items()}}

    def experts(self, base: TensorFolder) -> dict[str, str]:
        """Return {module: its first matrices, as the loaded model calls them} of the fused experts among them."""
        return first_matrices(self.extents, base) if self.rotates else {}

    def in_base(self, base: TensorFolder) -> dict[str, list[str]] | None:
        """Return what tensors of the base change, by their own names, named as in its files; None if it is unknown."""
        experts = self.experts(base)
        extents = {f"{module}.weight": extent for module, extent in self.extents.items() if module not in experts}

        def fits(own: str, theirs: str) -> bool:
            if own in extents:
                return extents[own].fits(base.shape(theirs))
            return own not in self.beside or self.beside[own] == base.shape(theirs)

        firsts = loaded_model(base).firsts if experts else {}
        names = [*extents, *self.beside, *self.tokens]
        try:
            naming = match_names([*names, *experts.values()], base, fits, firsts)
        except ValueError:  # ambiguous: the merge tells
            return None
        named = {own: naming.to_base(own) for own in (*names, *(f"{module}.bias" for module in self.biased))}
        found = {own: [theirs] for own, theirs in named.items() if theirs is not None and theirs in base}
        return found | {f"{module}.weight": stored_experts(name, naming, base) for module, name in experts.items()}


def rehearse(recipe: Recipe, base: Path) -> None:
    """Put every adapter on the base, as shapes without storage, and plan the merge of what training would save.

    Raises:
        RecipeError: one line per adapter that does not fit the base, or for a merge or an export they do not allow.
    """
    mistakes: list[str] = []
    saved: dict[str, Saved] = {}
    for i, task in enumerate(recipe.tasks):
        try:
            saved[task.name] = saved_by(task, base, to_merge=recipe.merge is not None)
        except (ValueError, TypeError, FileNotFoundError) as error:
            mistakes.append(f"tasks[{i}].{task.given}: {' '.join(str(error).split())}")
    if recipe.merge is not None and not mistakes:
        mistakes = unmeasurable(recipe.merge, recipe.tasks[0].kind, base)
    if recipe.merge is not None and not mistakes:
        stored = TensorFolder(base)
        try:
            others = ranks_of_others(recipe, stored)
        except (ValueError, FileNotFoundError) as error:
            raise RecipeError(f"merge.sources: {error}") from None
        mistakes = misnamed(base, saved) or merge_mistakes(recipe.merge, recipe.export, saved, stored, others)
    if mistakes:
        raise RecipeError("\n".join(mistakes))


def unmeasurable(merge: Merge, kind: str, base: Path) -> list[str]:
    """Return a line if ``merge.statistics.only`` leaves nothing of which a method of the merge has numbers."""
    if merge.statistics is None:
        return []
    model = _shapes(kind, base)
    try:
        for numbers in {STATISTICS_OF[name] for name in merge.methods if name in STATISTICS_OF}:
            refuse_unknown(model, numbers, merge.statistics.only)
    except ValueError as error:
        return [f"merge.statistics.only: {error}"]
    return []


def _shapes(kind: str, base: Path) -> Any:
    """Return the model of a base without its weights."""
    with torch.device("meta"):
        return auto_class(kind).from_config(AutoConfig.from_pretrained(str(base), trust_remote_code=False))


def adapter_ranks(task: Task, base: Path, to_merge: bool) -> Ranks:
    """Return the matrices that a task's expert will change, with the ranks of its factors; none unless ``to_merge``.

    Raises:
        ValueError: the adapter fits no module of the base, or uses what cannot be merged.
    """
    return saved_by(task, base, to_merge).ranks


def saved_by(task: Task, base: Path, to_merge: bool) -> Saved:
    """Return what a task's expert will hold, nothing unless ``to_merge``.

    Raises:
        ValueError: the adapter fits no module of the base, or uses what cannot be merged.
    """
    config = config_of(task)
    model = _adapted_shapes(task, base, config)
    if task.expert is not None and config.peft_type in READERS:
        open_source(task.name, folder_of(task), TensorFolder(base))
    if model is None:
        return Saved(complete=False)
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    if task.expert is not None:
        refuse_others_tensors(folder_of(task), state, model.state_dict())
    if not to_merge:
        return Saved()
    reader = get_reader(config.to_dict())
    modules: dict[str, dict[str, Shape]] = {}
    beside: dict[str, Shape] = {}
    tokens: list[str] = []
    for key, tensor in state.items():
        name = key.removeprefix("base_model.model.")
        module, own, rest = name.partition(f".{reader.prefix}")
        if own:
            modules.setdefault(module, {})[reader.prefix + rest] = tuple(tensor.shape)
        elif name.endswith(TOKENS):
            tokens.append(name.removesuffix(TOKENS) + ".weight")
        else:
            beside[name.replace(".base_layer.", ".")] = tuple(tensor.shape)
    extents = {module: reader.extent(config.to_dict(), shapes) for module, shapes in modules.items()}
    biased = [module for module, shapes in modules.items() if reader.bias in shapes]
    complete = not getattr(config, "target_parameters", None)
    return Saved(extents, biased, beside, tokens, complete, rotates=reader.peft_type in ROTATIONS)


def _adapted_shapes(task: Task, base: Path, config: peft.PeftConfig) -> Any:
    """Return a task's adapter on its base without weights, or None if the adapter starts from the weights' values."""
    with torch.device("meta"):
        try:
            return peft.get_peft_model(_shapes(task.kind, base), config)
        except (NotImplementedError, NeedsWeights):
            return None
        except RuntimeError as error:
            if "meta tensor" not in str(error):
                raise
            return None


def misnamed(base: Path, saved: Mapping[str, Saved]) -> list[str]:
    """Return a line if none of the adapted weights has a name in the base's files that a merge could find."""
    stored = TensorFolder(base)
    modules = dict.fromkeys(chain.from_iterable(own.ranks for own in saved.values()))
    experts = first_matrices((module.replace(INNER, "") for module in modules), stored)
    wanted = [f"{module}.weight" for module in modules if module.replace(INNER, "") not in experts]
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


def merge_mistakes(
    merge: Merge,
    export: Export,
    saved: Mapping[str, Saved],
    base: TensorFolder,
    others: Mapping[str, Mapping[str, int | None]] | None = None,
) -> list[str]:
    """Return what forbids the merge's patterns, its space or the LoRA export, as one line, or nothing.

    ``others`` are ranks by the base's own names of what is merged beside what was saved. Patterns are of the names in
    the base's files, as those of a merge are. What is unknown is not judged.
    """
    wish = wished(merge, len(saved))
    named = {task: own.in_base(base) for task, own in saved.items()}
    touched = {tensor for names in named.values() for tensors in (names or {}).values() for tensor in tensors}
    touched |= {*chain.from_iterable(others.values() if others else ())}
    whole = None not in named.values() and all(own.complete for own in saved.values())
    if whole:
        try:
            _check_patterns(wish, [name for name in base if name in touched and 0 not in base.shape(name)])
        except ValueError as error:
            return [f"merge: {error}"]
    ranks: dict[str, dict[str, int | None]] = {}
    for task, names in named.items():
        for module, rank in saved[task].ranks.items():
            for weight in filter(wish.selects, (names or {}).get(f"{module}.weight", ())):
                ranks.setdefault(weight, {})[task] = None if is_stacked(weight, base.shape(weight)) else rank
        experts = chain.from_iterable((names or {}).get(f"{m}.weight", ()) for m in saved[task].experts(base))
        if export.lora is not None and any(map(wish.selects, experts)):
            return [f"export.lora: {task} rotates what fused experts read, which no LoRA holds: leave it out"]
    for name, own in (others or {}).items():
        for weight in filter(wish.selects, own):
            ranks.setdefault(weight, {})[name] = own[weight]
    return _space_mistakes(merge, wish, export, [*saved, *(others or {})], ranks, whole)


def _check_patterns(wish: Wish, names: Sequence[str]) -> None:
    check_patterns((*wish.include, *wish.exclude, *wish.overrides), names)
    if names and not any(map(wish.selects, names)):
        raise ValueError("include and exclude leave no weight to merge")


def _space_mistakes(
    merge: Merge, wish: Wish, export: Export, tasks: Sequence[str], weights: Mapping[str, Ranks], whole: bool
) -> list[str]:
    """Return what forbids the space or the LoRA export of weights, the ``whole`` of them or not, with ranks by task."""
    exact = export.lora is not None and export.lora.rank is None
    used = set[str]()
    for weight, ranks in weights.items():
        dense = [task for task, rank in ranks.items() if rank is None]
        try:
            space = wish.of(weight, tasks).choice(list(ranks.values()), vector=False).space
        except (ValueError, TypeError) as error:
            return [f"merge: {weight.removesuffix('.weight')}: {error} (no factors: {', '.join(dense)})"]
        if exact and not (space.keeps_factors and not dense):
            who = f"the adapters of {', '.join(dense)} have" if dense else f"a {merge.method!r} merge in full space has"
            return [f"export.lora: a rank is needed, {who} no low-rank factors: set export.lora.rank"]
        used.add(space.name)
    if whole and used and wish.space not in ("auto", *used):
        try:
            wish.refuse_space()
        except ValueError as error:
            return [f"merge: {error}"]
    return []
