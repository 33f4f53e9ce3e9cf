"""Adapters in other people's formats: as a LoRA, and to and from PEFT's own OFT, HRA and PSOFT."""

from orthoft.convert.conversion import Conversion, LayerReport
from orthoft.convert.inward import from_peft
from orthoft.convert.lora import to_lora
from orthoft.convert.outward import to_peft

__all__ = ["Conversion", "LayerReport", "from_peft", "to_lora", "to_peft"]
