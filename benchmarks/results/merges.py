"""Every merge of a row's experts: its strength chosen on tuning rows, then scored once on the test rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.results.experts import Workshop
from orthoft.merging import METHODS, plan
from orthoft.merging.spaces import SPACES
from orthoft.recipes.live_merge import LiveMerge

# The merge is brought to the mean norm of the tasks, then multiplied by one of these.
STRENGTHS = (0.25, 0.5, 1.0, 1.5, 2.2, 3.2, 4.7)
PLAIN = (0.15, 0.3, 0.6, 1.0, 1.5)  # of methods and spaces that say themselves how long the merge is
GRAM = ("regmean", "frank_wolfe")  # need the inputs of each expert
SUM = (("task_arithmetic", "auto"),)
SOME = (
    *SUM,
    ("ties", "core"),
    ("mean", "rotation"),
    ("tsv", "auto"),
    ("iso_c", "auto"),
    ("opcm", "auto"),
    ("ties", "full"),
    ("regmean", "full"),
)


def wanted(which: str) -> Iterator[tuple[str, str]]:
    """Yield (method, space): the main ones first, then with "all" each method in each space that can differ."""
    yield from SUM if which == "sum" else SOME
    if which != "all":
        return
    for method in METHODS.values():
        params = method.bind({})
        if method.needs("statistics") and method.name not in GRAM:
            continue
        spaces = ["auto"] if method.commutes(params) else ["full", "core", "knots"]
        for space in ["full"] if method.entries(params) else spaces:
            if (method.name, space) not in SOME and method.name not in ("mean", "magnitude"):
                yield method.name, space


def strengths(method: str, space: str) -> tuple[dict[str, Any], ...]:
    """Return the words of the strengths that are tried."""
    if method in GRAM or (space in SPACES and not SPACES[space].isometric):
        return tuple({"scale": scale} for scale in PLAIN)
    return tuple({"rescale": "model", "scale": scale} for scale in STRENGTHS)


def peak(value: Callable[[int], float], count: int) -> int:
    """Return where values that rise and then fall are largest, looked for from the middle: of equal ones the first."""
    at = (count - 1) // 2
    if value(at + 1) > value(at):
        while at + 1 < count and value(at + 1) > value(at):
            at += 1
        return at
    while at > 0 and value(at - 1) >= value(at):
        at -= 1
    return at


class Merges:
    """The merges of one row and seed, tried in memory."""

    def __init__(self, shop: Workshop, row: str, seed: int) -> None:
        self.shop, self.row, self.seed = shop, row, seed
        self.cells = shop.cells(row)

    @cached_property
    def folders(self) -> list[tuple[str, Path]]:
        return [(name, self.shop.folder_of(self.row, self.seed, name)) for name in self.shop.suite.tasks]

    @cached_property
    def plain(self) -> LiveMerge:
        """The experts in memory."""
        return LiveMerge(plan(self.shop.suite.base, self.folders, method="mean", space="full"), self.shop.fresh_base())

    @cached_property
    def with_grams(self) -> LiveMerge:
        """The experts in memory, with the Gram matrices of their inputs."""
        grams = {name: self.shop.gram(self.row, self.seed, name) for name, _ in self.folders}
        todo = plan(self.shop.suite.base, self.folders, method="regmean", space="full", statistics=grams)
        return LiveMerge(todo, self.shop.fresh_base())

    def run(self, which: str | None = None) -> None:
        """Measure what is not measured yet; a space that the deltas do not have is left out, and said so."""
        for method, space in wanted(which or self.shop.suite.rows[self.row].merges):
            place = ("seeds", str(self.seed), "merges", f"{method}/{space}")
            if self.cells.get(*place, "test") is not None or self.cells.get(*place, "refused") is not None:
                continue
            try:
                best = self._tuned(method, space, place)
                self.cells.put(self._scores(method, space, best, "test", None), *place, "test")
            except (ValueError, TypeError) as error:
                self.cells.put(str(error), *place, "refused")

    def refit(self) -> None:
        """Score the plain sum, at the strength that was chosen, under heads that are fitted anew on its features."""
        ((method, space),) = SUM
        place = ("seeds", str(self.seed), "merges", f"{method}/{space}")
        scale = self.cells.get(*place, "scale")
        if self.cells.get(*place, "test") is None or self.cells.get(*place, "refit") is not None:
            return
        words = next(words for words in strengths(method, space) if words["scale"] == scale)
        with self.plain.changed(self.plain.merged({"method": method, "space": space, **words})) as model:
            found = {name: self.shop.refit_score(model, name) for name in self.shop.suite.tasks}
        self.cells.put({name: values[self.shop.metric] for name, values in found.items()}, *place, "refit")

    def _tuned(self, method: str, space: str, place: tuple[str, ...]) -> dict[str, Any]:
        """Return the strength that does best on tuning rows."""
        choices = strengths(method, space)

        def value(at: int) -> float:
            words = choices[at]
            known = self.cells.get(*place, "tuning", f"{words['scale']:g}")
            if known is None:
                found = self._scores(method, space, words, "tuning", self.shop.suite.trial_rows)
                known = round(sum(found.values()) / len(found), 5)
                self.cells.put(known, *place, "tuning", f"{words['scale']:g}")
            return float(known if self.shop.metric == "accuracy" else -known)

        best = choices[peak(value, len(choices))]
        self.cells.put(best["scale"], *place, "scale")
        return best

    def _scores(
        self, method: str, space: str, words: dict[str, Any], split: str, limit: int | None
    ) -> dict[str, float]:
        live = self.with_grams if method in GRAM else self.plain
        with live.changed(live.merged({"method": method, "space": space, **words})) as model:
            found = self.shop.scores(model, split, limit)
        return {name: values[self.shop.metric] for name, values in found.items()}
