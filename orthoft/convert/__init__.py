"""Adapters in other people's formats: as LoRA, PEFT's own OFT, HRA and PSOFT, GGUF; models for the Hub."""

from orthoft.convert.check import serving_notes
from orthoft.convert.conversion import Conversion, LayerReport
from orthoft.convert.gguf_export import GgufFile, to_gguf
from orthoft.convert.inward import from_peft
from orthoft.convert.lora import to_lora
from orthoft.convert.outward import to_peft
from orthoft.merging.files.upload import Push, push_to_hub

__all__ = [
    "Conversion",
    "GgufFile",
    "LayerReport",
    "Push",
    "from_peft",
    "push_to_hub",
    "serving_notes",
    "to_gguf",
    "to_lora",
    "to_peft",
]
