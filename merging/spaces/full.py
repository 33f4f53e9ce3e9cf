"""The entries themselves, as most published code merges them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orthoft.delta import Delta, Dense
from orthoft.merging.spaces.registry import Decode, space


@space("full")
def full(deltas: Sequence[Delta], base: Tensor | None, weights: Tensor) -> tuple[Tensor, Decode]:
    """The (m, n) entries themselves."""
    return torch.stack([delta.dense() for delta in deltas]), Dense
