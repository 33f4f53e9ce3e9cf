"""What the tasks do to one weight, how they stand to each other, and what their merge keeps of them: plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from orthoft.delta import Delta
from orthoft.linalg import frobenius_norm
from orthoft.merging.reports import measures
from orthoft.merging.reports.measures import LEADING, Bases

V = TypeVar("V")
Numbers = list[float | None]
Matrix = list[Numbers]


@dataclass
class MergeDiagnostics:
    """The merged delta of one weight, beside its tasks.

    Args:
        norm, rank, spectrum: as of the tasks.
        survival: by task, ``<M, D_t> / ||D_t||^2``: 1 if the merge holds the task whole.
        interference: by task, ``sum_{s != t} w_s <D_s, D_t> / ||D_t||^2``: what a weighted sum of the others would add
            to its survival, or take from it.
        rounding_error: of storing base + delta in the dtype of the result, relative to the delta, on a sample of rows;
            None where the output holds no such sum (a LoRA, a delta, a rotation).
    """

    norm: float | None
    rank: int | None
    spectrum: list[float]
    survival: Numbers
    interference: Numbers
    rounding_error: float | None

    def scaled(self, scale: float) -> MergeDiagnostics:
        """Return the numbers of ``scale`` times the merged delta; the rounding itself stays as large as it was."""
        size = abs(scale)
        return replace(
            self,
            norm=None if self.norm is None else size * self.norm,
            spectrum=[size * s for s in self.spectrum],
            survival=[None if share is None else scale * share for share in self.survival],
            rounding_error=self.rounding_error / size if self.rounding_error is not None and size > 0 else None,
        )


@dataclass
class WeightDiagnostics:
    """One weight. Lists are by task, matrices (T, T) by pair of tasks, in the order of the sources.

    None stands where a task does not change the weight, or where a measure has no meaning.

    Args:
        task_norms: Frobenius norms, before the weights.
        ranks: numerical, above 1e-5 of the largest singular value; None if above 40 and without factors.
        spectra: the 32 largest singular values.
        captured: the share of ``||D_t||^2`` in those.
        cosine: ``<D_i, D_j> / (||D_i|| ||D_j||)``.
        input_overlap, output_overlap: of the row and the column spaces, 0 to 1; of the leading 32 directions where
            there are no factors.
        sign_conflict: share of entries that two tasks push in opposite ways, on a sample of rows; chance is 0.5.
        cross_talk: of the input factors, 0 if each task reads what the others do not.
        rotation_defect: largest ``||Q Q^T - I||_F`` of the blocks of a rotation.
        base_norm: of the weight itself.
    """

    task_norms: Numbers
    ranks: list[int | None]
    spectra: list[list[float]]
    captured: Numbers
    cosine: Matrix
    input_overlap: Matrix
    output_overlap: Matrix
    sign_conflict: Matrix
    cross_talk: Matrix
    rotation_defect: Numbers
    base_norm: float | None = None
    merged: MergeDiagnostics | None = field(default=None)

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> WeightDiagnostics:
        """Return what `dataclasses.asdict` made plain."""
        merged = told.get("merged")
        return cls(**{**told, "merged": None if merged is None else MergeDiagnostics(**merged)})

    def scaled(self, scale: float) -> WeightDiagnostics:
        """Return the numbers after the merged delta was multiplied by ``scale``."""
        return self if self.merged is None else replace(self, merged=self.merged.scaled(scale))


MATRICES = ("cosine", "input_overlap", "output_overlap", "sign_conflict", "cross_talk")


@torch.no_grad()
def diagnose(
    deltas: Sequence[Delta | None],
    weights: Sequence[float] | Tensor,
    merged: Delta | None,
    base: Tensor | None,
    generator: torch.Generator,
    dtype: torch.dtype | None = None,
) -> WeightDiagnostics:
    """Return the numbers of one weight; two passes over factors, never an SVD of an (m, n) matrix.

    Args:
        deltas: (m, n) each, None for a task that does not change the weight.
        weights: one number per task.
        merged: (m, n), or None before a merge.
        base: the (m, n) weight in float32 or more, for the sizes and the rounding error.
        generator: of the sampled rows and of the range finder.
        dtype: what base + delta will be stored in; without it there is no rounding error.

    Raises:
        ValueError: no task changes the weight, or the numbers of weights and deltas differ.
    """
    numbers = torch.as_tensor(weights, dtype=torch.float64)
    places = [i for i, delta in enumerate(deltas) if delta is not None]
    tasks = [delta.upcast() for delta in deltas if delta is not None]
    if not tasks or len(numbers) != len(deltas):
        raise ValueError(f"expected a weight for each of the deltas, got {len(numbers)} for {len(places)} deltas")
    bases = Bases([measures.leading(task, generator) for task in tasks])
    ranges = measures.sample_rows(*tasks[0].shape, generator)
    gram = _products(tasks, bases, merged)  # (T, T), or (T + 1, T) with the merged delta last
    spread = _Spread(len(deltas), places)
    told = _of_tasks(tasks, bases, gram[: len(tasks)], ranges, spread)
    told.base_norm = None if base is None else _plain(float(frobenius_norm(base)))
    if merged is not None:
        told.merged = _of_merge(merged, gram, numbers[places], spread, generator)
        if base is not None and dtype is not None:
            weight = torch.cat([base[start:stop] for start, stop in ranges])
            told.merged.rounding_error = _plain(
                measures.rounding_error(weight, measures.rows_of(merged, ranges), dtype)
            )
    return told


def _of_tasks(
    tasks: Sequence[Delta], bases: Bases, gram: Tensor, ranges: Sequence[tuple[int, int]], spread: _Spread
) -> WeightDiagnostics:
    norms = gram.diagonal().sqrt()
    inputs, outputs = bases.overlaps()
    values = [task.s[:LEADING].double() for task in bases.tasks]
    held = torch.stack([(s**2).sum() for s in values]).cpu() / norms**2
    return WeightDiagnostics(
        task_norms=spread.numbers(norms),
        ranks=spread.over([task.rank for task in bases.tasks], None),
        spectra=spread.over([[_plain(v) or 0.0 for v in s.tolist()] for s in values], []),
        captured=spread.numbers(held.clamp(max=1)),
        cosine=spread.matrix(gram / (norms[:, None] * norms)),
        input_overlap=spread.matrix(inputs),
        output_overlap=spread.matrix(outputs),
        sign_conflict=spread.matrix(measures.sign_conflicts([measures.rows_of(task, ranges) for task in tasks])),
        cross_talk=spread.matrix(_cross_talk(tasks)),
        rotation_defect=spread.over([_plain(measures.rotation_defect(task)) for task in tasks], None),
    )


def _of_merge(
    merged: Delta, gram: Tensor, weights: Tensor, spread: _Spread, generator: torch.Generator
) -> MergeDiagnostics:
    values, rank = measures.spectrum(merged, generator)
    tasks = gram.shape[1]
    own = gram.diagonal()[:tasks]
    others = weights @ gram[:tasks] - weights * own
    norm = merged.norm() if merged.rank() is None else torch.linalg.vector_norm(values)
    return MergeDiagnostics(
        norm=_plain(float(norm)),
        rank=rank,
        spectrum=[_plain(v) or 0.0 for v in values[:LEADING].tolist()],
        survival=spread.numbers(gram[tasks] / own),
        interference=spread.numbers(others / own),
        rounding_error=None,
    )


def _products(tasks: Sequence[Delta], bases: Bases, merged: Delta | None) -> Tensor:
    """Return the inner products of the tasks, a row each, and a last row of those with the merged delta."""
    if all(task.rank() is not None for task in tasks):
        rows = [bases.products()] if merged is None else [bases.products(), bases.products_with(merged)[None]]
        return torch.cat(rows).cpu()
    every = [*tasks] if merged is None else [*tasks, merged.upcast()]
    return measures.products_by_rows(every)[:, : len(tasks)]


def _cross_talk(tasks: Sequence[Delta]) -> Tensor:
    """Return the cross-talk of the tasks with factors, NaN for the others."""
    whole = torch.full((len(tasks), len(tasks)), torch.nan, dtype=torch.float64)
    own = {i: factors[1] for i, task in enumerate(tasks) if (factors := task.factors()) is not None}
    if own:
        places = torch.tensor(list(own))
        whole[places[:, None], places] = measures.cross_talk(list(own.values())).cpu()
    return whole


class _Spread:
    """Puts the numbers of the tasks that change the weight at their places among all tasks."""

    def __init__(self, tasks: int, places: Sequence[int]) -> None:
        self._tasks, self._places = tasks, places

    def over(self, values: Sequence[V], missing: V) -> list[V]:
        found = dict(zip(self._places, values, strict=True))
        return [found.get(i, missing) for i in range(self._tasks)]

    def numbers(self, values: Tensor) -> Numbers:
        return self.over([_plain(value) for value in values.tolist()], None)

    def matrix(self, values: Tensor) -> Matrix:
        return self.over([self.numbers(row) for row in values], [None] * self._tasks)


def _plain(value: float) -> float | None:
    """Return six digits of a number, None for NaN and Inf, which JSON does not have."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def combined(weights: Iterable[WeightDiagnostics]) -> WeightDiagnostics | None:
    """Return the same of all weights together: norms add up, the rest is averaged by them, defects are the largest.

    A matrix entry is weighted by ``||D_i|| ||D_j||``, survival and interference by ``||D_t||^2``, which makes them
    those of the whole model's delta. Spectra and ranks stay empty. None without weights.
    """
    each = list(weights)
    if not each:
        return None
    tasks = len(each[0].task_norms)
    norms = [[one.task_norms[t] or 0.0 for one in each] for t in range(tasks)]

    def pairs(name: str) -> Matrix:
        return [
            [
                _mean(
                    [getattr(one, name)[i][j] for one in each], [a * b for a, b in zip(norms[i], norms[j], strict=True)]
                )
                for j in range(tasks)
            ]
            for i in range(tasks)
        ]

    return WeightDiagnostics(
        task_norms=[_plain(math.hypot(*of_task)) for of_task in norms],
        ranks=[None] * tasks,
        spectra=[[]] * tasks,
        captured=[_mean([one.captured[t] for one in each], [v**2 for v in norms[t]]) for t in range(tasks)],
        **{name: pairs(name) for name in MATRICES},
        rotation_defect=[_largest(one.rotation_defect[t] for one in each) for t in range(tasks)],
        base_norm=_plain(math.hypot(*(one.base_norm or 0.0 for one in each))),
        merged=_combined_merges(each, norms),
    )


def pair_mean(matrix: Sequence[Sequence[float | None]]) -> float | None:
    """Return the mean over the pairs of different tasks, None without any."""
    known = [value for i, row in enumerate(matrix) for value in row[:i] if value is not None]
    return sum(known) / len(known) if known else None


def _combined_merges(each: Sequence[WeightDiagnostics], norms: Sequence[Sequence[float]]) -> MergeDiagnostics | None:
    merges = [one.merged for one in each if one.merged is not None]
    if len(merges) < len(each):
        return None
    sizes = [merge.norm or 0.0 for merge in merges]
    squares = [[norm**2 for norm in of_task] for of_task in norms]
    lost = [merge.rounding_error**2 if merge.rounding_error is not None else None for merge in merges]
    rounding = _mean(lost, [size**2 for size in sizes])
    return MergeDiagnostics(
        norm=_plain(math.hypot(*sizes)),
        rank=None,
        spectrum=[],
        survival=[_mean([merge.survival[t] for merge in merges], of_task) for t, of_task in enumerate(squares)],
        interference=[_mean([merge.interference[t] for merge in merges], of_task) for t, of_task in enumerate(squares)],
        rounding_error=None if rounding is None else _plain(math.sqrt(rounding)),
    )


def _mean(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    total = sum(weight for _, weight in known)
    return _plain(sum(value * weight for value, weight in known) / total) if total > 0 else None


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
