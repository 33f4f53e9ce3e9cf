"""Short examples side by side in rows of one length, none of them split and none seen by another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor

from orthoft.recipes.kinds.kind import IGNORED, Example


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return rows of indices, each index once, whose lengths sum to ``size`` or less.

    Best fit, decreasing: the longest first, each into the row with the least room that takes it, else into a new row.
    Rows, and the indices in them, are in the order of the examples. The rows by the room that is left are found by the
    lowest set bit of an integer, so that n lengths cost n log n.

    Raises:
        ValueError: one is longer than ``size``.
    """
    if (longest := max(lengths, default=0)) > size:
        raise ValueError(f"an example of {longest} tokens does not fit a row of {size}")
    by_room: dict[int, list[list[int]]] = defaultdict(list)
    rooms = 1 << size  # bit r: there is a row with room for r; a new row has room for all
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        fitting = rooms >> lengths[i] << lengths[i]
        room = (fitting & -fitting).bit_length() - 1
        row = by_room[room].pop() if room < size else []
        row.append(i)
        if room < size and not by_room[room]:
            rooms ^= 1 << room
        left = room - lengths[i]
        by_room[left].append(row)
        rooms |= 1 << left
    return sorted(sorted(row) for rows in by_room.values() for row in rows)


def packed(examples: Sequence[Example], size: int) -> list[Example]:
    """Return rows of examples, with their ``lengths`` and numbers (``order``).

    The first token of each follows none and has no label.
    """
    rows = best_fit([len(example["input_ids"]) for example in examples], size)
    return [_joined([examples[i] for i in row]) | {"order": row} for row in rows]


def _joined(examples: Sequence[Example]) -> Example:
    return {
        "input_ids": list(chain.from_iterable(example["input_ids"] for example in examples)),
        "labels": list(chain.from_iterable([IGNORED, *example["labels"][1:]] for example in examples)),
        "lengths": [len(example["input_ids"]) for example in examples],
    }


def unpacked(rows: Sequence[Example]) -> list[Example]:
    """Return the examples of packed rows, in the order that they had before; rows of another kind as they are."""
    if not rows or "lengths" not in rows[0]:
        return list(rows)
    found: dict[int, Example] = {}
    for row in rows:
        places = pairwise(accumulate(row["lengths"], initial=0))
        for i, (start, stop) in zip(row["order"], places, strict=True):
            found[i] = {key: row[key][start:stop] for key in ("input_ids", "labels")}
    return [found[i] for i in sorted(found)]


def positions(rows: Sequence[Example]) -> Tensor:
    """Return the place of each token in its example (b, t), which starts again at 0; filling is at 0, each for itself.

    Without an attention mask transformers' models take each place that does not follow the last as a new text.
    """
    places = [torch.cat([torch.arange(length) for length in row["lengths"]]) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(places, batch_first=True)


@torch.no_grad()
def keeps_apart(model: Any) -> bool:
    """Say whether a model reads two examples in a row apart: one's logits are the same whatever the other is."""
    place, training = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2, device=next(model.parameters()).device), model.training
    model.eval()
    try:
        mine, other = (
            model(input_ids=place.new_tensor([[*first, 4, 5, 6]] * 2), position_ids=place, use_cache=False).logits[
                :, 3:
            ]
            for first in ([1, 2, 3], [3, 3, 1])
        )
    except TypeError:  # it takes no positions
        return False
    finally:
        model.train(training)
    allowed = 10 * torch.finfo(mine.dtype).eps * mine.double().norm()
    return bool((mine.double() - other.double()).norm() <= allowed)
