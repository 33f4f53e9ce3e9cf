"""What came out, as one table: base, experts and merge per task, and how much of the experts' gain the merge keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from orthoft.recipes.task_schema import LOWER_IS_BETTER

Rows = Sequence[Sequence[str]]
Scores = Mapping[str, Mapping[str, Mapping[str, float]]]  # row: task: metric: value
MERGED = ("merge", "merge-refit", "merge-lora")  # rows of a run that has a merge
Metrics = Mapping[str, str]  # task: the metric that counts


def gain_kept(base: float, expert: float, merged: float, higher_is_better: bool) -> float | None:
    """Return ``(merged - base) / (expert - base)``, for scores and losses alike; None without a gain."""
    gain = expert - base if higher_is_better else base - expert
    return (merged - base) / (expert - base) if gain > 0 else None


def gains(scores: Scores, metrics: Metrics, row: str = "merge") -> dict[str, float | None]:
    """Return the share of its expert's gain that ``row`` keeps on each task, and `mean_gain` of them all."""

    def kept(task: str, metric: str) -> float | None:
        base, expert, merged = (scores[name][task][metric] for name in ("base", task, row))
        return gain_kept(base, expert, merged, metric not in LOWER_IS_BETTER)

    by_task = {task: kept(task, metric) for task, metric in metrics.items()}
    return by_task | {"mean": mean_gain(scores, metrics, row)}


def mean_gain(scores: Scores, metrics: Metrics, row: str) -> float | None:
    """Return ``sum_t (merged - base) / sum_t (expert - base)``, the share of the experts' whole gain that is kept.

    Over the tasks t whose expert gains anything: those of one metric are added up, as one that hardly gains would
    divide by noise alone; of several metrics it is the mean, weighted by their tasks. None without any.
    """
    known: list[float] = []
    for metric in dict.fromkeys(metrics.values()):
        sign = -1 if metric in LOWER_IS_BETTER else 1
        tasks = [task for task in metrics if metrics[task] == metric]
        told = [[sign * scores[name or task][task][metric] for name in ("base", "", row)] for task in tasks]
        gaining = [(base, expert, merged) for base, expert, merged in told if expert > base]
        if gaining:
            base, expert, merged = (sum(column) for column in zip(*gaining, strict=True))
            known += [(merged - base) / (expert - base)] * len(gaining)
    return sum(known) / len(known) if known else None


def table(scores: Scores, metrics: Metrics) -> Table:
    """Return the table as text; ``-`` where a model was not evaluated on a task, or an expert has no gain to keep.

    Tasks with metrics of their own have them in the names of their columns, and no mean but that of the gain kept.
    """
    one = len({*metrics.values()}) == 1
    heads = [task if one else f"{task}, {titled(metric)}" for task, metric in metrics.items()]
    rows = [[titled(next(iter(metrics.values()))) if one else "", *heads, "mean"]]
    for name, by_task in scores.items():
        values = {task: by_task[task][metric] for task, metric in metrics.items() if task in by_task}
        cells = [shown(values.get(task), metric) for task, metric in metrics.items()]
        whole = one and len(values) == len(metrics)
        mean = sum(values.values()) / len(values) if whole else None
        rows.append([name, *cells, shown(mean, next(iter(metrics.values())))])
    for name in [row for row in MERGED if row in scores]:
        kept = gains(scores, metrics, name)
        label = "gain kept" if name == "merge" else f"gain kept, {name}"
        rows.append([label, *("-" if value is None else f"{value:.0%}" for value in kept.values())])
    return aligned(rows)


def titled(metric: str) -> str:
    """Return a metric as the table names it: shares in per cent."""
    return metric if metric in LOWER_IS_BETTER else f"{metric} %"


def shown(value: float | None, metric: str) -> str:
    """Return a score as the table shows it."""
    if value is None:
        return "-"
    return f"{value:.3f}" if metric in LOWER_IS_BETTER else f"{100 * value:.1f}"


def results_table(results: Mapping[str, Any]) -> Table:
    """Return the table of a run by its ``results.json``."""
    return table(results["scores"], metrics_of(results))


def metrics_of(results: Mapping[str, Any]) -> Metrics:
    """Return the metric that counts of each task of a run, by its ``results.json``."""
    return {task["name"]: task["metric"] for task in results["recipe"]["tasks"] if task["name"] in results["experts"]}


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
