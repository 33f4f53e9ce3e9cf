"""What kinds whose models write have in common: the score of their tokens and of their answers."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from orthoft.recipes.head import Head
from orthoft.recipes.kinds.kind import Batch, Example, Kind, Scores, on_device
from orthoft.recipes.metrics import exact_match, token_f1
from orthoft.recipes.task_schema import CausalLM, Seq2Seq

W = TypeVar("W", CausalLM, Seq2Seq)


class Writing(Kind[W]):
    """A kind whose model predicts tokens, and answers where the task says ``generate``."""

    @property
    def prompt(self) -> str | None:
        return self.task.prompt

    @abstractmethod
    def predicted(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits (n, words) of the labelled tokens of a batch, and their labels (n,)."""

    @abstractmethod
    def answers(self, model: Any, examples: Sequence[Example], batch: Batch) -> list[tuple[str, str]]:
        """Return greedy answers to examples, which are those of the batch, and their targets."""

    @torch.no_grad()
    def score(self, model: Any, head: Head | None, examples: Sequence[Example], size: int, what: str) -> Scores:
        """Return the mean loss per labelled token (nats), its exponential, and the scores of answers if wanted.

        ``exact_match`` and ``f1`` are the means over the examples that are asked, see `orthoft.recipes.metrics`.
        """
        model.eval()
        total, count = 0.0, 0
        pairs: list[tuple[str, str]] = []
        for chunk in self.chunks(examples, size, what):
            batch = on_device(self.collate(chunk), model)
            logits, labels = self.predicted(model, batch)
            total += F.cross_entropy(logits.float(), labels, reduction="sum").item()
            count += len(labels)
            if self.task.generate:
                pairs += self.answers(model, chunk, batch)
        return token_scores(total, count) | answer_scores(pairs)


def token_scores(total: float, count: int) -> Scores:
    """Return the mean loss (nats) of ``count`` tokens whose losses sum to ``total``, and its exponential."""
    loss = total / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def answer_scores(pairs: Iterable[tuple[str, str]]) -> Scores:
    """Return ``exact_match`` and ``f1`` of pairs of answer and target, as means; nothing without pairs."""
    known = list(pairs)
    if not known:
        return {}
    sums = {
        "exact_match": sum(exact_match(*pair) for pair in known),
        "f1": sum(token_f1(*pair) for pair in known),
    }
    return {name: value / len(known) for name, value in sums.items()}
