"""Names that transformers gives to tensors while it loads a model, and the names under which they are stored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from orthoft.merging.files.tensors import TensorFolder, read_json

LAYERS = re.compile(r"layers?$|blocks?$|depths?$")


def stored_names(base: TensorFolder) -> dict[str, str]:
    """Return {name in the loaded model: name in the files} of the tensors that loading only renames.

    The model is built without its weights, from ``config.json``, and the renaming is that of transformers itself. What
    loading fuses or splits (the experts of a mixture) is left out. Empty if transformers has no such model, or has it
    with code of its own: that is never run.
    """
    config = base.folder / "config.json"
    return dict(_stored_names(base.folder.resolve(), tuple(base), config.read_bytes() if config.is_file() else b""))


@lru_cache(maxsize=8)
def _stored_names(folder: Path, names: tuple[str, ...], config: bytes) -> tuple[tuple[str, str], ...]:
    """Return the pairs of `stored_names`; the bytes of ``config.json`` tell the cache when it changed."""
    try:
        return tuple(_renamed(folder, names))
    except Exception:  # whatever a strange configuration does to transformers: the names stay as they are stored
        return ()


def _renamed(folder: Path, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    model = _without_weights(folder, len(names))
    if model is None:
        return
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    others = [step for step in steps if not isinstance(step, WeightRenaming)]
    loaded = model.state_dict()
    for name in names:
        new, fused = rename_source_key(name, renamings, others, model.base_model_prefix, loaded)
        if fused is None and new in loaded:
            yield new, name


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
