"""Statistics of a recipe's experts, a file for each: what fisher, regmean, frank_wolfe and ota merge with.

measure("recipe.yaml", "fisher")
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from torch import nn

from orthoft.errors import unknown
from orthoft.merging.files.hub import find_folder
from orthoft.merging.statistics import KINDS, STATISTICS_OF
from orthoft.recipes.expert import STATISTICS, Ready, statistics_of
from orthoft.recipes.kinds.kind import Batch, on_device
from orthoft.recipes.load import load
from orthoft.recipes.models import load_model
from orthoft.recipes.prepare import check, quiet
from orthoft.recipes.schema import Recipe
from orthoft.recipes.search_setup import read_experts
from orthoft.recipes.statistics import collect, from_optimizer

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

    Returns ``files`` by task, and ``command``, the line of `orthoft merge` that uses them.

    Args:
        recipe, overrides: see `orthoft.recipes.run`.
        kind: "fisher" or "gram", see `orthoft.recipes.statistics.collect`, or "second_moment", see `adam_moments`.
        tasks: names of the experts to measure, all unless given.
        examples: how many rows, the first of the train split in the recipe's order.
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
    names = [task.name for task in checked.tasks]
    for name in tasks or ():
        if name not in names:
            raise unknown("task", name, names)
    folder = Path(checked.output, STATISTICS) if out is None else Path(out).expanduser()
    files = {name: statistics_of(folder, name, kind) for name in names if tasks is None or name in tasks}
    if taken := [str(file) for file in files.values() if file.exists() and not overwrite]:
        raise FileExistsError(f"statistics exist: {', '.join(taken)}: give --overwrite, or choose another folder")
    with quiet():
        check(checked)
        if checked.threads is not None:
            torch.set_num_threads(checked.threads)
        base = find_folder(checked.base, "base")
        for ready in read_experts(checked, base):
            if (name := ready.task.name) in files:
                _measure_one(checked, base, ready, kind, files[name], examples, only)
                say(f"{name}: {files[name]}")
    told = {name: str(file) for name, file in files.items()}
    return {"kind": kind, "files": told, "command": merge_command(checked, kind, told)}


def _measure_one(
    recipe: Recipe, base: Path, ready: Ready, kind: Statistic, file: Path, examples: int, only: Sequence[str]
) -> None:
    """Write the file of one expert, read from disk and merged into the base."""
    expert = Path(recipe.output, "experts", ready.task.name)
    adapted: Any = peft.PeftModel.from_pretrained(load_model(ready.task.kind, base, recipe.dtype), str(expert))
    model = adapted.merge_and_unload()
    judged = Judged(model, ready.kind.trained(model, ready.head))
    rows, size = ready.data.train[:examples], recipe.evaluate.batch_size
    batches = ready.kind.batches(rows, size, f"{kind} of {ready.task.name}")
    if kind == "second_moment":
        adam_moments(judged, batches, file, only=only)
    else:
        collect(judged, batches, kind, file, examples=examples, only=only, overwrite=True, progress=False)


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


def adam_moments(model: nn.Module, batches: Iterable[Batch], file: Path, *, only: Sequence[str] = ("*",)) -> Path:
    """Write the second moments that Adam would have at this model: batches go by at a learning rate of 0.

    ``v = (1 - beta_2) sum_s beta_2^(S - s) g_s^2 / (1 - beta_2^S)`` with the gradient ``g_s`` of batch ``s`` of ``S``.
    An adapter's own optimizer has none of the base's weights. Replaces the file if there is one.
    """
    model.eval()
    optimizer = torch.optim.Adam([parameter.requires_grad_(True) for parameter in model.parameters()], lr=0.0)
    for batch in batches:
        optimizer.zero_grad()
        model(**on_device(batch, model))["loss"].backward()
        optimizer.step()
    return from_optimizer(optimizer, model, file, only=only, overwrite=True)


def merge_command(recipe: Recipe, kind: Statistic, files: Mapping[str, str]) -> str:
    """Return the line that merges experts with their statistics, by the recipe's method if it takes this kind."""
    method, params = METHOD[kind], dict[str, Any]()
    if recipe.merge is not None and STATISTICS_OF.get(recipe.merge.method) == kind:
        method, params = recipe.merge.method, recipe.merge.params
    words = ["orthoft", "merge", "--base", recipe.base]
    for name, file in files.items():
        words += ["--source", f"{name}={Path(recipe.output, 'experts', name)}", "--statistics", f"{name}={file}"]
    words += ["--method", method, *(word for key, one in params.items() for word in ("--param", f"{key}={one}"))]
    return shlex.join([*words, "--output", str(Path(recipe.output, f"merged-{method}"))])
