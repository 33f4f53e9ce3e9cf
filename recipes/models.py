"""The base of a recipe as a transformers model, and the PEFT config of an adapter, by their names in the recipe."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from accelerate import PartialState

from orthoft.adapters import ADAPTERS
from orthoft.errors import unknown
from orthoft.quantization import keep_unpacked
from orthoft.recipes.devices import computing_dtype
from orthoft.recipes.elsewhere import config_in, folder_of
from orthoft.recipes.kinds import KINDS
from orthoft.recipes.schema import Quantization
from orthoft.recipes.task_schema import Adapter, Task


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
    return config(**{"task_type": KINDS[kind].peft_task} | adapter.fields)


def config_of(task: Task) -> peft.PeftConfig:
    """Return the PEFT config of the adapter that a task trains, or of its expert from elsewhere."""
    return adapter_config(task.trained, task.kind) if task.expert is None else config_in(folder_of(task), task.kind)


def auto_class(kind: str) -> Any:
    """Return the transformers class that loads the base of this kind of task."""
    return getattr(transformers, KINDS[kind].auto)


def load_model(
    kind: str,
    folder: str | Path,
    dtype: str | None,
    quantization: Quantization | None = None,
    device: torch.device | None = None,
) -> Any:
    """Return the transformers model of a folder, on a device, this process's own unless given.

    Codes of four bits are multiplied in ``dtype``, or else in the folder's own, unless ``quantization`` says another.
    """
    auto, device = auto_class(kind), device or PartialState().device
    load = partial(auto.from_pretrained, str(folder), dtype=dtype or "auto", trust_remote_code=False)
    if quantization is None:
        return load().to(device)
    words = {"bnb_4bit_compute_dtype": computing_dtype(dtype, folder)} | quantization.model_dump(exclude_none=True)
    model = load(quantization_config=transformers.BitsAndBytesConfig(**words), device_map={"": device})
    for module in model.modules():
        keep_unpacked(module)  # else the base would be scored with other scales than its experts
    return model


def how_to_load(kind: str, folder: Path) -> str:
    """Return the words that end a run: where the merged model is, and the Python that loads it."""
    auto, reader = KINDS[kind].auto, KINDS[kind].reader
    return (
        f"merged model: {folder}\n\n"
        f"    from transformers import {auto}, {reader}\n"
        f'    model = {auto}.from_pretrained("{folder}")\n'
        f'    {"tokenizer" if reader == "AutoTokenizer" else "processor"} = {reader}.from_pretrained("{folder}")'
    )
