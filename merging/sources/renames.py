"""Names that transformers gives to tensors while it loads a model, and the names under which they are stored."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from orthoft.merging.files.tensors import TensorFolder, read_json


def stored_names(base: TensorFolder) -> dict[str, str]:
    """Return {name in the loaded model: name in the files} of the tensors that loading only renames.

    The model is built without its weights, from ``config.json``, and the renaming is that of transformers itself. What
    loading fuses or splits (the experts of a mixture) is left out. Empty if transformers has no such model, or has it
    with code of its own: that is never run.
    """
    return dict(_stored_names(base.folder.resolve(), tuple(base)))


@lru_cache(maxsize=8)
def _stored_names(folder: Path, names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    try:
        return tuple(_renamed(folder, names))
    except Exception:  # whatever a strange configuration does to transformers: the names stay as they are stored
        return ()


def _renamed(folder: Path, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    model = _without_weights(folder)
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


def _without_weights(folder: Path) -> Any:
    """Return the model of a folder on the meta device, None if its class is not one of transformers."""
    import transformers

    if not (folder / "config.json").is_file():
        return None
    architectures = read_json(folder / "config.json").get("architectures") or [""]
    model_class = getattr(transformers, str(architectures[0]), None)
    if model_class is None:
        return None
    with torch.device("meta"):
        return model_class(transformers.AutoConfig.from_pretrained(str(folder)))
