"""The merged deltas of a plan, one weight at a time: computed, kept on disk, read back."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from orthoft.delta import Delta, Dense, LowRank, Rotated, SubspaceRotated, Transposed
from orthoft.linalg import at_least_float32
from orthoft.merging.experts import merge_experts, one_under_the_other
from orthoft.merging.files.safetensors_file import SafetensorsFile
from orthoft.merging.files.tensors import TensorFolder, as_matrix, is_finite, matrix_shape
from orthoft.merging.methods import Finish
from orthoft.merging.plan import MergePlan, WeightPlan
from orthoft.merging.reports.diagnostics import diagnose
from orthoft.merging.reports.report import WeightReport
from orthoft.merging.sources.rows import Replaced
from orthoft.merging.weightwise import Merged, Statistics, merge_weight, weight_generator

SMALL = 256  # the total rank up to which threads cost more than they save


def merged_delta(
    plan: MergePlan,
    name: str,
    weight: Tensor,
    scale: float,
    device: torch.device,
    diagnostics: bool,
    rounded_to: torch.dtype | None = None,
) -> tuple[Delta, WeightReport]:
    """Return the merged delta of one weight, times ``scale``, and what the report says of it.

    Weights stored as (inputs, outputs) are merged and measured the other way round: methods know inputs from outputs.

    Args:
        weight: the base's, as a matrix.
        device: where the deltas are merged; the result comes back to the CPU.
        diagnostics: measure the tasks and the result as well.
        rounded_to: the dtype in which base + delta will be stored, None if their sum will not be.

    Raises:
        ValueError: a tensor of the base or of a source holds NaN or Inf, or the result does.
    """
    start = time.perf_counter()
    if not is_finite(weight):
        raise ValueError(f"base: tensor {name!r} of {plan.base.folder} contains NaN or Inf")
    item = plan.merged[name]
    if diagnostics or _needs_weight(plan, name):
        weight = at_least_float32(weight)
    tasks, weight = task_deltas(plan, name, weight)
    merged = _merged(plan, name, [_zero(weight) if task is None else task for task in tasks], weight, scale, device)
    if not math.isfinite(merged.norm):
        raise ValueError(f"merged weight {name!r} is too large for float32: take smaller weights, or a smaller scale")
    delta = moved(merged.delta, torch.device("cpu"))
    norms = dict(zip((source.name for source in plan.sources), merged.task_norms, strict=True))
    norms = {source: norm for source, norm in norms.items() if source in item.sources}
    entry = WeightReport(name, item.shape, item.space.name, delta.rank(), norms, merged.norm)
    entry.seconds = time.perf_counter() - start
    if diagnostics:
        draw = weight_generator(plan.seed, f"{name}#diagnostics")  # its own: what a method draws is not touched
        entry.diagnostics = diagnose(tasks, item.choice.weights, delta, weight, draw, rounded_to)
    return _as_stored(delta, item), entry


def _as_stored(delta: Delta, item: WeightPlan) -> Delta:
    if item.stacked:
        return Dense(delta.dense().reshape(matrix_shape(item.shape)))
    return delta.transposed() if item.inputs_first else delta


def _merged(
    plan: MergePlan, name: str, tasks: Sequence[Delta], weight: Tensor, scale: float, device: torch.device
) -> Merged:
    """Return the merge of all tasks, one expert after the other where a tensor holds several; delta on ``device``."""
    item, generator = plan.merged[name], weight_generator(plan.seed, name)

    def merge(tasks: Sequence[Delta], weight: Tensor, statistics: Statistics | None) -> Merged:
        there = [moved(task, device, item.choice.by_rows) for task in tasks]
        numbers = statistics and [None if one is None else one.to(device) for one in statistics]
        return merge_weight(there, item.choice, weight.to(device), generator, numbers, scale)

    numbers = _statistics(plan, name)
    if item.stacked:
        return merge_experts(tasks, weight, numbers, item.shape[0], item.inputs_first, merge)
    return merge(tasks, weight, numbers)


def task_deltas(plan: MergePlan, name: str, weight: Tensor) -> tuple[list[Delta | None], Tensor]:
    """Return each task's delta of a weight, None where it does not change it, and the weight: (outputs, inputs).

    Experts in one tensor come one under the other, as they are stored.
    """
    item = plan.merged[name]
    weight = weight.reshape(item.matrix)
    deltas = [source.delta(name, weight) if name in source.ranks else None for source in plan.sources]
    if item.stacked:
        return [delta and one_under_the_other(delta, weight) for delta in deltas], weight
    if not item.inputs_first:
        return deltas, weight
    return [delta and delta.transposed() for delta in deltas], weight.mT


def _statistics(plan: MergePlan, name: str) -> list[Tensor | None] | None:
    """Return the statistics of each task, turned as its delta is, or None if the merge has none."""
    if not plan.statistics:
        return None
    found = [plan.statistics[source.name].get(name) for source in plan.sources]
    item = plan.merged[name]
    if item.inputs_first and not item.stacked:  # (n, n, 1) of a Gram matrix becomes (1, n, n)
        return [None if one is None else one.movedim(-1, 0) for one in found]
    return found


def _needs_weight(plan: MergePlan, name: str) -> bool:
    """Say whether anything looks at the numbers of the weight; plain LoRAs do not, and a copy in float32 costs time."""
    choice = plan.merged[name].choice
    if choice.method.needs("base") or not choice.space.isometric:
        return True
    return any(source.needs_weight(name) for source in plan.sources if name in source.ranks)


def is_small(plan: MergePlan, name: str) -> bool:
    """Say whether the merge of a weight is a matter of small matrices, which one thread does best."""
    item = plan.merged[name]
    ranks = [source.ranks[name] for source in plan.sources if name in source.ranks]
    total = sum(rank or 0 for rank in ranks)
    return item.space.keeps_factors and None not in ranks and total <= SMALL


def model_scale(finish: Finish, plan: MergePlan, entries: Mapping[str, WeightReport]) -> float:
    """Return the scale of the whole model, from the norms of all weights and of their weighted tasks."""
    return finish(math.hypot(*(entries[name].norm for name in plan.merged)), model_norms(plan, entries))


def model_norms(plan: MergePlan, entries: Mapping[str, WeightReport]) -> list[float]:
    """Return ``||w_t D_t||`` over the whole model, of the tasks of a sum that was gone on from and of the new."""
    tasks = [
        math.hypot(
            *(
                float(item.choice.weights[index]) * entries[name].task_norms.get(source.name, 0.0)
                for name, item in plan.merged.items()
            )
        )
        for index, source in enumerate(plan.sources)
    ]
    tasks[:1] = plan.earlier_norms or tasks[:1]
    return tasks


def scaled_entry(entry: WeightReport, scale: float) -> WeightReport:
    """Return the report of a delta that is multiplied by ``scale``."""
    diagnostics = entry.diagnostics and entry.diagnostics.scaled(scale)
    return replace(entry, norm=entry.norm * abs(scale), diagnostics=diagnostics)


class OnDevice(Delta):
    """A change whose rows come to a device when they are asked for."""

    def __init__(self, inner: Delta, device: torch.device) -> None:
        self.inner, self.device = inner, device

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def dense(self) -> Tensor:
        return self.inner.dense().to(self.device)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.inner.rows(start, stop).to(self.device)

    def upcast(self, dtype: torch.dtype = torch.float32) -> OnDevice:
        return OnDevice(self.inner.upcast(dtype), self.device)


def moved(delta: Delta, device: torch.device, by_rows: bool = False) -> Delta:
    """Return a delta whose parts are on a device: a rotation stays one, which the space "rotation" tells by.

    One that is read from disk comes there slice by slice if it is merged ``by_rows``.
    """
    if isinstance(delta, Replaced) and by_rows and device.type != "cpu":
        return OnDevice(delta, device)
    if device.type == "cpu" and _device(delta).type == "cpu":
        return delta
    if isinstance(delta, Transposed):
        return moved(delta.inner, device).transposed()
    if isinstance(delta, Rotated):
        return Rotated(delta.weight.to(device), delta.update.to(device))
    if isinstance(delta, SubspaceRotated):
        return SubspaceRotated(*(part.to(device) for part in (delta.weight, delta.basis, delta.update)))
    factors = delta.factors()
    if factors is not None:
        return LowRank(*(factor.to(device) for factor in factors))
    return Dense(delta.dense().to(device))


def save_delta(delta: Delta, file: Path) -> str:
    """Write a delta and return the `content_hash` of the file; of a rotation its blocks, which keeps it one."""
    factors, inner = delta.factors(), delta.inner if isinstance(delta, Transposed) else delta
    if factors is not None:
        parts = {"B": factors[0], "A": factors[1]}
    elif isinstance(inner, Rotated):
        parts = {"update" if inner is delta else "update transposed": inner.update}
    else:
        parts = {"dense": delta.dense()}
    with SafetensorsFile(file, parts) as out:
        for name, tensor in parts.items():
            out.write(name, tensor)
    return out.digest


def load_delta(file: Path, base: TensorFolder, name: str) -> Delta:
    """Return what `save_delta` wrote of a weight's delta."""
    parts = load_file(file)
    if "dense" in parts:
        return Dense(parts["dense"])
    if "B" in parts:
        return LowRank(parts["B"], parts["A"])
    weight = as_matrix(at_least_float32(base[name]))
    if "update" in parts:
        return Rotated(weight, parts["update"])
    return Rotated(weight.mT, parts["update transposed"]).transposed()


def _device(delta: Delta) -> torch.device:
    factors = delta.factors()
    return delta.rows(0, 1).device if factors is None else factors[0].device


def _zero(weight: Tensor) -> LowRank:
    B, A = weight.new_zeros(weight.shape[0], 0), weight.new_zeros(0, weight.shape[1])
    return LowRank(B, A).upcast()
