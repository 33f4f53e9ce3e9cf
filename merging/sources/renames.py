"""Names that transformers gives to tensors while it loads a model, and the names under which they are stored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from orthoft.merging.files.tensors import TensorFolder, read_json

LAYERS = re.compile(r"layers?$|blocks?$|depths?$")
STACKED = [("MergeModulelist", 0), ("Concatenate", 1)]  # of experts, and of the matrices of each
Parts = tuple[tuple[str, ...], ...]


@dataclass
class Loaded:
    """What transformers makes of the tensors of a folder when it loads them.

    ``names`` are those of the loaded model, as it registers them. ``renamed`` are (loaded, stored, kind of its module)
    of the tensors that keep their shape. ``fused`` are those of experts that become one tensor (E, p, q): of each
    expert the stored tensors whose rows, one under the other, are its (p, q). ``turned`` are the modules that say of
    their experts that they have the inputs first.
    """

    names: list[str] = field(default_factory=list)
    renamed: list[tuple[str, str, str]] = field(default_factory=list)
    fused: dict[str, Parts] = field(default_factory=dict)
    turned: set[str] = field(default_factory=set)

    @property
    def firsts(self) -> dict[str, str]:
        """What stands in the files for each fused tensor whose parts are all there: the first of them."""
        return {name: parts[0][0] for name, parts in self.fused.items() if parts}


def stored_names(base: TensorFolder) -> dict[str, str]:
    """Return {name in the loaded model: name in the files} of the tensors that loading only renames.

    The model is built without its weights, from ``config.json``, and the renaming is that of transformers itself. What
    loading fuses or splits (the experts of a mixture) is left out. Empty if transformers has no such model, or has it
    with code of its own: that is never run.
    """
    return {loaded: stored for loaded, stored, _ in loaded_model(base).renamed}


def module_kinds(base: TensorFolder) -> dict[str, str]:
    """Return {name in the files: kind of its module} of the same tensors.

    The kinds are "linear" (nn.Linear, and the Conv1D of GPT-2), "embedding" and "other".
    """
    return {stored: kind for _, stored, kind in loaded_model(base).renamed}


def loaded_model(base: TensorFolder) -> Loaded:
    """Return what transformers makes of the base, nothing where `stored_names` is empty."""
    config = base.folder / "config.json"
    return _loaded(base.folder.resolve(), tuple(base), config.read_bytes() if config.is_file() else b"")


@lru_cache(maxsize=8)
def _loaded(folder: Path, names: tuple[str, ...], config: bytes) -> Loaded:
    """Return what `loaded_model` does; the bytes of ``config.json`` tell the cache when it changed."""
    try:
        return _read(folder, names)
    except Exception:  # whatever a strange configuration does to transformers: the names stay as they are stored
        return Loaded()


def _read(folder: Path, names: tuple[str, ...]) -> Loaded:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    model = _without_weights(folder, len(names))
    if model is None:
        return Loaded()
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    others = [step for step in steps if not isinstance(step, WeightRenaming)]
    tensors = model.state_dict()
    loaded, fused = Loaded(list(tensors)), dict[str, dict[tuple[int, int], str]]()
    for name in names:
        new, pattern = rename_source_key(name, renamings, others, model.base_model_prefix, tensors)
        if pattern is None and new in tensors:
            loaded.renamed.append((new, name, _kind(model.get_submodule(new.rpartition(".")[0]))))
        elif new in tensors:
            step = next(step for step in others if pattern in step.source_patterns)
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            if _stacks(step) and numbers:
                fused.setdefault(new, {})[numbers[-1], step.source_patterns.index(pattern)] = name
    loaded.turned = {name for name, module in model.named_modules() if getattr(module, "is_transposed", False)}
    loaded.fused = {name: _in_order(parts, len(tensors[name])) for name, parts in fused.items()}
    return loaded


def _stacks(step: Any) -> bool:
    """Say whether a step of loading puts experts one behind the other, each of them of one or several matrices."""
    done = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in step.operations]
    return len(step.target_patterns) == 1 and done in (STACKED[:1], STACKED)


def _in_order(parts: Mapping[tuple[int, int], str], experts: int) -> Parts:
    """Return the names of each expert, () if some are missing."""
    slots = 1 + max(slot for _, slot in parts)
    complete = len(parts) == experts * slots and all(expert < experts for expert, _ in parts)
    return tuple(tuple(parts[e, slot] for slot in range(slots)) for e in range(experts)) if complete else ()


def _kind(module: torch.nn.Module) -> str:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear | Conv1D):
        return "linear"
    return "embedding" if isinstance(module, torch.nn.Embedding) else "other"


def _layers(config: Any, key: str = "") -> Iterator[int]:
    """Give the numbers in a configuration whose names speak of layers."""
    if isinstance(config, Mapping | list):
        items = config.items() if isinstance(config, Mapping) else [(key, one) for one in config]
        for name, inner in items:
            yield from _layers(inner, name)
    elif isinstance(config, int) and LAYERS.search(key):
        yield config


def _without_weights(folder: Path, tensors: int) -> Any:
    """Return the model of a folder on the meta device, None if its class is not one of transformers.

    None also for one with more layers than the files have tensors: it is not theirs, and may take for ever to build.
    """
    import transformers

    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    model_class: Any = getattr(transformers, str((config.get("architectures") or [""])[0]), None)
    shipped = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    if not shipped or max(_layers(config), default=0) > tensors:
        return None
    with torch.device("meta"):  # by the class's own configuration: an Auto class would ask whether to run code
        return model_class(model_class.config_class.from_pretrained(str(folder)))
