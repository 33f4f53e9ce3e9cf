"""Orthogonal fine-tuning of Hugging Face models, and merging of what was trained, as factors.

Importing orthoft makes its adapters known to PEFT: at once if PEFT is loaded, else in the moment it is. So the import
costs nothing by itself, and the command line and the merging engine work without PEFT.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from orthoft._on_import import after_import

if TYPE_CHECKING:
    from orthoft.adapters import ADAPTERS, GOFTConfig, HRAConfig, OFTv2Config, PSOFTConfig, SVFTConfig
    from orthoft.config import OrthoConfig
    from orthoft.convert import (
        Conversion,
        LayerReport,
        from_peft,
        push_to_hub,
        serving_notes,
        to_gguf,
        to_lora,
        to_peft,
    )
    from orthoft.reporting import AdapterReport, Report, report
    from orthoft.trainer import OrthoTrainer, WithPenalty
    from orthoft.tuner import OrthoModel, penalty

__version__ = "0.1.0"

_HOMES = {
    "ADAPTERS": "orthoft.adapters",
    "GOFTConfig": "orthoft.adapters",
    "HRAConfig": "orthoft.adapters",
    "OFTv2Config": "orthoft.adapters",
    "PSOFTConfig": "orthoft.adapters",
    "SVFTConfig": "orthoft.adapters",
    "OrthoConfig": "orthoft.config",
    "OrthoModel": "orthoft.tuner",
    "OrthoTrainer": "orthoft.trainer",
    "WithPenalty": "orthoft.trainer",
    "penalty": "orthoft.tuner",
    "report": "orthoft.reporting",
    "AdapterReport": "orthoft.reporting",
    "Report": "orthoft.reporting",
    "Conversion": "orthoft.convert",
    "LayerReport": "orthoft.convert",
    "from_peft": "orthoft.convert",
    "push_to_hub": "orthoft.convert",
    "serving_notes": "orthoft.convert",
    "to_gguf": "orthoft.convert",
    "to_lora": "orthoft.convert",
    "to_peft": "orthoft.convert",
}
__all__ = [
    "ADAPTERS",
    "AdapterReport",
    "Conversion",
    "GOFTConfig",
    "HRAConfig",
    "LayerReport",
    "OFTv2Config",
    "OrthoConfig",
    "OrthoModel",
    "OrthoTrainer",
    "PSOFTConfig",
    "Report",
    "SVFTConfig",
    "WithPenalty",
    "from_peft",
    "penalty",
    "push_to_hub",
    "report",
    "serving_notes",
    "to_gguf",
    "to_lora",
    "to_peft",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'orthoft' has no attribute {name!r}")
    if not _HOMES[name].startswith("orthoft.convert"):
        import_module("orthoft.adapters")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


if "peft" in sys.modules:
    import_module("orthoft.adapters")
else:
    after_import("peft", "orthoft.adapters")
