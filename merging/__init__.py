"""Merging of fine-tuned models: sources x spaces x methods -> output, streamed one weight at a time.

merge("base", ["adapter-a", "adapter-b"], "merged", method="opcm")
"""

from orthoft.merging.engine import merge
from orthoft.merging.formats import READERS
from orthoft.merging.in_memory import merge_deltas
from orthoft.merging.methods import METHODS, Method, method
from orthoft.merging.outputs import OUTPUTS
from orthoft.merging.plan import MergePlan, plan
from orthoft.merging.reports.inspection import InspectReport, inspect_sources
from orthoft.merging.reports.report import MergeReport, WeightReport
from orthoft.merging.spaces import SPACES, Space, space
from orthoft.merging.weightwise import Post
from orthoft.merging.wish import Wish

__all__ = [
    "METHODS",
    "OUTPUTS",
    "READERS",
    "SPACES",
    "InspectReport",
    "MergePlan",
    "MergeReport",
    "Method",
    "Post",
    "Space",
    "WeightReport",
    "Wish",
    "inspect_sources",
    "merge",
    "merge_deltas",
    "method",
    "plan",
    "space",
]
