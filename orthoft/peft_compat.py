"""What depends on PEFT's version: registering methods it does not know, the saved model card."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method
from safetensors import safe_open

from orthoft.citations import citation_section, cited_in
from orthoft.hub_place import named_in
from orthoft.loading import LEARNT_FROM_US, TASK_TYPES, WITHOUT_US, auto_class, words_to_adapt


def peft_type_name(method: str) -> str:
    """Return our name in PEFT's enum: prefixed, since PEFT owns OFT, HRA and PSOFT itself."""
    return f"ORTHOFT_{method.upper()}"


def register(method: str, config_cls: type[Any], model_cls: type[Any]) -> None:
    """Make PEFT (and transformers' own `load_adapter`) know a method; calling it twice changes nothing."""
    name = peft_type_name(method)
    if name in PeftType.__members__:
        if PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[name]) is not config_cls:
            warnings.warn(f"PEFT has a method {name} of its own: orthoft's {method} is not registered", stacklevel=2)
        return
    _add_member(name)
    register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls)


def _add_member(name: str) -> None:
    """Add a member to the finished enum: PEFT looks methods up there, and has no other way in."""
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(PeftType.__members__)
    member.__objclass__ = PeftType
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member


def saves_biases() -> bool:
    """Say whether this PEFT saves trained biases of methods it does not own: 0.21 and later do."""
    return hasattr(BaseTuner, "_get_learnable_bias_state_dict")


def write_load_hint(folder: str | Path) -> None:
    """Say in the model card that PEFT saved what the adapter is, what it takes to load it, and whom to cite.

    PEFT saves an adapter that is not called "default" in a folder of its name, beside the card.
    """
    folder = Path(folder).absolute()
    card, above = folder / "README.md", folder.parent / "README.md"
    where = "this-folder"
    if not card.is_file() and above.is_file() and "library_name: peft" in above.read_text(encoding="utf-8"):
        card, where = above, f"this-folder/{folder.name}"
    if card.is_file() and "import orthoft" not in (text := card.read_text(encoding="utf-8")):
        card.write_text(text.rstrip() + "\n\n" + "\n".join(about_adapter(folder, where)), encoding="utf-8")


def about_adapter(folder: Path, where: str = "this-folder") -> list[str]:
    """Return the lines of a model card on the adapter of ours in a folder: what it is, how it loads, whom to cite.

    ``where`` is how a reader of the card calls the folder.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    kind, base = config["peft_type"], named_in(config) or "BASE"
    method = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    return [
        "## This adapter",
        "",
        "| | |",
        "|---|---|",
        f"| method | {kind.removeprefix('ORTHOFT_')}, of the package `orthoft` |",
        f"| base | `{base}` |",
        *_size(folder / "adapter_model.safetensors"),
        "",
        LEARNT_FROM_US,
        "",
        "```python",
        words_to_adapt(_auto_class(config, base), base, where, ours=True),
        "```",
        "",
        WITHOUT_US.replace("this-folder", where),
        "",
        *citation_section(cited_in(sys.modules[method.__module__])),
    ]


def _size(file: Path) -> list[str]:
    if not file.is_file():
        return []
    with safe_open(file, framework="pt") as tensors:
        count = sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return [f"| numbers | {count:,} |"]


def _auto_class(config: Mapping[str, Any], base: str) -> str:
    file = Path(base) / "config.json"
    if config.get("task_type") in TASK_TYPES:
        return TASK_TYPES[config["task_type"]]
    return auto_class(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {})
