"""The tables of `docs/results.md` from the measured numbers, and the figures beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.results.suites import SUITES, Suite

NUMBERS = Path(__file__).parent / "numbers"
BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOTHING = "Not measured yet.\n"
METRIC = {"classification": "accuracy", "causal-lm": "loss"}


@dataclass(frozen=True)
class Merge:
    """A merge of one row by seed: its score on tuning rows at the strength chosen, on test rows, and the gain kept.

    ``refit`` is the gain that it keeps under heads fitted anew, by seed that has it measured.
    """

    name: str
    tuning: list[float]
    scores: list[float]
    kept: list[float]
    refit: list[float]


class Measured:
    """The numbers of one suite."""

    def __init__(self, suite: Suite, folder: Path) -> None:
        self.suite, self.metric = suite, METRIC[suite.kind]
        files = {row: folder / f"{suite.name}.{row}.json" for row in ("base", *suite.rows)}
        self.cells: dict[str, Any] = {
            row: json.loads(file.read_text(encoding="utf-8")) for row, file in files.items() if file.is_file()
        }

    @property
    def rows(self) -> list[str]:
        """The rows with a whole seed, in order."""
        return [row for row in self.suite.rows if row in self.cells and self.seeds(row)]

    def seeds(self, row: str) -> list[str]:
        """The seeds of which every expert is there."""
        done = self.cells[row].get("seeds", {})
        return [seed for seed in sorted(done) if done[seed].get("experts", {}).keys() == self.suite.tasks.keys()]

    def base(self) -> dict[str, float]:
        return {task: scores[self.metric] for task, scores in self.cells["base"]["test"].items()}

    def expert(self, row: str, seed: str, task: str, on: str | None = None) -> float:
        known = self.cells[row]["seeds"][seed]["experts"][task]["test"]
        return float(known[on or task][self.metric])

    def experts(self, row: str) -> list[float]:
        """The mean over tasks, by seed."""
        return [mean(self.expert(row, seed, task) for task in self.suite.tasks) for seed in self.seeds(row)]

    def parameters(self, row: str) -> int:
        return int(self.cells[row]["seeds"][self.seeds(row)[0]]["experts"][next(iter(self.suite.tasks))]["parameters"])

    def rate(self, row: str) -> float:
        """The learning rate that was taken."""
        experts = self.cells[row]["seeds"][self.seeds(row)[0]]["experts"]
        return float(next(iter(experts.values()))["rate"])

    def merges(self, row: str) -> dict[str, Merge]:
        """What was merged and scored, the best first."""
        found: dict[str, Merge] = {}
        base = mean(self.base().values())
        for seed, experts in zip(self.seeds(row), self.experts(row), strict=True):
            for name, one in self.cells[row]["seeds"][seed].get("merges", {}).items():
                if "test" in one:
                    score = mean(one["test"].values())
                    merge = found.setdefault(name, Merge(name, [], [], [], []))
                    merge.tuning.append(one["tuning"][f"{one['scale']:g}"])
                    merge.scores.append(score)
                    merge.kept.append((score - base) / (experts - base))
                    if "refit" in one:
                        merge.refit.append((mean(one["refit"].values()) - base) / (experts - base))
        return dict(sorted(found.items(), key=lambda item: -mean(item[1].kept)))

    def best(self, row: str) -> Merge:
        """The merge that does best on tuning rows, of those measured in every seed of the row."""
        choose = max if self.metric == "accuracy" else min
        return choose(self.compared(row), key=lambda merge: mean(merge.tuning))

    def compared(self, row: str) -> list[Merge]:
        """The merges measured in every seed of the row: others would be compared over other experts."""
        return [merge for merge in self.merges(row).values() if len(merge.scores) == len(self.seeds(row))]

    def forgotten(self, row: str) -> list[float]:
        """By seed, how much worse than the base the experts are on the other tasks, on average."""
        base, tasks = self.base(), list(self.suite.tasks)
        return [
            mean(self.expert(row, seed, task, on) - base[on] for task in tasks for on in tasks if on != task)
            for seed in self.seeds(row)
        ]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return mean and standard deviation, of one value the value alone."""
    told = f"{mean(values):.{digits}f}"
    return told if len(values) < 2 else f"{told} ± {stdev(values):.{digits}f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def adapters(measured: Measured) -> str:
    """Every row: what it trains, its learning rate, its experts on their own tasks."""
    tasks = list(measured.suite.tasks)
    base = measured.base()
    lines = [["frozen base", "", "", "", *(f"{base[task]:.3f}" for task in tasks), f"{mean(base.values()):.3f}"]]
    for row in measured.rows:
        seeds = measured.seeds(row)
        own = [mean(measured.expert(row, seed, task) for seed in seeds) for task in tasks]
        told = [measured.suite.rows[row].title, f"{measured.parameters(row):,}", f"{measured.rate(row):g}"]
        told += [str(len(seeds)), *(f"{value:.3f}" for value in own), spread(measured.experts(row))]
        lines.append(told)
    return markdown(["", "trained", "rate", "seeds", *tasks, "mean"], lines)


def merges(measured: Measured) -> str:
    """Every merge of the rows that were merged in more ways than by their sum: gain kept, and the score."""
    rows = [row for row in measured.rows if len(measured.merges(row)) > 2]
    found = {row: measured.merges(row) for row in rows}
    names = list(dict.fromkeys(name for row in rows for name in found[row]))
    lines = []
    for name in names:
        cells = [kept_and_score(found[row].get(name), len(measured.seeds(row))) for row in rows]
        method, space = name.split("/")
        lines.append([method, space, *cells])
    return markdown(["method", "space", *(measured.suite.rows[row].title for row in rows)], lines)


def kept_and_score(merge: Merge | None, seeds: int) -> str:
    """Return a cell of the table of merges, with the number of seeds where it is not that of the row."""
    if merge is None:
        return ""
    fewer = "" if (count := len(merge.scores)) == seeds else f", {count} of {seeds} seeds"
    return f"{spread(merge.kept, 2)} ({mean(merge.scores):.3f}{fewer})"


def to_merge(measured: Measured) -> str:
    """Trained plainly against trained to merge: the experts, their sum, and the merge that does best on tuning rows."""
    lines = []
    for row in measured.rows:
        found = measured.merges(row)
        if "task_arithmetic/auto" not in found:
            continue
        plain, best = found["task_arithmetic/auto"], measured.best(row)
        told = [measured.suite.rows[row].title, f"{measured.parameters(row):,}", spread(measured.experts(row))]
        told += [spread(plain.scores), spread(plain.kept, 2), spread(plain.refit, 2) if plain.refit else ""]
        choice = len(measured.compared(row))
        told += [f"{best.name}, of {choice}", spread(best.kept, 2)] if choice > 1 else ["", ""]
        lines.append(told)
    heads = ["sum", "gain kept", "heads fitted anew", "merge chosen on tuning rows", "gain kept"]
    return markdown(["", "trained", "experts", *heads], lines)


def forgetting(measured: Measured) -> str:
    """How much worse the experts are on the tasks that they were not trained on."""
    lines = [["frozen base", "", f"{mean(measured.base().values()):.3f}", ""]]
    lines += [
        [
            measured.suite.rows[row].title,
            str(len(measured.seeds(row))),
            spread(measured.experts(row)),
            spread(measured.forgotten(row)),
        ]
        for row in measured.rows
    ]
    return markdown(["", "seeds", "own loss", "rise of the loss on the others"], lines)


TABLES: dict[str, Callable[[Measured], str]] = {
    "adapters": adapters,
    "merges": merges,
    "to-merge": to_merge,
    "forgetting": forgetting,
}


def filled(text: str, numbers: Path = NUMBERS) -> str:
    """Return the page with the tables between its marks, ``<!-- results: SUITE.TABLE -->`` to ``<!-- end -->``.

    Raises:
        KeyError: a mark names another suite or table.
    """

    def table(match: re.Match[str]) -> str:
        suite, name = match[2].split(".")
        measured = Measured(SUITES[suite], numbers)
        told = TABLES[name](measured) if measured.rows else ""
        return f"{match[1]}\n{told if told.count(chr(10)) > 2 else NOTHING}\n{match[3]}"

    return BLOCK.sub(table, text)


def write(page: Path, numbers: Path = NUMBERS) -> None:
    """Fill the page's tables and draw the figures beside it."""
    from benchmarks.results.figures import draw

    page.write_text(filled(page.read_text(encoding="utf-8"), numbers), encoding="utf-8")
    draw([Measured(suite, numbers) for suite in SUITES.values()], page.parent / "figures")
