"""Experts that were trained elsewhere: what a task's ``expert`` names, looked at before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft

from orthoft.merging.files.header import read_header
from orthoft.merging.files.hub import find_folder
from orthoft.merging.files.tensors import TensorFolder, read_json
from orthoft.recipes.head import Head
from orthoft.recipes.kinds import KINDS, Kind
from orthoft.recipes.kinds.probed import Probed
from orthoft.recipes.layout import HEADS
from orthoft.recipes.task_schema import Task

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model"
TOLD = 2  # names of tensors in a line


def folder_of(task: Task) -> Path:
    """Return the folder of a task's expert from elsewhere, downloaded if it is a Hub id.

    Raises:
        FileNotFoundError: it is not there, or no adapter in safetensors.
    """
    assert task.expert is not None
    folder = find_folder(task.expert, "expert")
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: an expert is an adapter (merge.sources takes checkpoints)")
    TensorFolder(folder, WEIGHTS)  # says what is wrong with its file
    return folder


def files_of_expert(folder: Path) -> list[Path]:
    """Return the files of an adapter from elsewhere that are taken: its config, its tensors, its heads."""
    heads = [file for file in (folder / HEADS).glob("*") if file.suffix in (".safetensors", ".json")]
    return sorted([folder / CONFIG, *folder.glob(f"{WEIGHTS}*.safetensors*"), *heads])


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


def refuse_others_tensors(folder: Path, wanted: Mapping[str, Any], known: Iterable[str]) -> None:
    """Check that an adapter holds what it needs on this base, and nothing that the base has no place for.

    Args:
        wanted: tensors by the names that the adapter has for them.
        known: all names of the adapted model, with that of the adapter in them.

    Raises:
        ValueError: it was trained on another base, or under another class of models.
    """
    there = TensorFolder(folder, WEIGHTS)
    places = {name.replace(".default.", ".").replace(".base_layer.", ".") for name in known}
    absent = [name for name in wanted if name not in there]
    over = [name for name in there if name not in wanted and name.replace(".base_layer.", ".") not in places]
    told = [f"{what} {', '.join(names[:TOLD])}" for what, names in (("lacks", absent), ("has", over)) if names]
    if told:
        raise ValueError(f"{folder} was trained on another base, or under another class of it: it {' and '.join(told)}")
    for name, tensor in wanted.items():
        own, need = there.shape(name), tuple(tensor.shape)
        if own != need:
            raise ValueError(
                f"{folder} was trained on another base: {name} is {_times(own)} and should be {_times(need)}"
            )


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def head_in(folder: Path, kind: Kind[Any], classes: Sequence[str], base: Path) -> Head | None:
    """Return the head that came with an adapter, as recipes leave it in ``heads``; None if none did.

    Raises:
        ValueError: there are several, it is broken, or one for other classes or features than the task has.
    """
    files = sorted((folder / HEADS).glob("*.safetensors"))
    named = [file for file in files if file.stem == kind.task.name] or files
    if not isinstance(kind, Probed) or not named:
        return None
    where = f"expert of {kind.task.name}: {folder / HEADS}"
    if len(named) > 1:
        names = ", ".join(file.stem for file in named)
        raise ValueError(f"{where} has heads of several tasks ({names}): call the task as one of them")
    try:
        read_header(named[0])
        head = Head.load(named[0])
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{where} has no whole head {named[0].stem} ({' '.join(str(error).split())})") from None
    width = read_json(base / "config.json").get("hidden_size", head.weight.shape[-1])
    for what, own, need in (
        ("classes", head.classes, list(classes)),
        ("features", dict(head.features), kind.reading()),
        ("a weight", _times(head.weight.shape), _times([len(classes), width])),
        ("a bias", _times(head.bias.shape), str(len(classes))),
    ):
        if own != need:
            raise ValueError(f"{where}: the head {named[0].stem} has {what} {own}, the task {need}")
    return head
