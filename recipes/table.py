"""What came out, as one table: base, experts and merge per task, and how much of the experts' gain the merge keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from orthoft.recipes.task_schema import TaskKind

Rows = Sequence[Sequence[str]]
Scores = Mapping[str, Mapping[str, Mapping[str, float]]]  # row: task: metric: value
MERGED = ("merge", "merge-lora")
METRIC: dict[TaskKind, tuple[str, bool]] = {
    "classification": ("accuracy", True),
    "causal-lm": ("loss", False),
    "token-classification": ("f1", True),
    "image-classification": ("accuracy", True),
    "seq2seq": ("loss", False),
}


def gain_kept(base: float, expert: float, merged: float, higher_is_better: bool) -> float | None:
    """Return ``(merged - base) / (expert - base)``, for scores and losses alike; None without a gain."""
    gain = expert - base if higher_is_better else base - expert
    return (merged - base) / (expert - base) if gain > 0 else None


def gains(scores: Scores, tasks: Sequence[str], kind: TaskKind, row: str = "merge") -> dict[str, float | None]:
    """Return the share of its expert's gain that ``row`` keeps on each task, and their mean over tasks with a gain."""
    metric, higher = METRIC[kind]

    def kept(task: str) -> float | None:
        base, expert, merged = (scores[name][task][metric] for name in ("base", task, row))
        return gain_kept(base, expert, merged, higher)

    by_task = {task: kept(task) for task in tasks}
    known = [value for value in by_task.values() if value is not None]
    return by_task | {"mean": sum(known) / len(known) if known else None}


def table(scores: Scores, tasks: Sequence[str], kind: TaskKind) -> Table:
    """Return the table as text; ``-`` where a model was not evaluated on a task, or an expert has no gain to keep."""
    metric, higher = METRIC[kind]
    title, scale, digits = (f"{metric} %", 100.0, 1) if higher else (metric, 1.0, 3)
    rows = [[title, *tasks, "mean"]]
    for name, by_task in scores.items():
        values = [by_task[task][metric] * scale if task in by_task else None for task in tasks]
        known = [value for value in values if value is not None]
        values.append(sum(known) / len(known) if len(known) == len(tasks) else None)
        rows.append([name, *("-" if value is None else f"{value:.{digits}f}" for value in values)])
    for name in [row for row in MERGED if row in scores]:
        kept = gains(scores, tasks, kind, name)
        label = "gain kept" if name == "merge" else f"gain kept, {name}"
        rows.append([label, *("-" if kept[key] is None else f"{kept[key]:.0%}" for key in (*tasks, "mean"))])
    return aligned(rows)


def results_table(results: Mapping[str, Any]) -> Table:
    """Return the table of a run by its ``results.json``."""
    tasks = results["recipe"]["tasks"]
    return table(results["scores"], [task["name"] for task in tasks], tasks[0]["kind"])


class Table(str):
    """A table as plain text, with the ``rows`` it was made of, names of the columns first.

    ``words`` is the number of columns, from the left, that hold words and not numbers; ``notes`` is text under the
    table, which the plain text holds too.
    """

    rows: Rows
    words: int
    notes: str

    def __new__(cls, text: str, rows: Rows, words: int = 1, notes: str = "") -> Self:
        table = super().__new__(cls, text)
        table.rows, table.words, table.notes = rows, words, notes
        return table


def aligned(rows: Rows) -> Table:
    """Return rows as text: the first column to the left, the others to the right, a rule under the first row."""
    widths = [max(len(cell) for cell in cells) for cells in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return Table("\n".join([lines[0], "-" * len(lines[0]), *lines[1:]]), rows)
