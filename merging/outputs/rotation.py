"""The merged rotations as an OFTv2 adapter again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from math import lcm
from pathlib import Path
from typing import Any

import torch

from orthoft.delta import Delta, Rotated, Transposed
from orthoft.hub_place import config_fields
from orthoft.merging.files.safetensors_file import SafetensorsFile
from orthoft.merging.files.writer import write_json
from orthoft.merging.formats.registry import block_size
from orthoft.merging.lie_algebra import generator
from orthoft.merging.outputs.modules import module_names
from orthoft.merging.outputs.registry import DeltaOf, Options, Output, output, rounded
from orthoft.merging.plan import MergePlan
from orthoft.merging.reports.report import MergeReport
from orthoft.merging.sources.adapter import AdapterSource

KINDS = ("ORTHOFT_OFTV2", "OFT")


@output("rotation")
class RotationOutput(Output):
    """The merged rotations as an adapter of our OFTv2 with the exact map, which PEFT loads once orthoft is imported.

    All sources have to be block rotations, merged in space "rotation". What they save beside them (biases, heads) is
    listed in the report as not carried.
    """

    def __init__(self, plan: MergePlan, options: Options) -> None:
        super().__init__(plan, options)
        if options.rank is not None:
            raise ValueError(f"rank is of output='lora', a rotation has none: got rank={options.rank}")
        others = [f"{source.name} ({source.kind})" for source in plan.sources if source.kind not in KINDS]
        if others:
            raise ValueError(f"output='rotation' needs sources that are block rotations (OFT), not {', '.join(others)}")
        adapters = [source for source in plan.sources if isinstance(source, AdapterSource)]
        adapted = {name for source in adapters for name in source.adapter_ranks}
        if plan.on_experts:
            raise ValueError(
                f"output='rotation' holds rotations of layers, and {plan.on_experts[0]!r} is of fused experts"
            )
        self.names = [name for name in plan.merged if name in adapted]
        if not self.names:
            raise ValueError("output='rotation' needs a rotated weight, and the sources rotate none")
        self._refuse_other_geometry(plan)

    def _refuse_other_geometry(self, plan: MergePlan) -> None:
        elsewhere = next((name for name in self.names if plan.merged[name].space.name != "rotation"), None)
        if elsewhere is not None:
            raise ValueError(
                f"output='rotation' needs space='rotation': {elsewhere!r} merges in space "
                f"{plan.merged[elsewhere].space.name!r}, where rotations do not stay rotations"
            )
        choices = [plan.merged[name].choice for name in self.names]
        if self.plan.finish or any(choice.post.scale != 1.0 or choice.space_params["conflict"] for choice in choices):
            raise ValueError(
                "output='rotation' holds rotations alone: take neither a scale of the result nor conflict=True, nor a "
                f"method that scales the whole model, got method {plan.wish.method.name!r}"
            )

    def entries(self, name: str) -> int:
        inputs, size = self._inputs_and_block(name)
        return inputs * size

    def weight_bytes(self, name: str) -> int:
        inputs, size = self._inputs_and_block(name)
        each = (self.dtype or torch.float32).itemsize
        return each * inputs * (size - 1) // 2 if name in self.names else 0

    def _inputs_and_block(self, name: str) -> tuple[int, int]:
        """Return how many inputs a weight has, and the size of its merged blocks: that of the space "rotation"."""
        (m, n), flipped = self.plan.merged[name].matrix, self.plan.merged[name].inputs_first
        turning = [s for s in self.plan.sources if isinstance(s, AdapterSource) and name in s.adapter_ranks]
        found = [shape[-1] for source in turning for shape in source.shapes(name).values()]
        return m if flipped else n, lcm(*map(block_size, found))

    def write(self, folder: Path, delta_of: DeltaOf, report: MergeReport) -> None:
        modules = module_names(self.plan, self.names)
        keys = {name: f"base_model.model.{module}.orthoft_oftv2_adapter.skew" for name, module in modules.items()}
        sizes: dict[str, int] = {}
        with SafetensorsFile(folder / "adapter_model.safetensors", keys.values()) as file:
            for name, key in keys.items():
                rotated = _rotated(name, delta_of(name))
                sizes[modules[name]] = size = rotated.update.shape[-1]
                rows, cols = torch.triu_indices(size, size, 1)
                skew = generator(rotated.update.mT.double(), "cayley")[:, rows, cols]  # (g, b (b - 1) / 2)
                file.write(key, rounded(skew, self.dtype or torch.float32, name))
        write_json(folder / "adapter_config.json", self._config(sizes))
        left = [f"{name}: no rotation" for name in self.plan.merged if name not in keys]
        report.not_carried |= {"output": left} if left else {}

    def _config(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        usual = Counter(sizes.values()).most_common(1)[0][0]
        tasks = {source.config["task_type"] for source in self.plan.sources if source.config.get("task_type")}
        return {
            "peft_type": "ORTHOFT_OFTV2",
            **config_fields(self.options.base),
            "task_type": tasks.pop() if len(tasks) == 1 else None,
            "inference_mode": True,
            "block_size": usual,
            "block_size_pattern": {re.escape(module): size for module, size in sizes.items() if size != usual},
            "block_share": False,
            "map": "cayley",
            "degree": 5,
            "radius": None,
            "dropout": 0.0,
            "bias": "none",
            "target_modules": list(sizes),
        }


def _rotated(name: str, delta: Delta) -> Rotated:
    inner = delta.inner if isinstance(delta, Transposed) else delta
    if not isinstance(inner, Rotated):
        raise ValueError(
            f"the merge of {name!r} is no block rotation: a source saved it whole beside its rotation, or its "
            "series is too far from orthogonal: take output='checkpoint'"
        )
    return inner
