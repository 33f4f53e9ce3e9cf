"""One task's expert on disk: an adapter as PEFT saves it, and ``expert.json`` with what is known of it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
from accelerate import PartialState
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from orthoft.hub_place import config_fields, named_in, public_name
from orthoft.merging.files.tensors import TensorFolder, read_json
from orthoft.merging.files.writer import write_json
from orthoft.merging.reports.card import CARD
from orthoft.merging.resume.partial import partial_of
from orthoft.merging.statistics import KINDS
from orthoft.recipes.data import read_file
from orthoft.recipes.elsewhere import CONFIG, WEIGHTS, config_in, files_of_expert, folder_of, head_in
from orthoft.recipes.head import Head
from orthoft.recipes.kinds import Kind, TaskData, kind_of
from orthoft.recipes.layout import FINISHED, STATISTICS, expert_folder, head_file, statistics_of
from orthoft.recipes.schema import Recipe
from orthoft.recipes.task_schema import ImageClassification, Task

PROBES, PROBE = 64, 2**16  # places in a file of weights that are looked at, and the bytes of each


@dataclass(frozen=True)
class Ready:
    """A task whose rows are examples and, where it has classes, whose head is fitted; ``mark`` is its fingerprint."""

    kind: Kind[Any]
    data: TaskData
    head: Head | None
    mark: str

    @property
    def task(self) -> Task:
        task: Task = self.kind.task
        return task

    def at_start(self) -> Ready:
        """Return it with the head that training began with, by which the base is scored."""
        return self if self.head is None else replace(self, head=self.head.start)


def fingerprint(recipe: Recipe, task: Task, base: Path) -> str:
    """Return a hash of all that an expert depends on: task, its files and pictures, the base's files, dtype, seed."""
    words: list[Any] = [_trains(task), _digests(task), recipe.base, _samples(base), recipe.dtype, recipe.seed]
    if recipe.quantization is not None:
        words.append(recipe.quantization.model_dump(mode="json"))
    if (chosen := recipe.train_to_merge) is not None:  # from the data of all tasks
        general = [] if chosen.general is None else [_digest(chosen.general)]
        others = [[_trains(other), _digests(other)] for other in recipe.tasks]
        words += [chosen.model_dump(mode="json"), general, others]
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()


def _samples(base: Path) -> list[list[Any]]:
    """Return name, size and a hash of samples of each file of a model: all of a small file, 4 MB of one of weights."""
    told = []
    for file in sorted(f for f in base.iterdir() if f.suffix in (".safetensors", ".json", ".txt", ".model", ".jinja")):
        size, found = file.stat().st_size, hashlib.sha256()
        with file.open("rb") as stream:
            for place in range(PROBES):
                stream.seek(place * max(PROBE, (size - PROBE) // (PROBES - 1)))
                found.update(stream.read(PROBE))
        told.append([file.name, size, found.hexdigest()])
    return told


def _trains(task: Task) -> dict[str, Any]:
    """Return the words of a task that its expert depends on."""
    unread = {"expert"} if task.expert is None else {"expert", "adapter", "training", "early_stopping"}
    return task.model_dump(mode="json", exclude={"metric", *unread})


def _digests(task: Task) -> list[str]:
    named = [task.data.train, task.data.tuning, task.data.test] if task.data.dataset is None else []
    files = [Path(name) for name in named if name]
    pictures = [picture for file in files for picture in _pictures(file, task)]
    given = [] if task.expert is None else files_of_expert(folder_of(task))
    return [_digest(file) for file in (*files, *pictures, *given)]


def _pictures(file: Path, task: Task) -> list[Path]:
    """Return the pictures that the rows of a file name, without those that are not there: reading the rows says so."""
    if not isinstance(task, ImageClassification):
        return []
    cells = [row.get(task.data.image) for row in read_file(file)]
    names = [cell.get("path") if isinstance(cell, dict) else cell for cell in cells]
    return [picture for name in names if isinstance(name, str) and (picture := file.parent / name).is_file()]


def _digest(file: str | Path) -> str:
    told = Path(file).stat()
    return _hashed(str(file), told.st_size, told.st_mtime_ns)


@cache
def _hashed(file: str, size: int, changed: int) -> str:
    """Return a file's hash; every task that is kept apart asks for those of all, so that a file is read once."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def finished(folder: Path, mark: str) -> dict[str, Any] | None:
    """Return what is known of the expert in ``folder`` if it is complete and has this fingerprint, else None."""
    file = folder / FINISHED
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return told if told.get("fingerprint") == mark else None


def read_tasks(recipe: Recipe, tasks: Sequence[Task], base: Path) -> list[Ready]:
    """Turn every task's rows into examples, without heads, so that a mistake there costs nothing."""
    kinds = [kind_of(task, base) for task in tasks]
    found = [Ready(kind, kind.data(recipe.seed), None, fingerprint(recipe, kind.task, base)) for kind in kinds]
    for ready in found:
        if ready.task.expert is not None:
            head_in(folder_of(ready.task), ready.kind, ready.data.classes, base)
    return found


def read_experts(recipe: Recipe, base: Path) -> list[Ready]:
    """Return the data and heads of tasks whose experts are there.

    Raises:
        ValueError: an expert is not there, or is that of another training.
    """
    out = Path(recipe.output)
    for task in recipe.tasks:
        folder = expert_folder(out, task.name)
        if finished(folder, fingerprint(recipe, task, base)) is None:
            what = "is of another recipe or other data" if folder.exists() else "is not there"
            raise ValueError(f"the expert {folder} {what}: train it by `orthoft finetune` with this recipe")
    found = read_tasks(recipe, recipe.tasks, base)
    heads = [head_file(expert_folder(out, ready.task.name)) for ready in found]
    return [replace(r, head=Head.load(head)) if r.data.classes else r for r, head in zip(found, heads, strict=True)]


def forget(folder: Path) -> None:
    """Make an expert that is to be trained again unfinished, before its head changes; what was measured of it goes."""
    (folder / FINISHED).unlink(missing_ok=True)
    for kind in KINDS:
        statistics_of(folder.parents[1] / STATISTICS, folder.name, kind).unlink(missing_ok=True)


def save(model: peft.PeftModel, base: str, folder: Path, told: dict[str, Any]) -> None:
    """Write the adapter as PEFT does and ``expert.json`` beside it; the folder appears when it is complete.

    Its config names the base as others can find it, where PEFT's names the folder that it was downloaded to.

    Every process calls it, and the first one writes: where FSDP2 keeps a part of each weight they are gathered before.
    """
    state = None
    if any(isinstance(p, DTensor) for p in model.parameters()):
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not PartialState().is_main_process:
        return
    with _appearing(folder, told) as partial:
        model.save_pretrained(str(partial), state_dict=state)
        _name_base(partial, base)


def take(ready: Ready, recipe: Recipe, base: Path, folder: Path) -> None:
    """Copy a task's expert from elsewhere, and the head that came with it, as if they had been trained here."""
    task, source = ready.task, folder_of(ready.task)
    config, tensors = config_in(source, task.kind), TensorFolder(source, WEIGHTS)
    told = {
        "task": task.name,
        "taken_from": str(task.expert),
        "own_card": (source / CARD).is_file(),
        "base": named_in(vars(config)),
        "adapter": {"type": str(getattr(config.peft_type, "value", config.peft_type)).lower()},
        "parameters": sum(math.prod(tensors.shape(name)) for name in tensors),
        "fingerprint": ready.mark,
    }
    head_file(folder).unlink(missing_ok=True)
    if (head := head_in(source, ready.kind, ready.data.classes, base)) is not None:
        head.save(head_file(folder))
    with _appearing(folder, told) as partial:
        partial.mkdir(parents=True)
        for file in (source / CARD, *source.glob(f"{WEIGHTS}*.safetensors*")):
            if file.is_file():
                shutil.copyfile(file, partial / file.name)
        config.save_pretrained(str(partial))
        _name_base(partial, public_name(recipe.base, base))


def _name_base(folder: Path, base: str) -> None:
    write_json(folder / CONFIG, {**read_json(folder / CONFIG), **config_fields(base)})


@contextmanager
def _appearing(folder: Path, told: dict[str, Any]) -> Iterator[Path]:
    """Give the place of an expert to write into; it takes that of ``folder`` when all is there."""
    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        (partial / FINISHED).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        for file in partial.glob("*.safetensors"):  # the library lets only the owner read what it writes
            file.chmod((partial / FINISHED).stat().st_mode)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
