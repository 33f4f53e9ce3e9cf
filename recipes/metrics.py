"""Scores of predictions, as plain functions."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

_BIO = re.compile(r"O|[BI](-.*)?")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def accuracy(found: Tensor, labels: Tensor) -> float:
    """Return the share of predictions (N,) that equal their labels (N,)."""
    return (found == labels).float().mean().item()


def macro_f1(found: Tensor, labels: Tensor, classes: int) -> float:
    """Return the mean over classes of ``2 tp / (2 tp + fp + fn)``, of predictions and labels (N,).

    A class that is neither predicted nor a label does not count.
    """
    hits = torch.bincount(labels[found == labels], minlength=classes)
    total = torch.bincount(found, minlength=classes) + torch.bincount(labels, minlength=classes)  # 2 tp + fp + fn
    return (2 * hits[total > 0] / total[total > 0]).mean().item()


def is_bio(tags: Sequence[str]) -> bool:
    """Say whether tags mark entities: B-TYPE begins one, I-TYPE goes on with it, O is outside."""
    return all(_BIO.fullmatch(tag) for tag in tags) and any(tag.startswith("B") for tag in tags)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return (type, first word, word behind the last) of each entity in the BIO tags of a sentence.

    An I- tag with nothing of its type to go on with begins an entity, as in the scorer of CoNLL-2000.
    """
    found: set[tuple[str, int, int]] = set()
    inside: str | None = None
    start = 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        if prefix == "I" and kind == inside:
            continue
        if inside is not None:
            found.add((inside, start, i))
        inside, start = (None, 0) if prefix == "O" else (kind, i)
    return found


def entity_f1(found: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> float:
    """Return ``2 tp / (2 tp + fp + fn)`` over all entities of all sentences, which count with exact span and type.

    It is 0 where there are no entities at all.
    """
    pairs = [(entities(mine), entities(theirs)) for mine, theirs in zip(found, labels, strict=True)]
    total = sum(len(mine) + len(theirs) for mine, theirs in pairs)
    return 2 * sum(len(mine & theirs) for mine, theirs in pairs) / total if total else 0.0


def normalised(text: str) -> list[str]:
    """Return the words of a text in lower case without punctuation and articles, as SQuAD does (arXiv 1606.05250)."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(found: str, target: str) -> float:
    """Return 1 if two texts have the same `normalised` words, else 0."""
    return float(normalised(found) == normalised(target))


def token_f1(found: str, target: str) -> float:
    """Return ``2 shared / (words + words)`` of the `normalised` words of two texts; 1 if both have none."""
    mine, theirs = normalised(found), normalised(target)
    shared = (Counter(mine) & Counter(theirs)).total()
    return 2 * shared / (len(mine) + len(theirs)) if mine or theirs else 1.0
