"""Texts in which spans are marked become tokens in which the same is marked, and these become examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from orthoft.recipes.kinds.kind import IGNORED, Example

AT_ONCE = 1000  # texts: where each token begins and ends is held for so many


class Marked(NamedTuple):
    """A text and, in order, the places of characters (from, to) of what is to be learnt."""

    text: str
    spans: list[tuple[int, int]]


class Tokens(NamedTuple):
    """Tokens (t,), whether each is to be learnt (t,), and at which the last span begins, None if it is cut off."""

    ids: np.ndarray
    learnt: np.ndarray
    answer: int | None


def tokens_of(
    tokenizer: Any, marked: Sequence[Marked], size: int, where: str, special: bool = True
) -> Iterator[Tokens]:
    """Yield the first ``size`` tokens of each text; a token with a character of a span is to be learnt.

    ``special``: with the tokens that the tokenizer adds by itself.

    Raises:
        ValueError: the tokenizer does not tell where its tokens are in a text.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{where}: loss on completions needs a fast tokenizer (tokenizer.json) in the base")
    for first in range(0, len(marked), AT_ONCE):
        some = marked[first : first + AT_ONCE]
        found = tokenizer(
            [text for text, _ in some],
            truncation=True,
            max_length=size,
            add_special_tokens=special,
            return_offsets_mapping=True,
        )
        for (_, spans), ids, places in zip(some, found["input_ids"], found["offset_mapping"], strict=True):
            at, wanted = np.array(places).reshape(-1, 2), np.array(spans).reshape(-1, 2)
            answer = np.flatnonzero(overlaps(at, wanted[-1:]))
            yield Tokens(np.array(ids), overlaps(at, wanted), int(answer[0]) if len(answer) else None)


def overlaps(places: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Return which places (t, 2) share a character with one of some spans (s, 2), which are in order and apart.

    Such a place ends behind the beginning of more spans than it begins behind the end of.
    """
    begun = np.searchsorted(spans[:, 0], places[:, 1], side="left")
    ended = np.searchsorted(spans[:, 1], places[:, 0], side="right")
    found: np.ndarray = begun > ended
    return found


def as_example(tokens: Tokens, target: str, everything: bool) -> Example:
    """Return tokens with labels, the ``target`` in words, and the place where the ``answer`` begins, or None.

    Nothing comes before the first token, so it has no label.
    """
    labels = np.where(tokens.learnt | everything, tokens.ids, IGNORED)
    labels[:1] = IGNORED
    return {"input_ids": tokens.ids.tolist(), "labels": labels.tolist(), "answer": tokens.answer, "target": target}


def has_labels(example: Example) -> bool:
    """Say whether the loss looks at any token of an example."""
    return bool(example["labels"].count(IGNORED) < len(example["labels"]))
