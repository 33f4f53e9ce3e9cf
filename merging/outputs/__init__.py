"""What a merge can be written as: one format per file, found by name in `OUTPUTS`."""

from orthoft.merging.outputs import checkpoint, delta, lora, rotation
from orthoft.merging.outputs.registry import OUTPUTS, Options, Output, get_output, output

__all__ = ["OUTPUTS", "Options", "Output", "checkpoint", "delta", "get_output", "lora", "output", "rotation"]
