"""One task's training: base, adapter, transformers' Trainer."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments, set_seed

from orthoft.recipes.expert import Ready, save
from orthoft.recipes.initialise import initialise
from orthoft.recipes.models import adapter_config, load_model
from orthoft.recipes.schema import Recipe
from orthoft.recipes.task_schema import Task
from orthoft.trainer import OrthoTrainer


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
    trained = ready.kind.trained(model, ready.head)
    trainer = OrthoTrainer(
        model=trained,
        args=training_arguments(recipe, task, folder.with_name(f".{folder.name}.trainer")),
        train_dataset=ready.data.train,
        data_collator=ready.kind.collate,
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
