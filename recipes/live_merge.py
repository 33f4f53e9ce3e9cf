"""Merges tried in memory: a live model whose weights become one merge after the other, and then themselves again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from orthoft.delta import Delta, Dense, LowRank, Rotated, SubspaceRotated, Transposed
from orthoft.linalg import at_least_float32
from orthoft.merging import MergePlan
from orthoft.merging.deltas import is_small, merged_delta, model_scale
from orthoft.merging.files.tensors import TensorFolder, as_matrix, matrix_shape
from orthoft.merging.outputs.checkpoint import add_rounded
from orthoft.merging.sources.checkpoint import Source
from orthoft.merging.sources.expert_inputs import InputsFirst
from orthoft.merging.sources.names import Prefix, match_names
from orthoft.merging.sources.renames import loaded_model
from orthoft.merging.statistics import STATISTICS_OF, Statistics
from orthoft.merging.threads import torch_threads
from orthoft.merging.wish import wish_for

CPU = torch.device("cpu")
FLOAT32 = 4  # bytes
IN_MEMORY = (LowRank, Rotated, SubspaceRotated, Transposed, InputsFirst, Dense)


def held_bytes(plan: MergePlan) -> int:
    """Return the most that a `LiveMerge` holds beside the model: weights, deltas and one merge, all in float32.

    ``4 sum over weights (2 m n + sum_t r_t (m + n))``, with ``m n`` for a task without factors. Block rotations take
    less: they share the weight.
    """
    total = 0
    for name, item in plan.merged.items():
        m, n = matrix_shape(item.shape)
        ranks = [source.ranks[name] for source in plan.sources if name in source.ranks]
        total += 2 * m * n + sum(m * n if rank is None else rank * (m + n) for rank in ranks)
    return FLOAT32 * total


class Held(Source):
    """A source whose deltas were read once and stay in memory, factored where they are."""

    def __init__(self, source: Source, weights: Mapping[str, Tensor]) -> None:
        super().__init__(source.name, source.folder)
        self.kind, self.ranks = source.kind, source.ranks
        self.deltas = {name: _in_memory(source.delta(name, weights[name])) for name in weights if name in source.ranks}

    def needs_weight(self, name: str) -> bool:
        return False

    def delta(self, name: str, weight: Tensor) -> Delta:
        return self.deltas[name]


def _in_memory(delta: Delta) -> Delta:
    """Return the delta itself, or what it reads from a file row by row."""
    return delta if isinstance(delta, IN_MEMORY) else Dense(delta.dense())


class LiveMerge:
    """A model, the deltas of its tasks, and merges of them that are put into its parameters and taken out exactly.

    ``plan`` opens the sources and says which weights are tried; its method does not matter. Merges are rounded to
    ``dtype`` (the base's own unless given), as the export rounds them, and then to the parameters' dtype. Methods that
    take statistics are given those of ``numbers``, by kind and source, or of the plan.

    Raises:
        ValueError: a weight is not a parameter of the model, or the model holds other numbers than the base on disk.
    """

    def __init__(
        self,
        plan: MergePlan,
        model: nn.Module,
        dtype: torch.dtype | None = None,
        numbers: Mapping[str, Mapping[str, Statistics]] | None = None,
    ) -> None:
        self.model, self._dtype = model, dtype
        own = {one.kind: plan.statistics for one in plan.statistics.values()}
        self.numbers: Mapping[str, Mapping[str, Statistics]] = {**own, **(numbers or {})}
        self._weights = {n: at_least_float32(plan.base[n]).reshape(item.matrix) for n, item in plan.merged.items()}
        self._parameters = self._find(plan)
        self.held = [Held(source, self._weights) for source in plan.sources]
        self._plan = replace(plan, sources=tuple(self.held))

    def _find(self, plan: MergePlan) -> dict[str, Tensor]:
        """Return the model's parameter of each weight, which may have a prefix more or less than on disk.

        Of an expert that is stored by itself it is a part of what transformers fuses.
        """
        own = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        fits: Callable[[str, str], bool] = lambda mine, theirs: tuple(own[mine].shape) == plan.base.shape(theirs)  # noqa: E731
        naming = match_names(list(own), plan.base, fits)
        experts = dict(_of_experts(plan.base, own, naming.prefix))
        found = {}
        for name, weight in self._weights.items():
            parameter = own.get(naming.to_source(name), experts.get(name))
            stored = weight.reshape(matrix_shape(plan.base.shape(name)))
            if parameter is None or not torch.equal(as_matrix(parameter.cpu()), stored.to(parameter.dtype)):
                raise ValueError(
                    f"weight {name!r} of {plan.base.folder} is no parameter of the model loaded from it: "
                    "leave it out with merge.exclude"
                )
            found[name] = parameter
        return found

    def planned(self, words: Mapping[str, Any]) -> MergePlan:
        """Return the plan of a merge in the words of `orthoft.merging.wish.wish_for`, without opening anything again.

        Raises:
            ValueError, TypeError: an unknown name, a wrong value, or a space that these deltas do not have.
        """
        wish, names = wish_for(len(self.held), **words), [source.name for source in self.held]
        merged = {
            name: replace(item, choice=wish.of(name, names).choice(self._ranks(name), item.vector))
            for name, item in self._plan.merged.items()
            if wish.selects(name)
        }
        numbers = self.numbers.get(STATISTICS_OF.get(wish.method.name, ""), {})
        return replace(self._plan, wish=wish, merged=merged, statistics=numbers)

    def _ranks(self, name: str) -> list[int | None]:
        return [source.ranks[name] for source in self.held if name in source.ranks]

    def merged(self, words: Mapping[str, Any]) -> dict[str, Delta]:
        """Return the merged deltas by weight, the same that `orthoft.merging.merge` writes for these words."""
        plan = self.planned(words)
        finish = plan.finish
        deltas, entries = {}, {}
        for name, item in plan.merged.items():
            scale = 1.0 if finish else item.choice.post.scale
            with torch_threads(1 if is_small(plan, name) else torch.get_num_threads()):
                deltas[name], entries[name] = merged_delta(plan, name, self._weights[name], scale, CPU, False)
        if finish is None:
            return deltas
        whole = model_scale(finish, plan, entries)
        return {name: delta.scaled(whole * plan.merged[name].choice.post.scale) for name, delta in deltas.items()}

    @contextmanager
    def changed(self, deltas: Mapping[str, Delta]) -> Iterator[nn.Module]:
        """Let the model be base + deltas in the block, and bit for bit what it was behind it."""
        try:
            with torch.no_grad(), torch_threads(1):
                for name, delta in deltas.items():
                    self._put(name, delta)
            yield self.model
        finally:
            with torch.no_grad():
                for name in deltas:
                    parameter = self._parameters[name]
                    parameter.copy_(self._weights[name].reshape(parameter.shape))

    def _put(self, name: str, delta: Delta) -> None:
        weight, parameter = self._weights[name].reshape(delta.shape), self._parameters[name]
        out = torch.empty(weight.shape, dtype=self._dtype or self._plan.base.dtype(name))  # (m, n)
        parameter.copy_(add_rounded(weight, delta, out, name).reshape(parameter.shape))


def _of_experts(base: TensorFolder, own: Mapping[str, Tensor], prefix: Prefix) -> Iterator[tuple[str, Tensor]]:
    """Give what the base stores expert by expert, each as its part of the parameter that transformers makes of all."""
    for name, experts in loaded_model(base).fused.items():
        if (stack := own.get(prefix.to_source(name))) is None:
            continue
        for matrix, parts in zip(stack, experts, strict=False):  # of some that are not all stored there are none
            yield from zip(parts, torch.split(matrix, [base.shape(part)[0] for part in parts]), strict=True)
