"""One task's expert: base, adapter, transformers' Trainer, and a folder with what was learnt."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from orthoft.adapters import ADAPTERS
from orthoft.errors import unknown
from orthoft.recipes.data import TaskData, collate
from orthoft.recipes.head import Classifier, Head
from orthoft.recipes.initialise import initialise
from orthoft.recipes.schema import Adapter, Recipe, Task
from orthoft.trainer import OrthoTrainer

FINISHED = "expert.json"


@dataclass(frozen=True)
class Ready:
    """A task whose data are tokens and, for classification, whose head is fitted; ``mark`` is its fingerprint."""

    task: Task
    data: TaskData
    head: Head | None
    pad: int
    mark: str


def adapter_types() -> dict[str, type[Any]]:
    """Return config classes by name: ours, and PEFT's own as ``peft.NAME``, or as ``NAME`` where we have none."""
    theirs: dict[str, type[Any]] = {
        kind.value.lower(): config
        for kind, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if not kind.value.startswith("ORTHOFT_")
    }
    return {**theirs, **ADAPTERS, **{f"peft.{name}": config for name, config in theirs.items()}}


def adapter_config(adapter: Adapter, kind: str) -> peft.PeftConfig:
    """Return the PEFT config of a recipe's adapter.

    Raises:
        ValueError: an unknown type or field (the nearest is named), or a value that the config refuses.
        TypeError: a value of a wrong type.
    """
    types = adapter_types()
    if adapter.type not in types:
        raise unknown("adapter type", adapter.type, [name for name in types if not name.startswith("peft.")])
    config = types[adapter.type]
    known = [f.name for f in fields(config) if f.init and f.name not in ("peft_type", "auto_mapping", "peft_version")]
    for name in adapter.fields:
        if name not in known:
            raise unknown(f"field of adapter {adapter.type!r}", name, known)
    task_type = {"task_type": "CAUSAL_LM"} if kind == "causal-lm" else {}
    return config(**task_type | adapter.fields)


def training_arguments(recipe: Recipe, task: Task, folder: Path) -> TrainingArguments:
    """Return a task's `TrainingArguments`: the recipe's words over quiet defaults, nothing saved midway."""
    steps = task.training.get("max_steps", -1)
    defaults: dict[str, Any] = {
        "seed": recipe.seed,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": max(1, steps // 20) if steps > 0 else 10,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),  # else several processes on CPUs do not find each other
        "label_names": ["labels"],
    }
    return TrainingArguments(output_dir=str(folder), **defaults | task.training)


def auto_class(kind: str) -> Any:
    """Return the transformers class that loads the base of this kind of task."""
    return AutoModelForCausalLM if kind == "causal-lm" else AutoModel


def load_model(kind: str, folder: str | Path, dtype: str | None) -> Any:
    """Return the plain transformers model of a folder, on this process's device."""
    return auto_class(kind).from_pretrained(str(folder), dtype=dtype or "auto").to(PartialState().device)


class Bar(TrainerCallback):
    """One progress bar a task, with the loss on it."""

    def __init__(self, what: str) -> None:
        self.what, self.bar = what, tqdm(disable=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hidden = not state.is_world_process_zero or not sys.stderr.isatty()
        self.bar = tqdm(total=state.max_steps, desc=self.what, unit="step", leave=False, disable=hidden)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def fingerprint(recipe: Recipe, task: Task, base: Path) -> str:
    """Return a hash of all that an expert depends on: the task's words, its files' contents, base, dtype and seed."""
    weights = sorted((f.name, f.stat().st_size) for f in base.glob("*.safetensors"))
    words: list[Any] = [task.model_dump(mode="json"), _digests(task), recipe.base, weights, recipe.dtype, recipe.seed]
    if (chosen := recipe.train_to_merge) is not None:  # from the data of all tasks
        general = [] if chosen.general is None else [_digest(chosen.general)]
        others = [[other.model_dump(mode="json"), _digests(other)] for other in recipe.tasks]
        words += [chosen.model_dump(mode="json"), general, others]
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()


def _digests(task: Task) -> list[str]:
    files = [task.data.train, task.data.tuning, task.data.test] if task.data.dataset is None else []
    return [_digest(file) for file in files if file]


def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def finished(folder: Path, mark: str) -> dict[str, Any] | None:
    """Return what is known of the expert in ``folder`` if it is complete and has this fingerprint, else None."""
    file = folder / FINISHED
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return told if told.get("fingerprint") == mark else None


def train(
    recipe: Recipe, ready: Ready, base: Path, folder: Path, rows: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Train a task's adapter, save it to ``folder`` (from the main process), and return what is known of it.

    With ``rows``, see `orthoft.recipes.initialise`, it reads its inputs through these alone.

    Raises:
        ValueError: the loss became NaN or infinite.
    """
    task, start = ready.task, time.perf_counter()
    set_seed(recipe.seed)
    model = peft.get_peft_model(load_model(task.kind, base, recipe.dtype), adapter_config(task.adapter, task.kind))
    if rows is not None:
        initialise(model, rows)
    trained = model if ready.head is None else Classifier(model, ready.head)
    trainer = OrthoTrainer(
        model=trained,
        args=training_arguments(recipe, task, folder.with_name(f".{folder.name}.trainer")),
        train_dataset=ready.data.train,
        data_collator=partial(collate, pad=ready.pad),
        callbacks=[Bar(task.name)],
    )
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    loss = trainer.train().training_loss
    if trainer.is_world_process_zero():
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    if not math.isfinite(loss):
        raise ValueError(f"{task.name}: the training loss is {loss}; lower training.learning_rate")
    told = {
        "task": task.name,
        "adapter": task.adapter.model_dump(),
        "parameters": sum(p.numel() for p in trained.parameters() if p.requires_grad),
        "steps": trainer.state.global_step,
        "processes": PartialState().num_processes,
        "seconds": round(time.perf_counter() - start, 2),
        "losses": [[log["step"], log["loss"]] for log in trainer.state.log_history if "loss" in log],
        "fingerprint": ready.mark,
    }
    if trainer.is_world_process_zero():
        save(model, folder, told)
    PartialState().wait_for_everyone()
    return told


def save(model: peft.PeftModel, folder: Path, told: dict[str, Any]) -> None:
    """Write the adapter as PEFT does and ``expert.json`` beside it; the folder appears when it is complete."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(str(partial))
    (partial / FINISHED).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
