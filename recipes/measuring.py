"""Experts at work on rows of their own tasks, and the merge that uses what is seen: what `measure` and a run do."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import yaml
from torch import nn

from orthoft.merging.files.hub import asked_once, find_folder
from orthoft.merging.statistics import STATISTICS_OF, metadata_in
from orthoft.recipes.devices import merge_device
from orthoft.recipes.expert import Ready, read_experts
from orthoft.recipes.layout import STATISTICS, expert_folder, statistics_of
from orthoft.recipes.merge_job import job
from orthoft.recipes.models import load_model
from orthoft.recipes.output import tasks_locked
from orthoft.recipes.prepare import check, quiet
from orthoft.recipes.schema import Measured, Recipe
from orthoft.recipes.sources import kind_of_numbers, others_of, sources_of
from orthoft.recipes.statistics import adam_moments, collect
from orthoft.recipes.whole import write_whole_text

METHOD: dict[str, str] = {"fisher": "fisher", "gram": "regmean", "second_moment": "ota"}  # unless the recipe's takes it


@asked_once()
def measure_experts(
    recipe: Recipe, kind: str, files: Mapping[str, Path], folder: Path, wanted: Measured, say: Callable[[str], None]
) -> Path:
    """Write a file for each task in ``files``, and the merge that uses them to ``folder``; return that."""
    with quiet():
        check(recipe)
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        base = find_folder(recipe.base, "base")
        experts = [ready for ready in read_experts(recipe, base) if ready.task.name in files]
        with tasks_locked(Path(recipe.output), list(files)):
            for ready in experts:
                _measure_one(recipe, base, ready, kind, file := files[ready.task.name], wanted)
                say(f"{ready.task.name}: {file}")
    file = folder / f"merge-{kind}.yaml"
    for other in others_of(recipe):
        if kind_of_numbers(other) != kind:
            say(f"{other.called}: left out of {file}, it has no {kind} statistics")
    write_whole_text(file, yaml.safe_dump(merge_job(recipe, kind, folder), sort_keys=False))
    return file


def measured(
    recipe: Recipe, base: Path, tasks: Sequence[Ready], kind: str, wanted: Measured | None, say: Callable[[str], None]
) -> None:
    """Measure experts in the recipe's output; files that are there are taken up, unless ``wanted`` says otherwise."""
    for ready in tasks:
        file = statistics_of(Path(recipe.output, STATISTICS), ready.task.name, kind)
        words = wanted or Measured()
        if file.is_file() and (wanted is None or _told(file) == _asked(words)):
            say(f"  {kind} of {ready.task.name}: taken up")
        else:
            _measure_one(recipe, base, ready, kind, file, words)
            say(f"  {kind} of {ready.task.name}: {words.examples} examples at most")


def _asked(words: Measured) -> dict[str, str]:
    """Return what a file of statistics says of how it was measured."""
    return {"asked": str(words.examples), "only": json.dumps(words.only)}


def _told(file: Path) -> dict[str, str]:
    metadata = metadata_in(file)
    return {key: metadata.get(key, "") for key in ("asked", "only")}


def _measure_one(recipe: Recipe, base: Path, ready: Ready, kind: str, file: Path, words: Measured) -> None:
    """Write the file of one expert, read from disk and merged into the base."""
    expert = expert_folder(Path(recipe.output), ready.task.name)
    adapted: Any = peft.PeftModel.from_pretrained(load_model(ready.task.kind, base, recipe.dtype), str(expert))
    model = adapted.merge_and_unload()
    judged = Judged(model, ready.kind.trained(model, ready.head))
    rows, size = ready.kind.alone(ready.data.train)[: words.examples], recipe.evaluate.batch_size
    batches = ready.kind.batches(rows, size, f"{kind} of {ready.task.name}")
    given: dict[str, Any] = {"examples": words.examples, "only": words.only, "overwrite": True, "more": _asked(words)}
    if kind == "second_moment":
        adam_moments(judged, batches, file, **given)
    else:
        collect(judged, batches, "fisher" if kind == "fisher" else "gram", file, progress=False, **given)


class Judged(nn.Module):
    """A model that gives its task's loss, and whose weights keep the names that they have in the model alone."""

    def __init__(self, model: nn.Module, trained: nn.Module) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self._trained = (trained,)  # a tuple is not registered: its names would come beside the model's

    def forward(self, **batch: Any) -> Any:
        return self._trained[0](**batch)


def merge_job(recipe: Recipe, kind: str, folder: Path) -> dict[str, Any]:
    """Return the merge of the experts that have statistics in a folder, as ``orthoft merge`` reads it.

    It is the recipe's own if that takes this kind, else one with the method's defaults on the same weights.
    """
    names = [task.name for task in recipe.tasks]
    files = {name: str(file) for name in names if (file := statistics_of(folder, name, kind)).is_file()}
    others = {other.called: other for other in others_of(recipe)}
    files |= {name: str(other.statistics) for name, other in others.items() if kind_of_numbers(other) == kind}
    words, wanted = dict[str, Any](method=METHOD[kind]), recipe.merge
    if wanted is not None and STATISTICS_OF.get(wanted.method) == kind:
        words = wanted.given(len(names))
        if "weights" in words:
            words["weights"] = [
                one for name, one in zip([*names, *others], words["weights"], strict=True) if name in files
            ]
    elif wanted is not None:
        words |= wanted.model_dump(include={"include", "exclude"}, exclude_defaults=True)
    places = {name: str(place) for name, place in sources_of(recipe) if name in files}
    output = Path(recipe.output, f"merged-{words['method']}")
    made = job(recipe.base, places, words, output, recipe.seed, recipe.export.dtype, files)
    return made | merge_device(recipe.device)
