"""The figures of the results, small PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.results.report import Measured


def draw(suites: Sequence[Measured], folder: Path) -> None:
    """Draw experts against merges, and the merges of each row, of every suite that has some."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for measured in suites:
        if measured.rows:
            _experts_and_sums(measured, folder / f"{measured.suite.name}-experts.png")
        if rows := [row for row in measured.rows if len(measured.merges(row)) > 2]:
            _merges(measured, rows, folder / f"{measured.suite.name}-merges.png")


def _spread(values: Sequence[float]) -> float:
    """Return the standard deviation, 0 of one value."""
    return stdev(values) if len(values) > 1 else 0.0


def _legend(axes: Any) -> None:
    """Put the legend above the axes, where it hides nothing."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncol=3, fontsize="small")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=80, bbox_inches="tight", metadata={"Software": ""})


def _experts_and_sums(measured: Measured, path: Path) -> None:
    """Each row's experts, and below them the sum of their deltas."""
    from matplotlib.figure import Figure

    rows = measured.rows[::-1]
    figure = Figure(figsize=(7, 0.4 * len(rows) + 1))
    axes = figure.subplots()
    for place, row in enumerate(rows):
        plain = measured.merges(row).get("task_arithmetic/auto")
        points = {
            "experts": ("o", "C0", measured.experts(row)),
            "their sum": ("s", "C1", plain.scores if plain else []),
        }
        for label, (mark, color, values) in points.items():
            if values:
                told = {"fmt": mark, "color": color, "label": None if place else label}
                axes.errorbar(mean(values), place, xerr=_spread(values), **told)
    axes.axvline(mean(measured.base().values()), color="grey", linestyle=":", label="frozen base")
    axes.set_yticks(range(len(rows)), [measured.suite.rows[row].title for row in rows])
    axes.set_xlabel(f"mean {measured.metric} on test rows")
    _legend(axes)
    _save(figure, path)


def _merges(measured: Measured, rows: Sequence[str], path: Path) -> None:
    """The gain that each merge keeps, one colour a row."""
    from matplotlib.figure import Figure

    found = {row: measured.merges(row) for row in rows}
    names = list(dict.fromkeys(name for row in rows for name in found[row]))[::-1]
    figure = Figure(figsize=(7, 0.25 * len(names) + 1))
    axes = figure.subplots()
    for row in rows:
        places = [place for place, name in enumerate(names) if name in found[row]]
        kept = [found[row][names[place]].kept for place in places]
        errors = [_spread(values) for values in kept]
        axes.errorbar([*map(mean, kept)], places, xerr=errors, fmt="o", label=measured.suite.rows[row].title)
    axes.set_yticks(range(len(names)), [name.removesuffix("/auto") for name in names])
    axes.axvline(0, color="grey", linestyle=":")
    axes.set_xlabel("gain kept")
    _legend(axes)
    _save(figure, path)
