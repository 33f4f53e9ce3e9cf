"""Merging of fine-tuned models: sources x spaces x methods -> output, streamed one weight at a time.

merge("base", ["adapter-a", "adapter-b"], "merged", method="opcm")
"""

from orthoft.merging import boft_reader, lora_reader, peft_readers, tokens, vera_reader
from orthoft.merging.engine import merge
from orthoft.merging.in_memory import merge_deltas
from orthoft.merging.methods import METHODS, method
from orthoft.merging.outputs import OUTPUTS
from orthoft.merging.plan import MergePlan, plan
from orthoft.merging.readers import READERS
from orthoft.merging.report import MergeReport, WeightReport
from orthoft.merging.spaces import SPACES, space

__all__ = [
    "METHODS",
    "OUTPUTS",
    "READERS",
    "SPACES",
    "MergePlan",
    "MergeReport",
    "WeightReport",
    "boft_reader",
    "lora_reader",
    "merge",
    "merge_deltas",
    "method",
    "peft_readers",
    "plan",
    "tokens",
    "vera_reader",
    "space",
]
