"""What a folder holds: an adapter or a checkpoint, told from its config and its tensors, without loading a model."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from orthoft.hub_place import named_in
from orthoft.merging.files.hub import find_folder
from orthoft.merging.files.tensors import TensorFolder, read_json

LISTED = 6  # "all-linear" is saved as every module's name
DEFAULTS: tuple[object, ...] = (None, False, [], {}, "none")  # of PEFT's fields: not worth a line


def describe(path: str | Path) -> dict[str, Any]:
    """Return what an adapter's or a checkpoint's folder holds, as plain values.

    An adapter: its type, the fields that are set, its targets, and per module the shapes, number and norm of its
    parameters. A checkpoint: architecture, dtypes, number of tensors and parameters, norm, and the merge it comes from.

    Raises:
        FileNotFoundError: there is no such folder, or neither an adapter nor a checkpoint in it.
        ValueError: a corrupt file.
    """
    folder = find_folder(path, "model")
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder)
    if (folder / "config.json").is_file():
        return _checkpoint(folder)
    raise FileNotFoundError(f"neither adapter_config.json nor config.json in {folder.absolute()}")


def _adapter(folder: Path) -> dict[str, Any]:
    config, tensors = read_json(folder / "adapter_config.json"), TensorFolder(folder, "adapter_model")
    kind = str(config.get("peft_type"))
    modules: dict[str, dict[str, Any]] = defaultdict(lambda: {"shapes": {}, "parameters": 0, "norm": 0.0})
    for key in tensors:
        name = key.removeprefix("base_model.model.")
        module, found, rest = name.partition(f".{kind.lower()}_")
        entry = modules[module if found else name.rpartition(".")[0]]
        entry["shapes"][f"{kind.lower()}_{rest}" if found else name.rpartition(".")[2]] = list(tensors.shape(key))
        entry["parameters"] += math.prod(tensors.shape(key))
        entry["norm"] = math.hypot(entry["norm"], _norm(tensors[key]))
    known = ("peft_type", "base_model_name_or_path", "revision", "target_modules", "auto_mapping")
    return {
        "path": str(folder),
        "kind": "adapter",
        "type": kind,
        "base": named_in(config),
        "targets": config.get("target_modules"),
        "fields": {key: value for key, value in config.items() if key not in known and value not in DEFAULTS},
        "parameters": sum(entry["parameters"] for entry in modules.values()),
        "norm": math.hypot(*(entry["norm"] for entry in modules.values())),
        "modules": dict(modules),
    }


def _checkpoint(folder: Path) -> dict[str, Any]:
    config, tensors = read_json(folder / "config.json"), TensorFolder(folder)
    report = folder / "report.json"
    told = read_json(report) if report.is_file() else {}
    return {
        "path": str(folder),
        "kind": "checkpoint",
        "type": config.get("model_type"),
        "architectures": config.get("architectures"),
        "dtypes": sorted({str(tensors.dtype(name)).removeprefix("torch.") for name in tensors}),
        "tensors": len(tensors),
        "parameters": sum(math.prod(tensors.shape(name)) for name in tensors),
        "norm": math.hypot(*(_norm(tensors[name]) for name in tensors if tensors.dtype(name).is_floating_point)),
        "merged": {key: told[key] for key in ("method", "params", "weights", "sources", "norm") if key in told} or None,
    }


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.float()))


def described(told: dict[str, Any]) -> str:
    """Return the same as text, one line a fact and one line a module."""
    lines = [f"{told['path']}: {told['kind']}, {told['type']}"]
    for key, value in told.items():
        if key in ("path", "kind", "type", "modules") or value is None:
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name}={item}" for name, item in value.items())
        elif isinstance(value, list):
            more = f" and {len(value) - LISTED} more" if len(value) > LISTED else ""
            value = ", ".join(map(str, value[:LISTED])) + more
        lines.append(f"  {key:<13} {_number(value)}")
    for name, entry in told.get("modules", {}).items():
        shapes = ", ".join(f"{part} {'x'.join(map(str, shape)) or '1'}" for part, shape in entry["shapes"].items())
        lines.append(f"  {name}: {entry['parameters']:,} parameters, norm {entry['norm']:.4g} ({shapes})")
    return "\n".join(lines)


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
