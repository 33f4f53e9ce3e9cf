"""The kinds of task by the name that a recipe gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orthoft.recipes.kinds.causal_lm import CausalLanguageModel
from orthoft.recipes.kinds.classification import SequenceClassification
from orthoft.recipes.kinds.image_classification import ImageClassification
from orthoft.recipes.kinds.kind import Batch, Example, Kind, Scores, TaskData
from orthoft.recipes.kinds.seq2seq import SequenceToSequence
from orthoft.recipes.kinds.token_classification import TokenClassification
from orthoft.recipes.task_schema import Task

KINDS: dict[str, type[Kind[Any]]] = {
    "classification": SequenceClassification,
    "causal-lm": CausalLanguageModel,
    "token-classification": TokenClassification,
    "image-classification": ImageClassification,
    "seq2seq": SequenceToSequence,
}


def kind_of(task: Task, base: Path) -> Kind[Any]:
    """Return a task with the processor of its base."""
    return KINDS[task.kind](task, base)


__all__ = ["KINDS", "Batch", "Example", "Kind", "Scores", "TaskData", "kind_of"]
