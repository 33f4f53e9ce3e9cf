"""What depends on PEFT's version: registering methods it does not know, the saved model card."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method

HINT = """
## Loading this adapter

This adapter is of a method that PEFT learns from the package `orthoft`: without the import, PEFT
fails with a `KeyError`.

```python
import orthoft  # registers the method
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/adapter")
```

For use without orthoft, `orthoft convert ADAPTER OUT --to lora` writes a LoRA that plain PEFT loads.
"""


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
    """Say in the model card that PEFT saved what it takes to load the adapter."""
    card = Path(folder) / "README.md"
    if card.is_file() and "import orthoft" not in (text := card.read_text(encoding="utf-8")):
        card.write_text(text.rstrip() + "\n" + HINT, encoding="utf-8")
