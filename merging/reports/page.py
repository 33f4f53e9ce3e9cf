"""One self-contained page of what tasks do to a model, and of what their merge keeps of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from orthoft.merging.files.writer import write_text
from orthoft.merging.reports.diagnostics import (
    MATRICES,
    Matrix,
    MergeDiagnostics,
    WeightDiagnostics,
    combined,
    pair_mean,
)
from orthoft.merging.reports.pictures import NOTHING, Bar, bars, curves, grid, heat_map, legend, number

Weights = Mapping[str, WeightDiagnostics]
MOST_LINES = 1000  # of the table: a page stays a page
MOST_SPECTRA = 9
NARROW = 8  # columns
SHOWN = 0.005  # smaller numbers are 0.00 in a picture
CHANCE = 0.5  # of a sign conflict
MERGED = "merged"

MATRIX_WORDS = {
    "cosine": (
        "Cosine",
        "Of the angle between two changes: 0 is unrelated, 1 the same direction, -1 the opposite one.",
    ),
    "input_overlap": (
        "Input overlap",
        "How much of what one task reads the other reads too: 0 nothing, 1 all. Where it is near 0, a sum is safe.",
    ),
    "output_overlap": (
        "Output overlap",
        "The same for what the tasks write. Rotations of one weight overlap here, as all write where the weight does.",
    ),
    "sign_conflict": (
        "Sign conflict",
        "The share of entries that two tasks push in opposite ways. Half, without colour, is chance; blue is a "
        "quarrel, orange agreement.",
    ),
    "cross_talk": (
        "Cross-talk",
        "How far the input factors of two tasks are from orthogonal (Orthogonal Adaptation): at 0 the sum keeps both. "
        "Compare with the diagonal. Tasks without low-rank factors are left blank.",
    ),
}


@dataclass(frozen=True)
class Section:
    """A picture, its title and how to read it."""

    title: str
    text: str
    html: str
    narrow: bool = False  # two of them fit side by side


@dataclass(frozen=True)
class Table:
    """One line a weight."""

    headers: Sequence[str]
    lines: Sequence[Sequence[str]]

    def known(self) -> Table:
        """Return the table without columns that hold nothing but dashes."""
        kept = [i for i in range(len(self.headers)) if any(line[i] != NOTHING for line in self.lines)]
        return Table([self.headers[i] for i in kept], [[line[i] for i in kept] for line in self.lines])


@dataclass(frozen=True)
class Page:
    """All that stands on a page, from top to bottom."""

    title: str
    lead: str
    facts: Sequence[tuple[str, str]]
    lists: Mapping[str, Sequence[str]]
    sections: Sequence[Section]
    table: Table
    words: str = field(default="Click a heading to sort.")

    def html(self) -> str:
        """Return the page, which loads nothing from anywhere."""
        table = self.table.known()
        left = len(table.lines) - MOST_LINES
        words = self.words + (f" {left} more weights are in the JSON beside this page." if left > 0 else "")
        lines = table.lines[:MOST_LINES]
        style = _template("report.css")
        html: str = _compiled().render(page=self, headers=table.headers, words=words, lines=lines, style=style)
        return html

    def save(self, file: str | Path) -> None:
        """Write the page to a file."""
        write_text(Path(file), self.html())

    def fragment(self) -> str:
        """Return the facts and the first pictures, for a notebook."""
        facts = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in self.facts)
        shown = "".join(f"<h3>{escape(section.title)}</h3>{section.html}" for section in self.sections[:2])
        return (
            f'<style>{_template("report.css")}</style><div class="orthoft"><h2>{escape(self.title)}</h2>'
            f'<table class="facts"><tbody>{facts}</tbody></table>{shown}</div>'
        )


@cache
def _compiled() -> Any:
    """Return the template of the page: jinja2 takes longer to compile it than to fill it in."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_template("report.html.j2"))


def _template(name: str) -> str:
    return (files("orthoft.merging.reports") / "templates" / name).read_text(encoding="utf-8")


def sections(tasks: Sequence[str], weights: Weights) -> list[Section]:
    """Return the pictures of a merge, or of its sources where there is no merged delta; none without weights."""
    whole = combined(weights.values())
    if whole is None:
        return []
    made = [_matrices(tasks, whole)] if len(tasks) > 1 else []
    if whole.merged is not None:
        made = [_survival(tasks, whole.merged), *made, *_of_merge(tasks, weights)]
    return [*made, *_of_tasks(tasks, weights), _spectra(tasks, weights)]


def _survival(tasks: Sequence[str], merged: MergeDiagnostics) -> Section:
    lines = [
        Bar(name, kept or 0.0, other or 0.0, f"{number(kept)}; others in a sum {number(other)}")
        for name, kept, other in zip(tasks, merged.survival, merged.interference, strict=True)
    ]
    text = (
        "The bar is the part of a task's change that the merged change holds, along the task's own direction; the "
        "line marks all of it. The thin bar is what a plain sum would get there from the other tasks, not from its own."
    )
    return Section("How much of each task survives", text, bars(lines))


def _matrices(tasks: Sequence[str], whole: WeightDiagnostics) -> Section:
    parts = []
    for name in MATRICES:
        values: Matrix = getattr(whole, name)
        if any(value is not None for row in values for value in row):
            title, words = MATRIX_WORDS[name]
            picture = heat_map(tasks, tasks, values, top=1.0, middle=CHANCE if name == "sign_conflict" else 0.0)
            parts.append(f'<div><h3>{title}</h3><p class="how">{words}</p>{picture}</div>')
    text = (
        "Each square compares two tasks over all weights, larger changes counting more. The diagonal compares a task "
        "with itself."
    )
    return Section("How the tasks stand to each other", text, f'<div class="few matrices">{"".join(parts)}</div>')


def _of_merge(tasks: Sequence[str], weights: Weights) -> list[Section]:
    merges = {name: weight.merged for name, weight in weights.items() if weight.merged is not None}
    made = [
        _by_module(
            "Where the merge changes the model",
            "The norm of the merged change, relative to the weight it changes. Strong colour is where the merged "
            "model differs most from the base.",
            {name: _ratio(merge.norm, weights[name].base_norm) for name, merge in merges.items()},
        ),
        _by_task(
            "Survival by layer",
            "What survives of each task, by layer: 1 is a task held whole, 0 one that is lost, orange one reversed.",
            tasks,
            {name: merge.survival for name, merge in merges.items()},
            top=1.0,
        ),
        _by_module(
            "Interference",
            "What the other tasks add to a task in a plain sum (blue) or take from it (orange), as a share of its own "
            "size; that of the task most affected. Near 0 a sum will do.",
            {name: _largest(merge.interference) for name, merge in merges.items()},
            top=1.0,
        ),
    ]
    lost = {name: merge.rounding_error for name, merge in merges.items()}
    if max((error for error in lost.values() if error is not None), default=0.0) >= SHOWN:
        text = (
            "What storing the merged weights loses, relative to the change itself. Near 1 the change is smaller than "
            "the steps of the dtype: store such a model in float32."
        )
        made.append(_by_module("Rounding", text, lost, top=1.0))
    return made


def _of_tasks(tasks: Sequence[str], weights: Weights) -> list[Section]:
    made = [
        _by_task(
            "Size of the tasks by layer",
            "The norm of each task's change, relative to the weight. A task that is much stronger than the others "
            "outweighs them in a sum.",
            tasks,
            {name: [_ratio(norm, weight.base_norm) for norm in weight.task_norms] for name, weight in weights.items()},
        )
    ]
    if len(tasks) > 1:
        made.append(
            _by_module(
                "Sign conflict by layer",
                "The mean share of entries that two tasks push in opposite ways. Half, without colour, is chance.",
                {name: pair_mean(weight.sign_conflict) for name, weight in weights.items()},
                top=1.0,
                middle=CHANCE,
            )
        )
        made.append(
            _by_module(
                "Input overlap by layer",
                "The mean share of what two tasks both read.",
                {name: pair_mean(weight.input_overlap) for name, weight in weights.items()},
                top=1.0,
            )
        )
    return made


def _spectra(tasks: Sequence[str], weights: Weights) -> Section:
    def size(name: str) -> float:
        return max((norm for norm in weights[name].task_norms if norm is not None), default=0.0)

    place, chosen = grid(list(weights)).place, dict[int, list[str]]()
    for name in sorted(weights, key=size, reverse=True):
        chosen.setdefault(place[name][1], []).append(name)
    rounds = [names[i] for i in range(MOST_SPECTRA) for names in chosen.values() if i < len(names)]
    merged = any(weight.merged for weight in weights.values())
    drawn = []
    for name in rounds[:MOST_SPECTRA]:
        weight = weights[name]
        lines = dict(zip(tasks, weight.spectra, strict=True))
        if weight.merged is not None:
            lines[MERGED] = weight.merged.spectrum
        drawn.append(curves(name, lines, strong=MERGED))
    text = (
        "The largest singular values, first to 32nd, on a logarithmic axis, of the weights that change most in each "
        "kind of module. A steep curve has few important directions; one that breaks off has no more."
    )
    head = legend(tasks, MERGED if merged else None)
    return Section(
        "Spectra" + (" before and after" if merged else ""), text, f'{head}<div class="few">{"".join(drawn)}</div>'
    )


def _by_module(
    title: str, text: str, values: Mapping[str, float | None], top: float = 0.0, middle: float = 0.0
) -> Section:
    where = grid(list(values))
    picture = heat_map(where.rows, where.columns, where.cells(values), corner="layer", top=top, middle=middle)
    return Section(title, text, picture, narrow=len(where.columns) <= NARROW)


def _by_task(
    title: str, text: str, tasks: Sequence[str], values: Mapping[str, Sequence[float | None]], top: float = 0.0
) -> Section:
    where = grid(list(values))
    of_task: Callable[[int], list[list[float | None]]] = lambda t: where.cells(  # noqa: E731
        {name: each[t] for name, each in values.items()}
    )
    columns = [[_mean(row) for row in of_task(t)] for t in range(len(tasks))]
    cells = [list(row) for row in zip(*columns, strict=True)]
    picture = heat_map(where.rows, tasks, cells, corner="layer", top=top)
    return Section(title, text, picture, narrow=len(tasks) <= NARROW)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _largest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), key=abs, default=None)


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole
