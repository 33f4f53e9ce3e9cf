"""Oracle for GOFT: the adapted weight by one dense n x n matrix per stage, entry by entry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def goft(weight: Tensor, state: Mapping[str, Tensor], config: Any) -> Tensor:
    """``W (P_L ... P_1 diag(s))^T`` in float64."""
    n = weight.shape[1]
    Q = torch.eye(n, dtype=torch.float64)
    for stage in stages(n):
        Q = dense_stage(n, stage, state, config.mode) @ Q
    if config.scale:
        Q = Q @ torch.diag(state["scale"].double())
    return weight.double() @ Q.T


def stages(n: int) -> list[list[tuple[int, int, int]]]:
    """Return for each stage the (number, first coordinate, second coordinate) of its planes."""
    found, number = [], 0
    for s in range(1, math.ceil(math.log2(n)) + 1):
        stage = []
        for first in range(0, n, 2**s):
            second = first + 2 ** (s - 1)
            if second < n:
                stage.append((number, first, second))
                number += 1
        found.append(stage)
    assert number == n - 1
    return found


def dense_stage(n: int, stage: list[tuple[int, int, int]], state: Mapping[str, Tensor], mode: str) -> Tensor:
    R = torch.eye(n, dtype=torch.float64)
    for number, i, j in stage:
        if mode == "strict":
            angle = state["angles"][number].double()
            c, s = torch.cos(angle), torch.sin(angle)
            R[i, i], R[i, j], R[j, i], R[j, j] = c, -s, s, c
        else:
            G = state["planes"][number].double()
            R[i, i], R[i, j], R[j, i], R[j, j] = G[0, 0], G[0, 1], G[1, 0], G[1, 1]
    return R


def goft_penalty(planes: Tensor, weight: float) -> Tensor:
    """``weight * sum_i (off-diagonal of G_i^T G_i)^2``."""
    total = torch.zeros((), dtype=planes.dtype)
    for G in planes:
        total = total + (G.T @ G)[0, 1] ** 2
    return weight * total
