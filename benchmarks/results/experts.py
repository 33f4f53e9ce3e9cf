"""The experts of a suite: data and heads read once, each adapter trained once and kept, every score a cell."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.results.cells import Cells
from benchmarks.results.suites import Suite
from orthoft.recipes import Recipe, load
from orthoft.recipes.expert import Ready, fingerprint, finished
from orthoft.recipes.finetune import train
from orthoft.recipes.head import Head
from orthoft.recipes.initialise import covariances
from orthoft.recipes.keep_away import KeepAway, root
from orthoft.recipes.kinds import kind_of
from orthoft.recipes.models import load_model
from orthoft.recipes.rehearse import adapter_ranks
from orthoft.recipes.statistics import collect
from orthoft.recipes.subspaces import mean_of_others
from orthoft.recipes.train_to_merge import save_subspaces

DATA_SEED = 0  # rows and heads are the same for all seeds, so that rows of a table differ by training alone
RATE_SEED = 100  # of the short runs that choose learning rates
INPUTS = 300  # rows of each task that the penalty looks at


class Workshop:
    """One suite under way: where experts and numbers are kept, and what all rows share."""

    def __init__(self, suite: Suite, cache: Path, numbers: Path, device: str | None = None) -> None:
        self.suite, self.cache, self.folder = suite, cache / suite.name, numbers
        self.metric = "accuracy" if suite.kind == "classification" else "loss"
        self.device = device
        self._cells: dict[str | None, Cells] = {}
        self._ready: dict[str, Ready] = {}

    def cells(self, row: str | None) -> Cells:
        """Return the numbers of a row, or of the base."""
        if row not in self._cells:
            settings = self.suite.settings(None if row is None else self.suite.rows[row])
            self._cells[row] = Cells(self.folder / f"{self.suite.name}.{row or 'base'}.json", settings)
        return self._cells[row]

    def recipe(self, row: str, seed: int, rate: float) -> Recipe:
        words = self.suite.recipe(self.suite.rows[row], seed, rate, self.cache / row)
        return load({**words, "device": self.device} if self.device else words)

    @cached_property
    def plain(self) -> Recipe:
        """A recipe for what all rows share: data, heads, inputs of the base."""
        return self.recipe(next(iter(self.suite.rows)), DATA_SEED, 1e-3)

    def ready(self, name: str) -> Ready:
        """Return a task's examples, and its head on the frozen base."""
        if name not in self._ready:
            kind = kind_of(next(task for task in self.plain.tasks if task.name == name), self.suite.base)
            ready = Ready(kind, kind.data(DATA_SEED), None, "")
            self._ready[name] = replace(ready, head=self._head(ready)) if ready.data.classes else ready
        return self._ready[name]

    def _head(self, ready: Ready) -> Head:
        file = self.cache / "heads" / f"{ready.task.name}.safetensors"
        if not file.is_file():
            ready.kind.fit(self.base, ready.data, self.suite.batch).save(file)
        return Head.load(file)

    @cached_property
    def base(self) -> Any:
        """The base that nothing is ever put on."""
        return self.fresh_base()

    def fresh_base(self) -> Any:
        return load_model(self.suite.kind, self.suite.base, self.suite.dtype).to(self.device or PartialState().device)

    def score(self, model: nn.Module, name: str, split: str, limit: int | None = None) -> dict[str, float]:
        ready = self.ready(name)
        examples = getattr(ready.data, split)[: self.suite.test_rows if split == "test" else limit]
        with torch.inference_mode():
            found = ready.kind.score(model, ready.head, examples, self.suite.batch, name)
        return {key: round(value, 5) for key, value in found.items()}

    def refit_score(self, model: nn.Module, name: str) -> dict[str, float]:
        """Return a model's test scores on a task under a head that is fitted anew on its features."""
        ready = self.ready(name)
        head = ready.kind.fit(model, ready.data, self.suite.batch)
        with torch.no_grad():
            found = ready.kind.score(model, head, ready.data.test, self.suite.batch, name)
        return {key: round(value, 5) for key, value in found.items()}

    def scores(self, model: nn.Module, split: str, limit: int | None = None) -> dict[str, dict[str, float]]:
        """Return a model's scores on every task."""
        return {name: self.score(model, name, split, limit) for name in self.suite.tasks}

    def score_base(self) -> None:
        cells = self.cells(None)
        for split, limit in (("tuning", self.suite.trial_rows), ("test", None)):
            if cells.get(split) is None:
                cells.put(self.scores(self.base, split, limit), split)

    def folder_of(self, row: str, seed: int, name: str) -> Path:
        return self.cache / row / str(seed) / name

    def train(self, row: str, seed: int, rate: float, name: str, folder: Path) -> dict[str, Any]:
        """Return what is known of an expert, trained unless it is there."""
        recipe = self.recipe(row, seed, rate)
        kind = kind_of(next(task for task in recipe.tasks if task.name == name), self.suite.base)
        mark = fingerprint(recipe, kind.task, self.suite.base)
        known = finished(folder, mark)
        if known is None:
            ready = replace(self.ready(name), kind=kind, mark=mark)
            rows, more = self._subspace(recipe, row, seed, name), self._penalty(row, name)
            known = train(recipe, ready, self.suite.base, folder, rows, **({"callbacks": more} if more else {}))
        return known

    def _subspace(self, recipe: Recipe, row: str, seed: int, name: str) -> dict[str, Tensor] | None:
        if recipe.train_to_merge is None:
            return None
        folder = self.cache / row / "subspaces" / str(seed)
        if not (folder / f"{name}.safetensors").is_file():
            save_subspaces(recipe, self.suite.base, folder)
        found: dict[str, Tensor] = load_file(folder / f"{name}.safetensors")
        return found

    def _penalty(self, row: str, name: str) -> list[KeepAway]:
        if not (weight := self.suite.rows[row].keep_away):
            return []
        order = list(self.suite.tasks)

        def away(key: str) -> Tensor:
            return root(mean_of_others([self.inputs[task][key] for task in order], order.index(name)))

        return [KeepAway({key: away(key) for key in self.inputs[name]}, weight)]

    @cached_property
    def inputs(self) -> dict[str, dict[str, Tensor]]:
        """Covariances of each task's inputs of each adapted layer."""
        ranks = adapter_ranks(self.plain.tasks[0], self.suite.base, to_merge=True)
        names = [f"{module}.weight" for module in ranks]
        found = {}
        for name in self.suite.tasks:
            kind, examples = self.ready(name).kind, self.ready(name).data.train[:INPUTS]
            batches = kind.batches(examples, self.suite.batch, f"{name} inputs")
            found[name] = covariances(self.base, (kind.inputs(self.base, batch) for batch in batches), names)
        return found

    def expert(self, row: str, seed: int, name: str) -> Any:
        return peft.PeftModel.from_pretrained(self.fresh_base(), str(self.folder_of(row, seed, name)))

    def gram(self, row: str, seed: int, name: str) -> Path:
        """Return the file of an expert's Gram matrices on rows of its task."""
        file = self.cache / row / str(seed) / f"{name}.gram.safetensors"
        if not file.is_file():
            model, kind = self.expert(row, seed, name), self.ready(name).kind
            rows = kind.batches(self.ready(name).data.train[:INPUTS], self.suite.batch, f"{name} inputs")
            collect(model, (kind.inputs(model, batch) for batch in rows), "gram", file, examples=INPUTS, progress=False)
        return file

    def choose_rate(self, row: str) -> float:
        """Return the learning rate that does best on tuning rows, or that of another row."""
        if (other := self.suite.rows[row].rate_of) is not None:
            return self.choose_rate(other)
        cells, rates = self.cells(row), self.suite.rows[row].rates
        if len(rates) == 1:
            return rates[0]
        for rate in rates:
            if cells.get("rates", f"{rate:g}") is None:
                cells.put({self.metric: self._score_at(row, rate)}, "rates", f"{rate:g}")
        found = {rate: cells.get("rates", f"{rate:g}", self.metric) for rate in rates}
        known = {rate: score for rate, score in found.items() if score is not None}
        return (max if self.metric == "accuracy" else min)(known, key=lambda rate: known[rate])

    def _score_at(self, row: str, rate: float) -> float | None:
        """Return the mean score on tuning rows of the tasks that rates are chosen on, None if the loss is infinite."""
        scores = []
        for name in self.suite.tuned_on:
            folder = self.cache / row / "rates" / f"{rate:g}" / name
            try:
                self.train(row, RATE_SEED, rate, name, folder)
            except ValueError as error:
                if "training loss" not in str(error):
                    raise
                return None
            model = peft.PeftModel.from_pretrained(self.fresh_base(), str(folder))
            scores.append(self.score(model, name, "tuning")[self.metric])
        return round(sum(scores) / len(scores), 5)

    def experts(self, row: str, seed: int, cross: bool = False) -> None:
        """Train and score the experts of a row that are not there yet, on their own task or on all."""
        cells, rate = self.cells(row), self.choose_rate(row)
        for name in self.suite.tasks:
            if cells.get("seeds", str(seed), "experts", name) is not None:
                continue
            told = self.train(row, seed, rate, name, self.folder_of(row, seed, name))
            known: dict[str, Any] = {key: told[key] for key in ("parameters", "steps", "seconds")}
            model = self.expert(row, seed, name)
            seen = self.suite.tasks if cross else [name]
            known["test"] = {other: self.score(model, other, "test") for other in seen}
            cells.put({"rate": rate, **known}, "seeds", str(seed), "experts", name)
