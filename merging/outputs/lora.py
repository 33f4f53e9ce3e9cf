"""The merged delta as a LoRA adapter."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from orthoft.delta import Delta, LowRank
from orthoft.hub_place import config_fields
from orthoft.merging.files.safetensors_file import SafetensorsFile
from orthoft.merging.files.writer import write_json
from orthoft.merging.outputs.modules import adapted, module_names
from orthoft.merging.outputs.registry import DeltaOf, Options, Output, output, rounded
from orthoft.merging.plan import MergePlan
from orthoft.merging.reports.report import MergeReport, WeightReport
from orthoft.merging.sources.names import EMBEDDING
from orthoft.merging.sources.orientation import EXPERTS
from orthoft.merging.sources.renames import module_kinds

# Embeddings that are not named like the embedding of tokens: of T5 and MPNet, of detectors, of MaskFormer and others.
MORE_EMBEDDINGS = re.compile(r"relative_attention_bias|query_embed|queries_embedder|queries_features")
# What PEFT takes for a router or a part of an expert of a mixture, wherever in the model a module has such a name.
EXPERT_PARTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


@output("lora")
class LoraOutput(Output):
    """The merged delta as a PEFT LoRA adapter of scale 1, named as the first adapter among the sources names modules.

    Without an adapter among them, as transformers names the modules of the base once it is loaded.

    Holds 2-D weights of linear layers, and of routers, which are parameters to PEFT (``target_parameters``); vectors,
    convolutions, embeddings and what loading fuses or splits are listed in the report as not carried.
    """

    def __init__(self, plan: MergePlan, options: Options) -> None:
        super().__init__(plan, options)
        rank = options.rank
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise ValueError(f"rank is a positive number, got {rank!r}")
        if plan.on_experts:
            raise ValueError(
                "output='lora' would need factors for each expert, and a rotation of all is merged into "
                f"{plan.on_experts[0]!r}: take output='checkpoint'"
            )
        linear, self._parameters = _places(plan)
        self._modules = module_names(plan, linear, as_loaded=self._parameters)
        self.names = list(self._modules)
        if not self.names:
            raise ValueError("output='lora' needs a linear weight to change, and the sources change none")
        dense = [name for name in self.names if plan.merged[name].rank is None]
        if rank is None and dense:
            raise ValueError(
                f"output='lora' needs a rank here: {len(dense)} merged weights, e.g. {dense[0]!r}, have no factors "
                f"(they merge in space {plan.merged[dense[0]].space.name!r})"
            )

    def entries(self, name: str) -> int:
        (m, n), rank = self.plan.merged[name].matrix, self.plan.merged[name].rank
        most = min(m, n) if rank is None else max(rank, 1)
        return (m + n) * min(most, self.options.rank or most)

    def keep(self, delta: Delta, entry: WeightReport) -> LowRank:
        factors, rank = delta.factors(), self.options.rank
        if factors is not None and factors[0].shape[1] == 0:  # PEFT knows no rank 0
            (m, n), entry.rank = delta.shape, 1
            return LowRank(factors[0].new_zeros(m, 1), factors[1].new_zeros(1, n))
        if factors is not None and (rank is None or factors[0].shape[1] <= rank):
            return LowRank(*factors)
        kept, lost = delta.truncated(rank or min(delta.shape))
        entry.rank, entry.truncation_error = kept.rank(), float(lost) / entry.norm if entry.norm > 0 else 0.0
        return kept

    def write(self, folder: Path, delta_of: DeltaOf, report: MergeReport) -> None:
        modules = self._modules
        keys = [f"base_model.model.{module}.lora_{factor}.weight" for module in modules.values() for factor in "AB"]
        ranks: dict[str, int] = {}
        flipped = {name: self.plan.merged[name].inputs_first and name not in self._parameters for name in self.names}
        with SafetensorsFile(folder / "adapter_model.safetensors", keys) as file:
            for name, module in modules.items():
                delta = delta_of(name)
                factors = (delta.transposed() if flipped[name] else delta).factors()
                assert factors is not None
                for factor, tensor in zip("BA", factors, strict=True):
                    key = f"base_model.model.{module}.lora_{factor}.weight"
                    file.write(key, rounded(tensor, self.dtype or torch.float32, name))
                ranks[module] = factors[0].shape[1]
        tasks = {source.config["task_type"] for source in self.plan.sources if source.config.get("task_type")}
        config = lora_config(
            ranks,
            parameters={modules[name] for name in self._parameters if name in modules},
            **config_fields(self.options.base),
            task_type=tasks.pop() if len(tasks) == 1 else None,
            fan_in_fan_out=any(flipped.values()),
        )
        write_json(folder / "adapter_config.json", config)
        left = [
            f"{name}: not the weight of a linear layer of the loaded model"
            for name in self.plan.merged
            if name not in flipped
        ]
        report.not_carried |= {"output": left} if left else {}


def lora_config(ranks: Mapping[str, int], *, parameters: Collection[str] = (), **fields: Any) -> dict[str, Any]:
    """Return the adapter_config.json of LoRAs of scale 1: one rank, or one per module by its full name, longest first.

    The weights of the modules ``parameters`` are targeted as parameters. ``fields`` are added to it.
    """
    rank = max(ranks.values())
    weights = [f"{module}.weight" for module in ranks if module in parameters]
    ranks = {f"{module}.weight" if module in parameters else module: own for module, own in ranks.items()}
    pattern = {} if len(set(ranks.values())) == 1 else {m: ranks[m] for m in sorted(ranks, key=len, reverse=True)}
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": [name for name in ranks if name not in weights],
        **({"target_parameters": weights} if weights else {}),
        "bias": "none",
        **fields,
    }


def _places(plan: MergePlan) -> tuple[list[str], set[str]]:
    """Return the weights that a LoRA can hold, and those of them that PEFT can only reach as parameters.

    The class of a module tells, where transformers knows the model. It is not asked if all that is merged belongs to
    adapters of a model without experts: loading transformers takes longer than such a merge.
    """
    flat = [name for name, item in plan.merged.items() if name.endswith(".weight") and len(item.shape) == 2]
    mixture = any(EXPERTS.fullmatch(name) for name in plan.base)
    kinds = module_kinds(plan.base) if mixture or not adapted(plan).issuperset(flat) else {}
    linear = [name for name in flat if kinds.get(name, _kind_by_name(name)) != "embedding"]
    parts = {name for name in linear if mixture and _module(name) in EXPERT_PARTS}
    return linear, {name for name in linear if kinds.get(name) == "other" or (name in kinds and name in parts)}


def _kind_by_name(name: str) -> str:
    module = _module(name)
    return "embedding" if EMBEDDING.fullmatch(module) or MORE_EMBEDDINGS.fullmatch(module) else "linear"


def _module(name: str) -> str:
    return name.split(".")[-2]
