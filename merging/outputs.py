"""What a merge can be written as."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthoft.delta import Delta, LowRank
from orthoft.errors import unknown
from orthoft.linalg import at_least_float32
from orthoft.merging.names import inputs_first
from orthoft.merging.plan import MergePlan
from orthoft.merging.report import MergeReport
from orthoft.merging.source import MERGEABLE, AdapterSource
from orthoft.merging.tensors import as_matrix
from orthoft.merging.writer import SafetensorsFile, carry_over, parse_size, write_json, write_sharded

DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDING = re.compile(r"(.*[._])?(embeddings?|embed_\w+|wte|wpe|shared)")

DeltaOf = Callable[[str], Delta]


@dataclass(frozen=True)
class Options:
    """What the user chose of an output."""

    base: str
    dtype: str | None = None
    rank: int | None = None
    max_shard_size: int | str = "5GB"

    def torch_dtype(self) -> torch.dtype | None:
        """Return the chosen dtype, or raise a ValueError for one that cannot be written."""
        if self.dtype is None:
            return None
        if self.dtype not in DTYPE_NAMES:
            raise unknown("dtype", self.dtype, DTYPE_NAMES)
        return DTYPE_NAMES[self.dtype]


class Output(ABC):
    """A format of the result. Made before the output folder is: what does not fit is refused then.

    ``names`` are the merged weights it asks for, in order.
    """

    names: list[str]

    def __init__(self, plan: MergePlan, options: Options) -> None:
        self.plan, self.options, self.dtype = plan, options, options.torch_dtype()

    @abstractmethod
    def write(self, folder: Path, delta_of: DeltaOf, report: MergeReport) -> None:
        """Write the files, asking once for the merged delta of each weight in ``names``."""


class CheckpointOutput(Output):
    """The merged model as the base is stored: shards, index, config, tokenizer and the rest carried over."""

    def __init__(self, plan: MergePlan, options: Options) -> None:
        super().__init__(plan, options)
        if options.rank is not None:
            raise ValueError(f"rank is of output='lora', a checkpoint has none: got rank={options.rank}")
        self._limit = parse_size(options.max_shard_size)
        self.names = list(plan.merged)

    def write(self, folder: Path, delta_of: DeltaOf, report: MergeReport) -> None:
        base = self.plan.base
        carry_over(base.folder, folder, self.dtype)
        sizes = {name: (self._dtype(name), torch.Size(base.shape(name)).numel()) for name in base}
        write_sharded(folder, sizes, lambda name: self._tensor(name, delta_of), self._limit)

    def _dtype(self, name: str) -> torch.dtype:
        stored = self.plan.base.dtype(name)
        return self.dtype if self.dtype is not None and stored in MERGEABLE else stored

    def _tensor(self, name: str, delta_of: DeltaOf) -> Tensor:
        tensor, dtype = self.plan.base[name], self._dtype(name)
        if name in self.plan.merged:
            merged = as_matrix(at_least_float32(tensor)) + delta_of(name).dense()
            return _rounded(merged.reshape(tensor.shape), dtype, name)
        return tensor if tensor.dtype == dtype else _rounded(tensor, dtype, name)


class LoraOutput(Output):
    """The merged delta as a PEFT LoRA adapter of scale 1, named as the first adapter among the sources names modules.

    Holds 2-D weights of linear layers; vectors, convolutions and embeddings are listed in the report as not carried.
    """

    def __init__(self, plan: MergePlan, options: Options) -> None:
        super().__init__(plan, options)
        rank = options.rank
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise ValueError(f"rank is a positive number, got {rank!r}")
        self.names = [name for name, item in plan.merged.items() if _is_linear(name, item.shape)]
        if not self.names:
            raise ValueError("output='lora' needs a linear weight to change, and the sources change none")
        dense = [name for name in self.names if plan.merged[name].rank is None]
        if rank is None and dense:
            raise ValueError(
                f"output='lora' needs a rank here: {len(dense)} merged weights, e.g. {dense[0]!r}, have no factors "
                f"(they merge in space {plan.merged[dense[0]].space.name!r})"
            )

    def write(self, folder: Path, delta_of: DeltaOf, report: MergeReport) -> None:
        namer = next(
            (source for source in self.plan.sources if isinstance(source, AdapterSource)), self.plan.sources[0]
        )
        modules = {name: namer.module(name) for name in self.names}
        keys = [f"base_model.model.{module}.lora_{factor}.weight" for module in modules.values() for factor in "AB"]
        ranks: dict[str, int] = {}
        flipped = {name: self._inputs_first(name) for name in self.names}
        with SafetensorsFile(folder / "adapter_model.safetensors", keys) as file:
            for name, module in modules.items():
                factors = self._factors(name, delta_of(name), report)
                oriented = factors.transposed() if flipped[name] else factors
                for factor, tensor in (("A", oriented.A), ("B", oriented.B)):
                    file.write(
                        f"base_model.model.{module}.lora_{factor}.weight",
                        _rounded(tensor, self.dtype or torch.float32, name),
                    )
                ranks[module] = factors.rank() or 0
        tasks = {source.config["task_type"] for source in self.plan.sources if source.config.get("task_type")}
        config = lora_config(
            ranks,
            base_model_name_or_path=self.options.base,
            task_type=tasks.pop() if len(tasks) == 1 else None,
            fan_in_fan_out=any(flipped.values()),
        )
        write_json(folder / "adapter_config.json", config)
        left = [f"{name}: not the weight of a linear layer" for name in self.plan.merged if name not in flipped]
        report.not_carried |= {"output": left} if left else {}

    def _factors(self, name: str, delta: Delta, report: MergeReport) -> LowRank:
        factors, rank = delta.factors(), self.options.rank
        if factors is not None and (rank is None or factors[0].shape[1] <= rank):
            return LowRank(*factors)
        kept, lost = delta.truncated(rank or min(delta.shape))
        entry = next(entry for entry in report.merged if entry.name == name)
        entry.rank, entry.truncation_error = kept.rank(), float(lost) / entry.norm if entry.norm > 0 else 0.0
        return kept

    def _inputs_first(self, name: str) -> bool:
        told = [source.inputs_first[name] for source in self.plan.sources if name in source.inputs_first]
        return told[0] if told else inputs_first(self.plan.base, name)


OUTPUTS: dict[str, type[Output]] = {"checkpoint": CheckpointOutput, "lora": LoraOutput}


def get_output(name: str) -> type[Output]:
    """Return an output by name, or raise a ValueError that lists them."""
    if name not in OUTPUTS:
        raise unknown("output", name, OUTPUTS)
    return OUTPUTS[name]


def lora_config(ranks: Mapping[str, int], **fields: Any) -> dict[str, Any]:
    """Return the adapter_config.json of LoRAs of scale 1: one rank, or one per module by its full name, longest first.

    ``fields`` are added to it.
    """
    rank = max(ranks.values())
    pattern = {} if len(set(ranks.values())) == 1 else {m: ranks[m] for m in sorted(ranks, key=len, reverse=True)}
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": list(ranks),
        "bias": "none",
        **fields,
    }


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) == 2 and not EMBEDDING.fullmatch(name.split(".")[-2])


def _rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    rounded = tensor.to(dtype)
    if not torch.isfinite(rounded).all():
        raise ValueError(f"merged weight {name!r} contains NaN or Inf as {str(dtype).removeprefix('torch.')}")
    return rounded
