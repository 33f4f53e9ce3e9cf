"""The subspaces of a recipe's tasks: rows of all of them through the base, choices for each, in files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from orthoft.merging.files.tensors import TensorFolder
from orthoft.merging.sources.expert_inputs import first_matrices
from orthoft.recipes.data import read_file, require
from orthoft.recipes.expert import fingerprint
from orthoft.recipes.initialise import NEEDS_INPUTS, choose, covariances, weights_of
from orthoft.recipes.keep_away import KeepAway, root
from orthoft.recipes.kinds import Example, Kind, kind_of
from orthoft.recipes.models import load_model
from orthoft.recipes.rehearse import adapter_ranks
from orthoft.recipes.schema import Recipe, TrainToMerge
from orthoft.recipes.subspaces import mean_of_others

MARK = "subspaces.json"  # beside them, when all are there: the fingerprint of what they were chosen from
SHARE = 0.25  # of the free memory, for the covariances that are held at once


def save_subspaces(recipe: Recipe, base: Path, folder: Path, room: int | None = None) -> None:
    """Write ``NAME.safetensors`` for each task: by the base's names of the weights, the rows that its adapter reads.

    With a penalty, ``NAME.others.safetensors`` holds the roots of the other tasks' covariances. The covariances of all
    layers need not fit into memory: the rows go through the base once for each group of layers of which they do.

    Args:
        room: entries of one task's covariances that are held at once: what a quarter of the free memory has room for,
            unless given. It changes nothing in the files.

    Raises:
        ValueError: ranks that do not fit side by side, or a layer whose inputs cannot be seen.
    """
    wanted = recipe.train_to_merge
    assert wanted is not None
    trained = [task for task in recipe.tasks if task.expert is None]
    found = [adapter_ranks(task, base, to_merge=True) if task in trained else {} for task in recipe.tasks]
    if fused := first_matrices(dict.fromkeys(module for own in found for module in own), TensorFolder(base)):
        raise ValueError(
            f"train_to_merge keeps tasks apart on linear layers, and {next(iter(fused))!r} holds fused experts: leave "
            "them out of the adapters' targets"
        )
    ranks = [{f"{module}.weight": r for module, r in own.items() if r is not None} for own in found]
    model = load_model(recipe.tasks[0].kind, base, recipe.dtype)
    weights = weights_of(model, dict.fromkeys(name for own in ranks for name in own))
    chosen: list[dict[str, Tensor]] = [{} for _ in recipe.tasks]
    roots: list[dict[str, Tensor]] = [{} for _ in recipe.tasks]
    for names, inputs, general in _seen(recipe, base, model, weights, room):
        if wanted.penalty is not None:
            for place, own in enumerate(roots):
                own |= _roots(inputs, place, general)
        if wanted.method is not None:
            rows = choose(
                wanted.method,
                ranks,
                {name: weights[name] for name in names},
                inputs,
                general=general,
                ridge=wanted.ridge,
                seed=recipe.seed,
                rotations=trained[0].trained.type == "psoft",
            )
            for own, more in zip(chosen, rows, strict=True):
                own |= more
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).unlink(missing_ok=True)
    for task, rows_of, roots_of in zip(recipe.tasks, chosen, roots, strict=True):
        if wanted.penalty is not None:
            save_file(roots_of, folder / f"{task.name}.others.safetensors")
        if wanted.method is not None:
            save_file(rows_of, folder / f"{task.name}.safetensors", {"method": wanted.method})
    (folder / MARK).write_text(json.dumps({"fingerprint": _mark(recipe, base)}) + "\n", encoding="utf-8")


def chosen_before(recipe: Recipe, base: Path, folder: Path) -> bool:
    """Say whether a folder has the subspaces of this recipe, all of them, from these data and this base."""
    file, wanted = folder / MARK, recipe.train_to_merge
    assert wanted is not None
    endings = [".safetensors"] * (wanted.method is not None) + [".others.safetensors"] * (wanted.penalty is not None)
    if not all((folder / f"{task.name}{ending}").is_file() for task in recipe.tasks for ending in endings):
        return False
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return bool(told.get("fingerprint") == _mark(recipe, base))


def _mark(recipe: Recipe, base: Path) -> str:
    """Return the fingerprint of the first task's expert: kept apart from the others, it depends on the data of all."""
    return fingerprint(recipe, recipe.tasks[0], base)


def _seen(
    recipe: Recipe, base: Path, model: nn.Module, weights: Mapping[str, Tensor], room: int | None
) -> Iterator[tuple[Sequence[str], list[dict[str, Tensor]], dict[str, Tensor] | None]]:
    """Yield groups of weights, with the covariances of each task's inputs of them and of the general text's, if any."""
    wanted = recipe.train_to_merge
    assert wanted is not None
    if wanted.method not in NEEDS_INPUTS and wanted.penalty is None:
        yield list(weights), [], None
        return
    kinds = [kind_of(task, base) for task in recipe.tasks]
    examples = [kind.alone(kind.data(recipe.seed).train)[: wanted.rows] for kind in kinds]
    general = None if wanted.general is None else kinds[0].texts(_texts(wanted.general, wanted.rows))
    groups = _groups(weights, room or _room(len(kinds) + (general is not None), next(model.parameters()).device))

    def seen(kind: Kind[Any], rows: Sequence[Example], what: str, names: Sequence[str]) -> dict[str, Tensor]:
        batches = kind.batches(rows, recipe.evaluate.batch_size, what)
        return covariances(model, (kind.inputs(model, batch) for batch in batches), names)

    for place, names in enumerate(groups, 1):
        what = "inputs" + (f", part {place} of {len(groups)}" if len(groups) > 1 else "")
        own = [seen(kind, rows, f"{kind.task.name} {what}", names) for kind, rows in zip(kinds, examples, strict=True)]
        yield names, own, None if general is None else seen(kinds[0], general, f"general {what}", names)


def _groups(weights: Mapping[str, Tensor], room: int) -> list[list[str]]:
    """Return the weights' names in order, in groups whose covariances have ``room`` entries at most, or in ones."""
    groups: list[list[str]] = []
    left = 0
    for name, weight in weights.items():
        entries = weight.shape[1] ** 2
        if not groups or entries > left:
            groups.append([])
            left = room
        groups[-1].append(name)
        left -= entries
    return groups


def _room(tasks: int, device: torch.device) -> int:
    """Return the entries of a task's covariances there is room for: all tasks' in float64, one's sums on the device."""
    room = psutil.virtual_memory().available * SHARE / (8 * (tasks + 1))
    if device.type == "cuda":
        room = min(room, torch.cuda.mem_get_info(device)[0] * SHARE / 4)
    return int(room)


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
