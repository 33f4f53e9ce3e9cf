"""Adapter formats: one function per format turns the tensors of a module into a delta, found by name in `READERS`."""

from orthoft.merging.formats import boft, lora, ours, peft, tokens, vera
from orthoft.merging.formats.registry import READERS, Extent, Reader, get_reader

__all__ = ["READERS", "Extent", "Reader", "boft", "get_reader", "lora", "ours", "peft", "tokens", "vera"]
