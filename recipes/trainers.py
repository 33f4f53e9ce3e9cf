"""The Trainer of a task: transformers' own, or TRL's on the same rows."""

from __future__ import annotations

import importlib
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from transformers import TrainingArguments

from orthoft.recipes.kinds import Kind
from orthoft.recipes.task_schema import CausalLM, Task

T = TypeVar("T")


def takes_trl(task: Task) -> bool:
    """Say whether a task is to be trained by TRL."""
    return isinstance(task, CausalLM) and task.trainer == "trl"


def new_arguments(task: Task, **words: Any) -> TrainingArguments:
    """Return ``TrainingArguments``, or an ``SFTConfig`` in which the words that both have mean the same."""
    if not takes_trl(task):
        return TrainingArguments(**words)
    config = importlib.import_module("trl").SFTConfig
    ours = {field.name: field.default for field in fields(TrainingArguments)}
    same = {
        field.name: ours[field.name]
        for field in fields(config)
        if ours.get(field.name, MISSING) is not MISSING and ours[field.name] != field.default
    }
    made: TrainingArguments = config(**same | {"dataset_kwargs": {"skip_prepare_dataset": True}} | words)
    return made


def new_trainer(kind: Kind[Any], plain: type[T], **words: Any) -> T:
    """Return a Trainer of class ``plain``, for TRL one that is an ``SFTTrainer`` as well.

    TRL's gets the rows as they are, in the tables of `datasets` that it asks for.
    """
    if not takes_trl(kind.task):
        return plain(**words)
    table = importlib.import_module("datasets").Dataset.from_list
    rows = {name: table(list(words[name])) for name in ("train_dataset", "eval_dataset") if words.get(name)}
    both = type(f"{plain.__name__}OfTRL", (plain, importlib.import_module("trl").SFTTrainer), {})
    made: T = both(**words | rows, processing_class=kind.processor)
    return made
