"""What kinds whose models write have in common: scores of tokens and of answers."""

from __future__ import annotations

import math
from collections.abc import Iterable

from orthoft.recipes.kinds.kind import Scores
from orthoft.recipes.metrics import exact_match, token_f1


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
