"""Oracles for adapters: the adapted weight by dense matrices, one factor after the other, with loops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from reference import reflected, rotated
from torch import Tensor


def oftv2(weight: Tensor, state: Mapping[str, Tensor], config: Any) -> Tensor:
    """``W Q^T`` with the n x n block-diagonal rotation."""
    skew = state["skew"]
    if config.radius is not None:
        bound = config.radius / (weight.shape[1] // config.block_size) ** 0.5
        skew = torch.stack(
            [block if (s := (2 * block @ block).sqrt()) < bound else block * bound / s for block in skew]
        )
    return rotated(weight, skew, config.block_size, config.map, config.degree)


def hra(weight: Tensor, state: Mapping[str, Tensor], config: Any) -> Tensor:
    """``W H_1 ... H_r``; orthonormal: ``W`` times the reflections along both orthonormal bases."""
    if not config.orthonormal:
        return reflected(weight, state["u"])
    for basis in (gram_schmidt(state["u0"]), gram_schmidt(state["u"])):
        weight = weight @ (torch.eye(basis.shape[1], dtype=basis.dtype) - 2 * basis.T @ basis)
    return weight


def gram_schmidt(rows: Tensor) -> Tensor:
    basis: list[Tensor] = []
    for row in rows:
        for done in basis:
            row = row - (row @ done) * done
        basis.append(row / row.norm())
    return torch.stack(basis)


def hra_penalty(u: Tensor, weight: float) -> Tensor:
    """``weight * sum_ij (delta_ij - cos(u_i, u_j))^2``."""
    total = torch.zeros((), dtype=u.dtype)
    for i, a in enumerate(u):
        for j, b in enumerate(u):
            total = total + (float(i == j) - a @ b / (a.norm() * b.norm())) ** 2
    return weight * total
