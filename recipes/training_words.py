"""What ``training`` may say and the Trainer would refuse, or not follow, only after other work."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from transformers.utils import is_liger_kernel_available

from orthoft.errors import unknown
from orthoft.recipes.devices import with_deepspeed

NOT_FOLLOWED = {  # words, and what to do instead
    "load_best_model_at_end": "write early_stopping beside training",
    "push_to_hub": "`orthoft push` uploads what is done",
    "resume_from_checkpoint": "a run that is given again goes on by itself, from the checkpoints that save_steps makes",
}
MOST = sys.float_info.max
RANGES: dict[str, tuple[float, float]] = {  # from the least to the most
    "per_device_train_batch_size": (1, MOST),
    "per_device_eval_batch_size": (1, MOST),
    "gradient_accumulation_steps": (1, MOST),
    "eval_accumulation_steps": (1, MOST),
    "dataloader_num_workers": (0, MOST),
    "dataloader_prefetch_factor": (1, MOST),
    "learning_rate": (0, MOST),
    "weight_decay": (-MOST, MOST),
    "num_train_epochs": (-MOST, MOST),
    "seed": (0, 2**32 - 1),
    "data_seed": (-(2**63), 2**64 - 1),
}
OF_MODELS = ("galore", "apollo", "lomo", "adalomo")  # optimizers that look at the model: nothing can be tried without
TRIED = ("torch.optim.", "transformers.", "bitsandbytes.")  # where optimizers are from that take a model of any size
STEPS = 1000  # of a schedule that is tried where the number of steps is not known yet


def refuse_words(words: Mapping[str, Any]) -> None:
    """Refuse words before there are arguments of them, which change the environment of the process.

    Raises:
        ValueError: a word that recipes do not follow, a number out of its range, or no number, or an unknown backend.
    """
    for name, instead in NOT_FOLLOWED.items():
        if words.get(name):
            raise ValueError(f"{name} is not followed: {instead}")
    for name, value in words.items():
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{name} is no number")
        if name in RANGES and value is not None and not RANGES[name][0] <= value <= RANGES[name][1]:
            raise ValueError(f"{name} is {_range(*RANGES[name])}, got {value}")
    backend = words.get("torch_compile_backend")
    if backend is not None and backend.upper() not in (known := [each.value for each in DynamoBackend]):
        raise unknown("torch_compile_backend", backend, map(str.lower, known))
    if words.get("torch_compile_mode") is not None and backend in (None, "inductor"):
        _try("torch_compile_mode", torch.compile, nn.Identity(), mode=words["torch_compile_mode"])


def refuse_arguments(args: TrainingArguments) -> None:
    """Refuse arguments with which no Trainer could be made, or could begin.

    Raises:
        ValueError: a package of theirs is not installed, or an optimizer or a schedule that cannot be.
    """
    if args.save_strategy == "best" and args.metric_for_best_model is None:
        raise ValueError("save_strategy 'best' needs metric_for_best_model")
    _try("log_level", args.get_process_log_level)
    available = get_available_reporting_integrations()
    for name, callback in zip(args.report_to, get_reporting_integration_callbacks(args.report_to), strict=True):
        if name not in available:
            _try("report_to", callback)
    if args.dataloader_persistent_workers and args.dataloader_num_workers == 0:
        raise ValueError("dataloader_persistent_workers needs dataloader_num_workers")
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError("use_liger_kernel needs the package liger-kernel: pip install liger-kernel")
    if not (args.deepspeed or with_deepspeed()):  # whose own file may name another optimizer and schedule
        _rehearse(args)


def _range(least: float, most: float) -> str:
    if most == MOST:
        return "a finite number" if least == -MOST else f"a finite number of at least {least}"
    return f"a number from {least} to {most}"


def _rehearse(args: TrainingArguments) -> None:
    """Make the optimizer and the schedule of two numbers, in groups as the Trainer makes them."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "weight_decay": decay} for decay in (args.weight_decay, 0.0)]
    optimizer: Any = torch.optim.SGD(groups, lr=args.learning_rate)
    if args.optim.startswith(OF_MODELS):
        with suppress(ValueError):  # there is no model; an ImportError says that the package is not there, either
            Trainer.get_optimizer_cls_and_kwargs(args)
    else:
        make, words = _try("optim", Trainer.get_optimizer_cls_and_kwargs, args)
        if f"{make.__module__}.".startswith(TRIED):
            words = {name: value for name, value in words.items() if name != "fused"}  # which is of the device
            optimizer = _try("optim", make, groups, **words)
    steps = args.max_steps if args.max_steps > 0 else STEPS
    _try(
        "lr_scheduler_type",
        get_scheduler,
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )


def _try(name: str, make: Callable[..., Any], *args: Any, **words: Any) -> Any:
    """Return what a library makes, or raise a ValueError that names the word of ``training``."""
    try:
        return make(*args, **words)
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise ValueError(f"{name}: {error}") from None
    except KeyError as error:
        raise ValueError(f"{name}: unknown word {error}") from None
