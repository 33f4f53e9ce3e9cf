"""Where a recipe computes: its ``device``, applied to the `TrainingArguments` that set up accelerate's state."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from transformers import AutoConfig, TrainingArguments

from orthoft.recipes.cpu import computes_in
from orthoft.recipes.schema import Recipe


def available() -> list[str]:
    """Return the names of the devices of this machine."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    others = [name for name in ("mps", "xpu") if getattr(torch, name).is_available()]
    return ["cpu", *(["cuda"] if cuda else []), *cuda, *others]


def check_device(name: str | None) -> None:
    """Check that a recipe's device is there, and that several processes do not share one.

    Raises:
        ValueError: it is not, or they would.
    """
    if name is None:
        return
    if name not in (here := available()):
        raise ValueError(f"no device {name!r} here, choose from: {', '.join(here)}")
    if ":" in name and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{name!r} is one device for several processes: take 'cuda', and each has its own")


def check_launch() -> None:
    """Check what `accelerate launch` asks for: adapters look at whole weights, and one process scores the model.

    Raises:
        ValueError: weights would be in parts before there is an adapter, or after the training.
    """
    if with_deepspeed() and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        raise ValueError("DeepSpeed's zero_stage 3 leaves no whole weights to look at: take stage 2, or FSDP2")
    if in_parts() and _told("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError("fsdp_cpu_ram_efficient_loading leaves processes without weights to look at: set it to false")
    if in_parts() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP is supported in its second version: set fsdp_version to 2")


def on_cpu(name: str | None) -> bool:
    """Say whether a recipe computes on the CPU: by its word, or because there is nothing else."""
    return name == "cpu" or not torch.accelerator.is_available()


def computing_dtype(dtype: str | None, base: str | Path) -> torch.dtype | None:
    """Return the type that a recipe computes in: its own, or that of the base's configuration, if that has one."""
    words = dtype or AutoConfig.from_pretrained(str(base), trust_remote_code=False).dtype
    found: torch.dtype | None = getattr(torch, words) if isinstance(words, str) else words
    return found


def slow_type(recipe: Recipe, base: Path) -> str | None:
    """Return a hint if a recipe is to compute in a type that this CPU has no instructions for."""
    if recipe.quantization is not None or not on_cpu(recipe.device):
        return None
    dtype = computing_dtype(recipe.dtype, base)
    if dtype is None or computes_in(dtype):
        return None
    name = str(dtype).removeprefix("torch.")
    return f"{name} is slow on this CPU, which has no instructions for it: `dtype: float32` is several times faster"


def in_parts() -> bool:
    """Say whether accelerate was told to keep a part of each weight on each process (FSDP)."""
    return _told("ACCELERATE_USE_FSDP")


def with_deepspeed() -> bool:
    """Say whether accelerate was told to train with DeepSpeed."""
    return _told("ACCELERATE_USE_DEEPSPEED")


def placed(args: TrainingArguments, name: str | None) -> TrainingArguments:
    """Return the arguments with one device for this process, and accelerate's state on it.

    A process that sees several GPUs takes one: `accelerate launch` splits batches over them, with a process each.
    """
    device, state = args.device, args.distributed_state  # sets the state up
    if state is not None and state.distributed_type == DistributedType.NO:
        args._n_gpu = min(args.n_gpu, 1)
        if name is not None and ":" in name:
            state.device = args.__dict__["_setup_devices"] = torch.device(name)
            torch.cuda.set_device(state.device)
    elif in_parts() and device.type == "cpu":
        state.distributed_type = DistributedType.MULTI_GPU  # accelerate shards there alone, FSDP2 on gloo as well
    return args


def set_up(name: str | None) -> None:
    """Set accelerate's state up on a recipe's device, as the arguments of a training do, where there is none."""
    placed(TrainingArguments(use_cpu=on_cpu(name), report_to="none"), name)


def _told(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def merge_device(name: str | None) -> dict[str, Any]:
    """Return the word ``device`` of a merge that follows a recipe's: it knows CUDA and the CPU."""
    return {} if name is None else {"device": name if name.startswith("cuda") else "cpu"}


@contextmanager
def roomy(what: str, lower: str) -> Iterator[None]:
    """Turn "out of memory" into one line that says what to lower.

    Raises:
        MemoryError: a device ran out of memory in the block.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        told = " ".join(str(error).partition(". ")[0].split())
        raise MemoryError(f"{what}: {told}; lower {lower}") from None
