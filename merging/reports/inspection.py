"""What some sources would do to each other, measured before a merge, and what follows for the choice of a method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthoft.delta import Delta
from orthoft.linalg import at_least_float32
from orthoft.merging.deltas import task_deltas
from orthoft.merging.files.tensors import as_matrix, matrix_shape
from orthoft.merging.plan import PathLike, Sources, plan
from orthoft.merging.reports.advice import Advice, advise, findings
from orthoft.merging.reports.diagnostics import MATRICES, WeightDiagnostics, combined, diagnose, pair_mean
from orthoft.merging.reports.measures import rotation_blocks, rounding_error, rows_of, sample_rows
from orthoft.merging.reports.page import MATRIX_WORDS, Page, Table, sections
from orthoft.merging.reports.pictures import NOTHING, number
from orthoft.merging.reports.report import shown, write_report
from orthoft.merging.weightwise import weight_generator

HEADERS = (
    "weight",
    "shape",
    "ranks",
    "norms",
    "largest / weight",
    "cosine",
    "input overlap",
    "output overlap",
    "sign conflict",
)


@dataclass(frozen=True)
class InspectedWeight:
    """One weight that a source changes."""

    name: str
    shape: tuple[int, ...]
    diagnostics: WeightDiagnostics


@dataclass(frozen=True)
class InspectReport:
    """What was measured of some sources of one base, and what follows; prints as text."""

    base: str
    sources: dict[str, str]  # name: kind
    weights: list[InspectedWeight]
    advice: list[Advice]
    notes: list[str]

    @property
    def totals(self) -> WeightDiagnostics:
        """The diagnostics of all weights together."""
        whole = combined(weight.diagnostics for weight in self.weights)
        assert whole is not None, "a plan has weights"
        return whole

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, the totals included."""
        return {**asdict(self), "totals": asdict(self.totals)}

    def to_json(self, file: str | Path) -> None:
        """Write the report as JSON, a line for each field and each weight."""
        write_report(file, self.to_dict(), "weights")

    def page(self) -> Page:
        """Return the report as a page of pictures."""
        told = {weight.name: weight.diagnostics for weight in self.weights}
        norms = zip(self.sources.items(), self.totals.task_norms, strict=True)
        facts = [
            ("base", self.base),
            *((f"source {name}", f"{kind}, norm {number(norm)}") for (name, kind), norm in norms),
        ]
        about = f"{len(self.sources)} sources that change {len(self.weights)} weights of {self.base}, before any merge."
        lists = {"What this suggests": [_sentence(one) for one in self.advice], "Notes": self.notes}
        table = Table(HEADERS, [_line(weight) for weight in self.weights])
        return Page("Sources side by side", about, facts, lists, sections(list(self.sources), told), table)

    def to_html(self, file: str | Path) -> None:
        """Write the report as one HTML file that loads nothing from anywhere."""
        self.page().save(file)

    def _repr_html_(self) -> str:
        return self.page().fragment()

    def __str__(self) -> str:
        totals, names = self.totals, list(self.sources)
        lines = [f"{len(names)} sources change {len(self.weights)} weights of {self.base}"]
        wide = max(map(len, names))
        for t, (name, kind) in enumerate(self.sources.items()):
            norm, held = totals.task_norms[t], sum(w.diagnostics.task_norms[t] is not None for w in self.weights)
            ranks = sorted({rank for w in self.weights if (rank := w.diagnostics.ranks[t]) is not None})
            told = f", rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else ""
            lines.append(f"  {name:{wide}}  {kind}, {held} weights, norm {number(norm)}{told}")
        for matrix in MATRICES if len(names) > 1 else ():
            if (mean := pair_mean(getattr(totals, matrix))) is not None:
                lines.append(f"  mean {MATRIX_WORDS[matrix][0].lower()}: {number(mean)}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, *(f"advice: {_sentence(one)}" for one in self.advice)])


def inspect_sources(base: PathLike, sources: Sources, *, seed: int = 0, progress: bool = False) -> InspectReport:
    """Measure what sources change of a base, weight by weight, and say which method and space suit them.

    Reads what a merge would read, one weight at a time, and writes nothing. ``seed`` is of the samples.

    Raises:
        FileNotFoundError: a folder or an adapter's file is missing.
        ValueError, TypeError: a wrong value, a corrupt file, an adapter of another base, NaN or Inf.
    """
    from tqdm.auto import tqdm

    todo = plan(base, sources, method="task_arithmetic", seed=seed)
    weights: list[InspectedWeight] = []
    measured: list[tuple[tuple[int, int], WeightDiagnostics]] = []
    turning = True
    dense: dict[str, None] = {}
    lost: list[list[float]] = []
    for name, item in tqdm(todo.merged.items(), desc="inspect", unit="weight", disable=not progress):
        deltas, weight = task_deltas(todo, name, as_matrix(at_least_float32(todo.base[name])))
        told = diagnose(deltas, [1.0] * len(deltas), None, weight, weight_generator(seed, name))
        measured.append((matrix_shape(weight.shape), told))
        weights.append(InspectedWeight(name, item.shape, told))
        if min(weight.shape) > 1:
            turning &= all(delta is not None and rotation_blocks(delta) is not None for delta in deltas)
            whole = [s.name for s, delta in zip(todo.sources, deltas, strict=True) if delta and delta.rank() is None]
            dense |= dict.fromkeys(whole)
        if todo.base.dtype(name) == torch.bfloat16:
            draw = weight_generator(seed, f"{name}#rounding")  # its own: other samples stay as they are
            lost.append(_lost_in_bfloat16(deltas, told.task_norms, weight, draw))
    kinds = {source.name: source.kind for source in todo.sources}
    of_tasks = [math.hypot(*each) for each in zip(*lost, strict=True)]
    found = findings(list(kinds), measured, turning, list(dense), of_tasks)
    return InspectReport(str(base), kinds, weights, advise(found), list(todo.notes))


def _lost_in_bfloat16(
    deltas: Sequence[Delta | None], norms: Sequence[float | None], weight: Tensor, generator: torch.Generator
) -> list[float]:
    """Return ``||round(W + D_t) - (W + D_t)||_F`` of each task, from a sample of rows; 0 where those do not change."""
    m, n = weight.shape
    ranges = sample_rows(m, n, generator)
    rows = torch.cat([weight[start:stop] for start, stop in ranges])
    shares = [0.0 if one is None else rounding_error(rows, rows_of(one, ranges), torch.bfloat16) for one in deltas]
    return [(norm or 0.0) * share if math.isfinite(share) else 0.0 for norm, share in zip(norms, shares, strict=True)]


def _sentence(advice: Advice) -> str:
    method = "whatever the method" if advice.method == "any" else f"method {advice.method}"
    return f"{method}{'' if advice.space == 'auto' else f' in space {advice.space}'}: {advice.why}"


def _line(weight: InspectedWeight) -> list[str]:
    told = weight.diagnostics
    norms = [norm for norm in told.task_norms if norm is not None]
    return [
        weight.name,
        shown(weight.shape),
        " ".join(NOTHING if rank is None else str(rank) for rank in told.ranks),
        " ".join(number(norm) for norm in told.task_norms),
        number(max(norms) / told.base_norm if told.base_norm else None),
        *(number(pair_mean(getattr(told, name))) for name in MATRICES if name != "cross_talk"),
    ]
