"""Experts that were trained elsewhere: what a task's ``expert`` names, looked at before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft

from orthoft.merging.files.hub import find_folder
from orthoft.merging.files.tensors import TensorFolder, read_json
from orthoft.recipes.head import Head
from orthoft.recipes.kinds import KINDS
from orthoft.recipes.layout import HEADS
from orthoft.recipes.task_schema import Task

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model"
TOLD = 3  # names of tensors in a line


def folder_of(task: Task) -> Path:
    """Return the folder of a task's expert from elsewhere, downloaded if it is a Hub id.

    Raises:
        FileNotFoundError: it is not there, or no adapter in safetensors.
    """
    assert task.expert is not None
    folder = find_folder(task.expert, f"expert of {task.name}")
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"expert of {task.name}: {folder} has no {CONFIG}: an expert is an adapter (`orthoft merge` takes "
            "checkpoints, too)"
        )
    TensorFolder(folder, WEIGHTS)  # says what is wrong with its file
    return folder


def config_in(folder: Path, kind: str) -> peft.PeftConfig:
    """Return the config of an adapter as a task of this kind loads it.

    Raises:
        ValueError: it is none that this PEFT knows.
    """
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        peft_type = read_json(folder / CONFIG).get("peft_type")
        raise ValueError(f"{folder / CONFIG}: PEFT does not read it (peft_type {peft_type!r}): {error}") from None
    config.task_type = KINDS[kind].peft_task
    return config


def refuse_others_tensors(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Check that an adapter holds what it needs on this base: tensors of these names and shapes.

    Raises:
        ValueError: it was trained on another base, or under another class of models.
    """
    there = TensorFolder(folder, WEIGHTS)
    if absent := [name for name in wanted if name not in there]:
        more = ", ..." if len(absent) > TOLD else ""
        raise ValueError(f"{folder} is of another base: it lacks {', '.join(absent[:TOLD])}{more}")
    for name, tensor in wanted.items():
        if there.shape(name) != tuple(tensor.shape):
            need = "x".join(map(str, tensor.shape))
            raise ValueError(
                f"{folder} is of another base: {name} is {'x'.join(map(str, there.shape(name)))}, this one needs {need}"
            )


def head_in(folder: Path, task: Task, classes: Sequence[str]) -> Head | None:
    """Return the head that came with an adapter, as recipes leave it in ``heads``; None if none did.

    Raises:
        ValueError: it is one for other classes than the data have.
    """
    files = sorted((folder / HEADS).glob("*.safetensors"))
    named = [file for file in files if file.stem == task.name] or files
    if not classes or len(named) != 1:
        return None
    head = Head.load(named[0])
    if head.classes != list(classes):
        raise ValueError(
            f"expert of {task.name}: its head {named[0]} is for the classes {', '.join(head.classes)}; the data have "
            f"{', '.join(classes)}"
        )
    return head
