"""The oracle for PSOFT: the adapted weight by dense float64 matrices, n x n ones included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def psoft(weight: Tensor, state: Mapping[str, Tensor], config: Any) -> Tensor:
    """``W (I + V (C - I) V^T)`` with ``C = diag(beta) R diag(alpha)``."""
    V = state["basis"].double().T
    r = V.shape[1]
    C = rotation(state["skew"].double(), r, config.map, config.degree)
    if config.relax:
        C = torch.diag(state["beta"].double()) @ C @ torch.diag(state["alpha"].double())
    n = torch.eye(V.shape[0], dtype=torch.float64)
    return weight.double() @ (n + V @ (C - torch.eye(r, dtype=torch.float64)) @ V.T)


def rotation(entries: Tensor, r: int, map: str, degree: int) -> Tensor:
    """``(I + S)(I - S)^-1`` of the skew matrix with the upper triangle ``entries``, or with the sum of its powers."""
    places = [(i, j) for i in range(r) for j in range(i + 1, r)]
    S = torch.zeros(r, r, dtype=torch.float64)
    for entry, (i, j) in zip(entries, places, strict=True):
        unit = torch.zeros(r, r, dtype=torch.float64)
        unit[i, j], unit[j, i] = 1.0, -1.0
        S = S + entry * unit
    eye = torch.eye(r, dtype=torch.float64)
    if map == "cayley":
        return (eye + S) @ torch.linalg.inv(eye - S)
    return (eye + S) @ sum(torch.linalg.matrix_power(S, k) for k in range(degree))
