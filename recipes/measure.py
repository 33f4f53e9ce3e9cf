"""Statistics of a recipe's experts, a file for each: what fisher, regmean, frank_wolfe and ota merge with.

measure("recipe.yaml", "fisher")
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import yaml
from safetensors import safe_open
from torch import nn

from orthoft.errors import unknown
from orthoft.merging.files.hub import find_folder
from orthoft.merging.statistics import KINDS, STATISTICS_OF
from orthoft.recipes.devices import merge_device
from orthoft.recipes.expert import Ready, read_experts
from orthoft.recipes.layout import STATISTICS, expert_folder, statistics_of
from orthoft.recipes.load import load
from orthoft.recipes.models import load_model
from orthoft.recipes.output import tasks_locked
from orthoft.recipes.prepare import check, quiet
from orthoft.recipes.schema import Measured, Recipe
from orthoft.recipes.search_report import job
from orthoft.recipes.statistics import adam_moments, collect

Statistic = Literal["fisher", "gram", "second_moment"]
METHOD: dict[str, str] = {"fisher": "fisher", "gram": "regmean", "second_moment": "ota"}  # unless the recipe's takes it


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
    if kind not in KINDS:
        raise unknown("kind of statistics", kind, KINDS)
    if examples < 1:
        raise ValueError(f"examples is a number above 0, got {examples}")
    checked = load(recipe, overrides)
    folder = Path(checked.output, STATISTICS) if out is None else Path(out).expanduser()
    files = {name: statistics_of(folder, name, kind) for name in _chosen(checked, tasks)}
    if taken := [str(file) for file in files.values() if file.exists() and not overwrite]:
        raise FileExistsError(f"statistics exist: {', '.join(taken)}: give --overwrite, or choose another folder")
    wanted = Measured(examples=examples, only=list(only) or ["*"])
    with quiet():
        check(checked)
        if checked.threads is not None:
            torch.set_num_threads(checked.threads)
        base = find_folder(checked.base, "base")
        experts = [ready for ready in read_experts(checked, base) if ready.task.name in files]
        with tasks_locked(Path(checked.output), list(files)):
            for ready in experts:
                _measure_one(checked, base, ready, kind, file := files[ready.task.name], wanted)
                say(f"{ready.task.name}: {file}")
    job_file = folder / f"merge-{kind}.yaml"
    job_file.write_text(yaml.safe_dump(merge_job(checked, kind, folder), sort_keys=False), encoding="utf-8")
    told = {name: str(file) for name, file in files.items()}
    return {"kind": kind, "files": told, "command": shlex.join(["orthoft", "merge", str(job_file)])}


def _chosen(recipe: Recipe, tasks: Sequence[str] | None) -> list[str]:
    names = [task.name for task in recipe.tasks]
    for name in tasks or ():
        if name not in names:
            raise unknown("task", name, names)
    return [name for name in names if tasks is None or name in tasks]


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
    with safe_open(file, framework="pt") as opened:
        metadata: Mapping[str, str] = opened.metadata() or {}
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


def merge_job(recipe: Recipe, kind: Statistic, folder: Path) -> dict[str, Any]:
    """Return the merge of the experts that have statistics in a folder, as ``orthoft merge`` reads it.

    It is the recipe's own if that takes this kind, else one with the method's defaults on the same weights.
    """
    names = [task.name for task in recipe.tasks]
    files = {name: str(file) for name in names if (file := statistics_of(folder, name, kind)).is_file()}
    words, wanted = dict[str, Any](method=METHOD[kind]), recipe.merge
    if wanted is not None and STATISTICS_OF.get(wanted.method) == kind:
        words = wanted.given(len(names))
        if "weights" in words:
            words["weights"] = [one for name, one in zip(names, words["weights"], strict=True) if name in files]
    elif wanted is not None:
        words |= wanted.model_dump(include={"include", "exclude"}, exclude_defaults=True)
    experts = {name: str(expert_folder(Path(recipe.output), name)) for name in files}
    output = Path(recipe.output, f"merged-{words['method']}")
    made = job(recipe.base, experts, words, output, recipe.seed, recipe.export.dtype, files)
    return made | merge_device(recipe.device)
