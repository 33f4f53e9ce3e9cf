"""The table of the contract suite: every merge method with its oracle, gathered from the files of oracles."""

from __future__ import annotations

from typing import Any

import reference
import reference_entrywise
import reference_spectral
import reference_statistics
import torch
from merging_case import Case
from torch import Tensor

from orthoft.delta import Delta, Dense, LowRank, Rotated
from orthoft.merging import METHODS, merge_deltas

M, N = 12, 9
LINEAR = {
    "task_arithmetic": Case(reference.task_arithmetic, idempotent={}),
    "mean": Case(reference.mean, idempotent={}, weights_scale=False),
}
CASES: dict[str, Case] = {
    **LINEAR,
    **reference_entrywise.CASES,
    **reference_spectral.CASES,
    **reference_statistics.CASES,
}
SETTINGS = [(name, params) for name in METHODS for params in ({}, *(CASES[name].settings if name in CASES else ()))]
KINDS = ["equal ranks", "mixed ranks", "excess rank", "same task", "dense", "mixed kinds"]
FACTORED = KINDS[:4]


def low_rank(rank: int, seed: int, dtype: torch.dtype = torch.float32) -> LowRank:
    random = torch.Generator().manual_seed(seed)
    B = torch.randn(M, rank, generator=random, dtype=torch.float64)
    A = torch.randn(rank, N, generator=random, dtype=torch.float64)
    return LowRank(B.to(dtype), A.to(dtype))


def some_deltas(kind: str) -> list[Delta]:
    """Three tasks of one kind: few and equal ranks, mixed ranks, more than the matrix has, dense, rotated, or all."""
    random = torch.Generator().manual_seed(5)
    dense = [Dense(torch.randn(M, N, generator=random)) for _ in range(3)]
    skew = torch.randn(3, 3, 3, generator=random)
    rotated = Rotated(torch.randn(M, N, generator=random), 0.3 * (skew - skew.mT))
    found: dict[str, list[Delta]] = {
        "equal ranks": [low_rank(2, seed) for seed in range(3)],
        "mixed ranks": [low_rank(rank, rank) for rank in (1, 4, 2)],
        "excess rank": [low_rank(rank, rank) for rank in (5, 6, 7)],
        "same task": [low_rank(3, 1)] * 3,
        "dense": [*dense],
        "mixed kinds": [low_rank(2, 1), dense[0], rotated],
    }
    return found[kind]


def tasks_of(name: str, kind: str) -> list[Delta]:
    """Return as many of them as the method takes."""
    return some_deltas(kind)[: CASES[name].tasks or 3]


def merged(name: str, deltas: list[Delta], space: str, params: dict[str, Any], **words: Any) -> Tensor:
    """Return the dense result, on a base that is the same for all."""
    return merge_deltas(deltas, method=name, space=space, base=base(deltas[0].shape), **words, **params).dense()


def base(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64).to(dtype)


def commutes(name: str, params: dict[str, Any]) -> bool:
    """Say whether the method with these parameters claims to commute."""
    return METHODS[name].commutes(METHODS[name].bind(params))


def works_in(name: str, params: dict[str, Any], space: str) -> bool:
    """Say whether the method with these parameters works in a space."""
    return space == "full" or not METHODS[name].entries(METHODS[name].bind(params))


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()
