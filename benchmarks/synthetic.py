"""Made-up deltas of one square weight."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from orthoft.delta import Delta, Dense, LowRank


@dataclass
class Layer:
    """LoRAs of one square weight, all of one rank, and the same changes entry by entry."""

    deltas: list[LowRank]

    @cached_property
    def dense(self) -> list[Tensor]:
        return [delta.dense() for delta in self.deltas]

    @property
    def width(self) -> int:
        return self.deltas[0].shape[0]

    @property
    def rank(self) -> int:
        return self.deltas[0].B.shape[1]


def loras(width: int, tasks: int, rank: int) -> Layer:
    random = torch.Generator().manual_seed(0)

    def factor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).div_(width**0.5)

    return Layer([LowRank(factor(width, rank), factor(rank, width)) for _ in range(tasks)])


def full_rank(width: int, tasks: int) -> list[Delta]:
    random = torch.Generator().manual_seed(0)
    return [Dense(torch.randn(width, width, generator=random) / width) for _ in range(tasks)]
