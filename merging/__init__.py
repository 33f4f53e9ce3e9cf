"""Merging of fine-tuned models: sources x spaces x methods -> output, streamed one weight at a time.

merge("base", ["adapter-a", "adapter-b"], "merged", method="opcm")
"""

from orthoft.merging import peft_readers
from orthoft.merging.engine import merge, merge_deltas
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
    "merge",
    "merge_deltas",
    "method",
    "peft_readers",
    "plan",
    "space",
]
