"""The merged delta itself, factored where it is: to be merged with more tasks later."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from orthoft.delta import Delta
from orthoft.merging.deltas import model_norms
from orthoft.merging.files.safetensors_file import SafetensorsFile
from orthoft.merging.files.writer import write_json
from orthoft.merging.outputs.registry import DeltaOf, Options, Output, output, rounded
from orthoft.merging.plan import MergePlan
from orthoft.merging.reports.report import MergeReport
from orthoft.merging.sources.delta import CONFIG, VERSION


@output("delta")
class DeltaOutput(Output):
    """``<name>.B`` and ``<name>.A``, or ``<name>.dense`` where that is smaller, of each merged weight, as a matrix.

    Stored is the sum before the scale of the whole model; scale, method and the norms of the tasks stand in
    ``delta_config.json``, so that a method that adds one task after the other can go on (OPCM).
    """

    def __init__(self, plan: MergePlan, options: Options) -> None:
        super().__init__(plan, options)
        if options.rank is not None:
            raise ValueError(f"rank is of output='lora', a delta keeps what it has: got rank={options.rank}")
        self.names = list(plan.merged)
        if not self.names:
            raise ValueError("output='delta' needs a weight to change, and the sources change none")
        scaled = [name for name in self.names if plan.merged[name].choice.post.scale != 1.0]
        if scaled and plan.wish.method.finish:
            raise ValueError(
                f"output='delta' of method {plan.wish.method.name!r} keeps the sum, without a scale: got one for "
                f"{scaled[0]!r}, give it later, when the delta is merged into a model"
            )

    def weight_bytes(self, name: str) -> int:
        (m, n), each = self.plan.merged[name].matrix, (self.dtype or torch.float32).itemsize
        return each * min(self.entries(name), m * n)

    def write(self, folder: Path, delta_of: DeltaOf, report: MergeReport) -> None:
        keys = [f"{name}.{part}" for name in self.names for part in ("B", "A", "dense")]
        with SafetensorsFile(folder / "delta.safetensors", keys) as file:
            for name in self.names:
                for part, tensor in _parts(delta_of(name)).items():
                    stored = tensor / report.scale if part != "A" else tensor
                    file.write(f"{name}.{part}", rounded(stored, self.dtype or torch.float32, name))
        config = {
            "version": VERSION,
            "base": self.options.base,
            "method": report.method,
            "params": report.params,
            "scale": report.scale,
            "task_norms": model_norms(self.plan, {entry.name: entry for entry in report.merged}),
            "sources": list(report.sources),
        }
        write_json(folder / CONFIG, config)


def _parts(delta: Delta) -> dict[str, Tensor]:
    factors, (m, n) = delta.factors(), delta.shape
    if factors is None or factors[0].shape[1] * (m + n) >= m * n:
        return {"dense": delta.dense()}
    return {"B": factors[0], "A": factors[1]}
