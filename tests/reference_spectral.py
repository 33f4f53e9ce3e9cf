"""Oracles for the spectral methods: their definitions by SVDs of dense float64 matrices, one triplet at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import reference
import torch
from merging_case import Case
from torch import Tensor

Triplet = tuple[Tensor, float, Tensor]  # a column, a singular value, a row


def triplets(matrix: Tensor, floor: float = 0.0) -> list[Triplet]:
    """All singular triplets above 1e-5 times the largest and above the floor, largest first."""
    U, s, Vh = torch.linalg.svd(matrix)
    values = s.tolist()
    return [(U[:, i], value, Vh[i]) for i, value in enumerate(values) if value > max(1e-5 * values[0], floor)]


def product(parts: Sequence[Triplet], like: Tensor) -> Tensor:
    total = torch.zeros_like(like)
    for u, value, v in parts:
        total = total + value * torch.outer(u, v)
    return total


def polar(matrix: Tensor) -> Tensor:
    return product([(u, 1.0, v) for u, _, v in triplets(matrix)], matrix)


def joint_rank(tasks: Sequence[Tensor]) -> int:
    unit = [task / task.norm() for task in tasks if task.norm() > 0]
    if not unit:
        return 0
    return min(len(triplets(torch.hstack(unit))), len(triplets(torch.vstack(unit))))


def whitened(parts: Sequence[Triplet], like: Tensor) -> Tensor:
    """Orthogonalise all columns together and all rows together, then multiply out."""
    if not parts:
        return torch.zeros_like(like)
    U = polar(torch.stack([u for u, _, _ in parts], 1))
    V = polar(torch.stack([v for _, _, v in parts], 1))
    return product([(U[:, i], value, V[:, i]) for i, (_, value, _) in enumerate(parts)], like)


def scaled(deltas: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    return [weight * delta for weight, delta in zip(weights, deltas, strict=True)]


def average(tasks: Sequence[Tensor]) -> Tensor:
    return product([], tasks[0]) + torch.stack(list(tasks)).sum(0) / len(tasks)


def isotropised(matrix: Tensor) -> Tensor:
    parts = triplets(matrix)
    values = [value for _, value, _ in parts]
    return product([(u, sum(values) / len(values), v) for u, _, v in parts], matrix)


def tsv(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    tasks = [task for task in scaled(deltas, weights) if task.norm() > 0]
    if deltas[0].shape[0] == 1:
        return average(scaled(deltas, weights))
    k = max(1, joint_rank(tasks) // len(tasks)) if tasks else 0
    return whitened([part for task in tasks for part in triplets(task)[:k]], deltas[0])


def iso_c(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    tasks = scaled(deltas, weights)
    return average(tasks) if deltas[0].shape[0] == 1 else isotropised(torch.stack(tasks).sum(0))


def iso_cts(deltas: Sequence[Tensor], weights: Sequence[float], common_fraction: float = 0.8) -> Tensor:
    tasks = [task for task in scaled(deltas, weights) if task.norm() > 0]
    if deltas[0].shape[0] == 1:
        return average(scaled(deltas, weights))
    if not tasks:
        return torch.zeros_like(deltas[0])
    rank = joint_rank(tasks)
    k = round((rank - int(common_fraction * rank)) / len(tasks))
    parts = triplets(torch.stack(tasks).sum(0))[: max(0, rank - len(tasks) * k)]
    common = product([(u, 1.0, u) for u, _, _ in parts], torch.zeros(2 * deltas[0].shape[:1], dtype=torch.float64))
    for task in tasks:
        parts = parts + triplets(task - common @ task, 1e-5 * task.norm().item())[:k]
    mean = sum(value for _, value, _ in parts) / max(1, len(parts))
    return whitened([(u, mean, v) for u, _, v in parts], deltas[0])


def cart(
    deltas: Sequence[Tensor], weights: Sequence[float], rank_fraction: float = 0.04, scaling: float = 0.1
) -> Tensor:
    tasks = scaled(deltas, weights)
    centre = average(tasks)
    if deltas[0].shape[0] == 1:
        return centre
    floor = 1e-5 * max(task.norm().item() for task in tasks)
    rests = [task - centre for task in tasks if (task - centre).norm() > floor]
    k = math.ceil(rank_fraction * joint_rank(rests))
    return centre + scaling * sum((product(triplets(rest, floor)[:k], rest) for rest in rests), 0 * centre)


def wudi(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Least squares: all tasks' equations ``X D_t^T / ||D_t|| = D_t D_t^T / ||D_t||`` side by side."""
    tasks = scaled(deltas, weights)
    if deltas[0].shape[0] == 1:
        return average(tasks)
    tasks = [task for task in tasks if task.norm() > 0]
    if not tasks:
        return torch.zeros_like(deltas[0])
    inputs = torch.hstack([task.T / task.norm() for task in tasks])  # (n, T m)
    outputs = torch.hstack([task @ task.T / task.norm() for task in tasks])  # (m, T m)
    return outputs @ torch.linalg.pinv(inputs, rtol=1e-5)


CASES = {
    "tsv": Case(tsv, idempotent={}),
    "iso_c": Case(iso_c),
    "iso_cts": Case(iso_cts, settings=({"common_fraction": 0.5}, {"common_fraction": 0.0}, {"common_fraction": 1.0})),
    "cart": Case(cart, settings=({"rank_fraction": 0.32, "scaling": 0.6}, {"rank_fraction": 1.0}), idempotent={}),
    "wudi": Case(wudi, idempotent={}),
    "opcm": Case(
        reference.opcm, settings=tuple({"alpha": a} for a in (0.0, 0.2, 0.8, 1.0)), symmetric=False, idempotent={}
    ),
}
