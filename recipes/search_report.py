"""What a search of merges found: objectives, the front between tasks, search.json, search.html and a merge to run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from orthoft.merging.reports.page import Page, Section, Table
from orthoft.merging.reports.pictures import COLOURS, NOTHING, legend, number
from orthoft.merging.statistics import STATISTICS_OF
from orthoft.recipes.merge_job import job
from orthoft.recipes.schema import Objective
from orthoft.recipes.table import Metrics, Scores, aligned, gains, mean_gain
from orthoft.recipes.task_schema import LOWER_IS_BETTER

BASE, MERGE = "base", "merge"
RESULT, PAGE, JOB = "search.json", "search.html", "merge.yaml"
MOST_PAIRS = 6  # pictures of two tasks
SIZE = (320, 220, 44, 30)  # of a picture: width, height, and the room for numbers at the left and below


@dataclass(frozen=True)
class Trial:
    """One merge that was tried: its words, its scores by task, its value (higher is better), or why it has none."""

    number: int | None  # None for the recipe's own merge
    words: dict[str, Any]
    scores: dict[str, dict[str, float]]
    value: float | None
    seconds: float
    error: str | None = None

    @property
    def name(self) -> str:
        """How people speak of it."""
        return "the recipe's merge" if self.number is None else f"trial {self.number}"


@dataclass(frozen=True)
class Found:
    """All that a search knows: of what, the scores of base and experts, the trials, the best, and its test scores."""

    recipe: str
    base: str
    seed: int  # of methods that draw
    dtype: str | None  # of the export
    experts: dict[str, str]  # task: folder
    others: dict[str, str]  # name: folder, of what is merged beside them
    metrics: Metrics
    aim: dict[str, Any]
    tuning: Scores
    own: Trial | None
    trials: list[Trial]
    best: Trial
    test: Scores
    statistics: dict[str, dict[str, str]]  # kind: task: file
    notes: list[str]
    versions: dict[str, str]

    @property
    def tasks(self) -> list[str]:
        """The tasks in the recipe's order."""
        return list(self.experts)

    def by_task(self, trial: Trial) -> dict[str, float | None]:
        """Return the objective of a trial by task."""
        return by_task({**self.tuning, MERGE: trial.scores}, self.metrics, self.aim["objective"])

    def front(self) -> list[Trial]:
        """Return the trials, the recipe's own merge among them, that no other beats on all tasks."""
        tried = [trial for trial in (self.own, *self.trials) if trial is not None and trial.value is not None]
        points = [[v for v in self.by_task(trial).values() if v is not None] for trial in tried]
        return [trial for trial, point in zip(tried, points, strict=True) if not any(beats(p, point) for p in points)]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        told = {
            **asdict(self),
            "own": self.own and asdict(self.own),
            "best": self.best.number,
            "merge": self.best.words,
        }
        told["best"] = "recipe" if self.best.number is None else self.best.number
        kept = {"tuning": {**self.tuning, MERGE: self.best.scores}, "test": self.test}
        told["gain_kept"] = {split: gains(scores, self.metrics) for split, scores in kept.items()}
        return told | {"front": [trial.number for trial in self.front()]}

    def job(self, output: Path) -> dict[str, Any]:
        """Return the best merge as ``orthoft merge`` reads it."""
        files = self.statistics.get(STATISTICS_OF.get(self.best.words["method"], ""))
        return job(self.base, {**self.experts, **self.others}, self.best.words, output, self.seed, self.dtype, files)

    def save(self, folder: Path) -> None:
        """Write ``search.json``, ``search.html`` and ``merge.yaml``."""
        (folder / RESULT).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        (folder / PAGE).write_text(html(self), encoding="utf-8")
        (folder / JOB).write_text(yaml.safe_dump(self.job(folder / "merged"), sort_keys=False), encoding="utf-8")

    def _repr_html_(self) -> str:
        return fragment(self)

    def table(self) -> str:
        """Return the gain kept by the best merge, by task, on both splits, as text."""
        kept = self.to_dict()["gain_kept"]
        rows = [["gain kept", *self.tasks, "mean"]]
        for split, values in kept.items():
            rows.append([split, *("-" if value is None else f"{value:.0%}" for value in values.values())])
        return aligned(rows)


def by_task(scores: Scores, metrics: Metrics, objective: Objective) -> dict[str, float | None]:
    """Return what is to be large, by task: the gain kept (None without a gain), the score, or the negative loss."""
    if objective == "gain":
        kept = gains(scores, metrics, MERGE)
        return {task: kept[task] for task in metrics}
    wanted = metrics if objective == "score" else dict.fromkeys(metrics, "loss")
    sign = {task: -1 if metric in LOWER_IS_BETTER else 1 for task, metric in wanted.items()}
    return {task: sign[task] * scores[MERGE][task][metric] for task, metric in wanted.items()}


def value(scores: Scores, metrics: Metrics, objective: Objective) -> float:
    """Return the mean over the tasks of what is to be large; of the gain kept, see `orthoft.recipes.table.mean_gain`.

    Raises:
        ValueError: it is not a number, as the loss of a model that broke, or the experts gain nothing.
    """
    if objective == "gain":
        mean = mean_gain(scores, metrics, MERGE)
    else:
        known = [one for one in by_task(scores, metrics, objective).values() if one is not None]
        mean = sum(known) / len(known)
    if mean is None:
        raise ValueError("no expert beats the base on its tuning split, so there is no gain to keep: take 'score'")
    if not math.isfinite(mean):
        raise ValueError(f"the {objective} of this merge is {mean}")
    return mean


def thin(scores: Scores, rows: Mapping[str, int], metrics: Metrics) -> list[str]:
    """Return a line for each task whose expert gains a share less than ``1/sqrt(rows)``, two standard errors or so."""
    shares = {task: metric for task, metric in metrics.items() if metric not in LOWER_IS_BETTER}
    found = {task: scores[task][task][metric] - scores[BASE][task][metric] for task, metric in shares.items()}
    return [
        f"{task}: its expert gains {gain:.3f} on {rows[task]} tuning rows, its own share is mostly noise: "
        "look at the mean, or take more rows"
        for task, gain in found.items()
        if 0 < gain < rows[task] ** -0.5
    ]


def beats(one: Sequence[float], other: Sequence[float]) -> bool:
    """Say whether ``one`` is nowhere below ``other`` and somewhere above."""
    return all(a >= b for a, b in zip(one, other, strict=True)) and any(a > b for a, b in zip(one, other, strict=True))


def call(words: Mapping[str, Any]) -> str:
    """Return a merge as people write it."""
    more = {key: one for key, one in words.items() if key not in ("method", "params")} | words.get("params", {})
    return f"{words['method']}({', '.join(f'{key}={one}' for key, one in more.items())})"


def html(found: Found) -> str:
    """Return the page of a search, which loads nothing from anywhere."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(_title(found))}</title></head>'
        f"<body>{fragment(found)}</body></html>\n"
    )


def _title(found: Found) -> str:
    return f"Search of a merge for {found.recipe}"


def fragment(found: Found) -> str:
    """Return what the page shows, to stand in another page."""
    best, objective = found.best, found.aim["objective"]
    kept = found.to_dict()["gain_kept"]
    facts = [
        ("best", f"{best.name}: {call(best.words)}"),
        (f"mean {objective}", number(best.value)),
        *((f"gain kept, {split}", ", ".join(f"{k} {number(v)}" for k, v in kept[split].items())) for split in kept),
        ("trials", str(len(found.trials))),
        *(("note", note) for note in found.notes),
    ]
    page = Page(_title(found), "", facts, {}, [_progress(found), _tradeoffs(found)], Table((), []))
    return page.fragment() + _listed(found)


def _progress(found: Found) -> Section:
    tried = [(trial, trial.value) for trial in found.trials if trial.value is not None]
    methods = list(dict.fromkeys(trial.words["method"] for trial, _ in tried))
    points = [
        Point(float(trial.number or 0), y, trial, trial is found.best, methods.index(trial.words["method"]) % COLOURS)
        for trial, y in tried
    ]
    picture = scatter(points, "trial", f"mean {found.aim['objective']}")
    return Section("Trial by trial", "", f'{legend(methods)}<div class="few">{picture}</div>')


def _tradeoffs(found: Found) -> Section:
    front = {trial.number for trial in found.front()}
    tried = [trial for trial in (found.own, *found.trials) if trial is not None and trial.value is not None]
    drawn = []
    for x, y in list(combinations(found.tasks, 2))[:MOST_PAIRS]:
        both = [(values[x], values[y], trial) for trial in tried for values in [found.by_task(trial)]]
        points = [Point(a, b, t, t.number in front, 0) for a, b, t in both if a is not None and b is not None]
        drawn.append(scatter(points, x, y))
    return Section(
        "Between the tasks: full points are the Pareto front", "", f'<div class="few">{"".join(drawn)}</div>'
    )


def _listed(found: Found) -> str:
    front = {trial.number for trial in found.front()}
    lines = [trial for trial in (found.own, *found.trials) if trial is not None]
    rows = "".join(
        f"<tr><td>{escape(trial.name)}</td><td>{number(trial.value)}</td>"
        + "".join(f"<td>{number(one)}</td>" for one in _values(found, trial))
        + f"<td>{'front' if trial.number in front else NOTHING}</td>"
        f"<td>{escape(trial.error or call(trial.words))}</td></tr>"
        for trial in sorted(lines, key=lambda trial: -math.inf if trial.value is None else trial.value, reverse=True)
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", "mean", *found.tasks, "", "merge"))
    return (
        f'<div class="orthoft"><h3>All trials</h3><div class="wide"><table class="weights">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></div>"
    )


def _values(found: Found, trial: Trial) -> list[float | None]:
    return [None] * len(found.tasks) if trial.value is None else list(found.by_task(trial).values())


@dataclass(frozen=True)
class Point:
    """A trial in a picture."""

    x: float
    y: float
    trial: Trial
    full: bool
    colour: int


def scatter(points: Sequence[Point], across: str, up: str) -> str:
    """Return points on two axes as SVG; a point says on hover what it is."""
    width, height, left, below = SIZE
    (x0, x1), (y0, y1) = _span([p.x for p in points]), _span([p.y for p in points])
    dots = "".join(
        f'<circle cx="{left + (p.x - x0) / (x1 - x0) * (width - left - 10):.1f}" '
        f'cy="{height - below - (p.y - y0) / (y1 - y0) * (height - below - 10):.1f}" r="4" stroke="var(--c{p.colour})" '
        f'fill="{f"var(--c{p.colour})" if p.full else "none"}">'
        f"<title>{escape(p.trial.name)}: {escape(call(p.trial.words))}</title></circle>"
        for p in points
    )
    ends = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'
        for x, y, anchor, text in (
            (left, height - below + 14, "start", number(x0)),
            (width - 10, height - below + 14, "end", number(x1)),
            (left - 4, height - below, "end", number(y0)),
            (left - 4, 14, "end", number(y1)),
        )
    )
    axes = f'<path class="grid" fill="none" d="M{left} 10V{height - below}H{width - 10}"/>'
    title = escape(f"{up} (up) against {across}")
    return (
        f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{title}">{axes}{ends}{dots}</svg></figure>'
    )


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low - 0.5, low + 0.5)
