"""Scores of a run: each model on each task's test split, and what a run that was broken off knows of them already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
from torch import nn

from orthoft.recipes.devices import roomy
from orthoft.recipes.expert import Ready
from orthoft.recipes.kept_scores import KeptScores
from orthoft.recipes.layout import SCORES, expert_folder
from orthoft.recipes.models import load_model
from orthoft.recipes.schema import Recipe

LOWER = "evaluate.batch_size"


class Evaluation:
    """Scores and samples by row and task, as they come."""

    def __init__(self, recipe: Recipe, base: Path, out: Path, shared: Any, say: Callable[[str], None]) -> None:
        """Evaluate models of a recipe; ``shared`` is what every score depends on, as JSON has it."""
        self.recipe, self.base, self.out, self.say = recipe, base, out, say
        self.scores: dict[str, dict[str, Mapping[str, float]]] = {}  # by row, by task
        self.samples: dict[str, dict[str, str]] = {}  # by task, by row
        self.kept = KeptScores(out / SCORES, [recipe.evaluate.batch_size, recipe.device, shared])

    def base_and_experts(self, tasks: Sequence[Ready]) -> None:
        """Score the base on every task, and each expert, read from disk, on its own task or on all."""
        self._once("base", None, [ready.at_start() for ready in tasks])
        for ready in tasks:
            self._once(ready.task.name, ready, tasks if self.recipe.evaluate.cross else [ready])

    def _once(self, row: str, expert: Ready | None, tasks: Sequence[Ready]) -> None:
        """Score the base, alone or under an expert, on the tasks on which a run that was broken off did not."""
        mark, left = "" if expert is None else expert.mark, list[Ready]()
        for ready in tasks:
            if (known := self.kept.find(row, mark, ready.mark)) is None:
                left.append(ready)
            else:
                self._enter(row, ready.task.name, **known)
        if left:
            model = self.load(self.base, None if expert is None else expert_folder(self.out, row))
            self.score(row, model, left, mark)
        else:
            self.say(f"  {row}: scores taken up")

    def score(self, row: str, model: nn.Module, tasks: Sequence[Ready], mark: str | None = None) -> None:
        """Evaluate a model on the test splits of tasks; what depends on it by ``mark`` alone is kept at once."""
        for ready in tasks:
            name, size = ready.task.name, self.recipe.evaluate.batch_size
            with roomy(f"{row} on {name}", LOWER):
                told: dict[str, Any] = {
                    "scores": ready.kind.score(model, ready.head, ready.data.test, size, f"{row} on {name}"),
                    "sample": ready.kind.sample(model) if row in ("base", name, "merge") else None,
                }
            self._enter(row, name, **told)
            if mark is not None:
                self.kept.add(told, row, mark, ready.mark)

    def _enter(self, row: str, name: str, scores: Mapping[str, float], sample: str | None) -> None:
        self.scores.setdefault(row, {})[name] = scores
        if sample is not None:
            self.samples.setdefault(name, {})[row] = sample

    def load(self, folder: Path, adapter: Path | None = None) -> Any:
        """Return the model of a folder, quantised if the experts were trained so, under an adapter if one is given."""
        with roomy(f"loading {folder.name}", "what a weight takes: set dtype, or quantization"):
            kind = self.recipe.tasks[0].kind
            model = load_model(kind, folder, self.recipe.dtype, self.recipe.quantization)
            return model if adapter is None else peft.PeftModel.from_pretrained(model, str(adapter))
