"""One task's training: base, adapter, transformers' Trainer."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments, set_seed

from orthoft.hub_place import public_name
from orthoft.recipes.checkpoints import Checkpoints, Say, last_checkpoint, open_checkpoints
from orthoft.recipes.devices import in_parts, on_cpu, placed, roomy, with_deepspeed
from orthoft.recipes.early_stopping import KeepBest
from orthoft.recipes.expert import Ready, save
from orthoft.recipes.initialise import initialise
from orthoft.recipes.layout import head_file, trainer_folder
from orthoft.recipes.models import adapter_config, load_model
from orthoft.recipes.schema import Recipe
from orthoft.recipes.task_schema import Task
from orthoft.recipes.trainers import new_arguments, new_trainer
from orthoft.recipes.training_words import refuse_arguments, refuse_words
from orthoft.trainer import OrthoTrainer


class RecipeTrainer(Checkpoints, OrthoTrainer):
    """The Trainer of recipes."""


def training_arguments(recipe: Recipe, task: Task, folder: Path) -> TrainingArguments:
    """Return a task's `TrainingArguments`: the recipe's words over quiet defaults.

    Raises:
        ValueError: words that the Trainer would not follow here.
    """
    words, steps = task.training, task.training.get("max_steps", -1)
    refuse_words(words)
    if (with_deepspeed() or words.get("deepspeed")) and (
        "save_steps" in words or words.get("save_strategy", "no") != "no"
    ):
        raise ValueError(
            "DeepSpeed's checkpoints are pickles, which are never read: leave save_strategy and save_steps out"
        )
    defaults: dict[str, Any] = {
        "seed": recipe.seed,
        "save_strategy": "steps" if "save_steps" in words else "no",
        "save_total_limit": 2,
        "eval_strategy": "no" if task.early_stopping is None else "steps",
        "per_device_eval_batch_size": recipe.evaluate.batch_size,
        "prediction_loss_only": True,
        "report_to": "none",
        "logging_steps": max(1, steps // 20) if steps > 0 else 10,
        "logging_nan_inf_filter": False,  # it would hide from us that the loss is no number
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "use_cpu": on_cpu(recipe.device),  # else several processes on CPUs do not find each other
        "label_names": ["labels"],
    }
    args = placed(new_arguments(task, output_dir=str(folder), **defaults | words), recipe.device)
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16 does nothing on a CPU: take bf16")
    refuse_arguments(args)
    if task.early_stopping is not None and args.eval_strategy == "no":
        raise ValueError("early_stopping needs evaluations: leave eval_strategy out")
    return args


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


def adapted(recipe: Recipe, task: Task, base: Path, args: TrainingArguments) -> peft.PeftModel:
    """Return the base with the task's new adapter, which the recipe's seed fixes."""
    set_seed(recipe.seed)
    on = (
        torch.device("cpu") if in_parts() and recipe.quantization is None else None
    )  # no device may have room for it whole
    model = load_model(task.kind, base, recipe.dtype, recipe.quantization, on)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        model.enable_input_require_grads()
        args.gradient_checkpointing = args.activation_checkpointing = False  # the Trainer asks what wraps the model
    return peft.get_peft_model(model, adapter_config(task.trained, task.kind))


def make_trainer(ready: Ready, model: peft.PeftModel, args: TrainingArguments) -> RecipeTrainer:
    """Return the quiet Trainer of a task's adapted model."""
    stopping = ready.task.early_stopping
    trainer = new_trainer(
        ready.kind,
        RecipeTrainer,
        model=ready.kind.trained(model, ready.head),
        args=args,
        train_dataset=ready.data.train,
        eval_dataset=ready.data.tuning,
        data_collator=ready.kind.collate,
        callbacks=[Bar(ready.task.name), *([] if stopping is None else [KeepBest(stopping)])],
    )
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    return trainer


def train(
    recipe: Recipe,
    ready: Ready,
    base: Path,
    folder: Path,
    rows: Mapping[str, Tensor] | None = None,
    say: Say = lambda line: None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train a task's adapter, save it to ``folder`` (from the main process), and return what is known of it.

    A training that was broken off goes on from its last checkpoint, if it makes them: ``save_steps`` in ``training``.
    With ``rows``, see `orthoft.recipes.initialise`, it reads its inputs through these, alone or at the start.

    Raises:
        ValueError: the loss became NaN or infinite.
        MemoryError: the device has too little memory.
    """
    task, start = ready.task, time.perf_counter()
    lower = (
        "training.per_device_train_batch_size (and raise gradient_accumulation_steps), or set gradient_checkpointing"
    )
    with roomy(task.name, lower):
        checkpoints = trainer_folder(folder)
        args = training_arguments(recipe, task, checkpoints)
        model = adapted(recipe, task, base, args)
        if rows is not None:
            initialise(model, rows, frozen=recipe.train_to_merge is None or recipe.train_to_merge.frozen)
        trainer = make_trainer(ready, model, args)
        for callback in callbacks:
            trainer.add_callback(callback)
        loss = trainer.train(resume_from_checkpoint=found(checkpoints, ready.mark, args, say)).training_loss
    if not math.isfinite(loss):
        raise ValueError(f"{task.name}: the training loss is {loss}; lower training.learning_rate")
    told = told_of(trainer, ready) | {"seconds": round(time.perf_counter() - start, 2)}
    learnt = ready.kind.learnt(trainer.model, ready.head)
    if learnt is not None and trainer.is_world_process_zero():
        learnt.save(head_file(folder))  # before the expert, which says that all is there
    save(model, public_name(recipe.base, base), folder, told)
    if trainer.is_world_process_zero():
        shutil.rmtree(checkpoints, ignore_errors=True)
    PartialState().wait_for_everyone()
    return told


def found(folder: Path, mark: str, args: TrainingArguments, say: Say) -> str | None:
    """Return the checkpoint to go on from, if the recipe makes them and there is one, the same in every process."""
    state = PartialState()
    if args.save_strategy == "no":
        return None
    if state.is_main_process:
        open_checkpoints(folder, mark)
    state.wait_for_everyone()
    last = last_checkpoint(folder, state.num_processes, say)
    if last is not None:
        say(f"  goes on from step {last.name.removeprefix('checkpoint-')}")
    return None if last is None else str(last)


def told_of(trainer: RecipeTrainer, ready: Ready) -> dict[str, Any]:
    """Return what is known of a training that is done."""
    stopping = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, KeepBest)]
    return {
        "task": ready.task.name,
        "adapter": ready.task.trained.model_dump(),
        "parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "steps": trainer.state.global_step,
        "processes": PartialState().num_processes,
        "losses": [[log["step"], log["loss"]] for log in trainer.state.log_history if "loss" in log],
        "kept": stopping[0].told() if stopping else None,
        "fingerprint": ready.mark,
    }
