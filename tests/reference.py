"""Oracles for merging: the definitions written out on dense float64 matrices, with loops and no shortcuts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def task_arithmetic(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(deltas[0])
    for weight, delta in zip(weights, deltas, strict=True):
        total = total + weight * delta
    return total


def mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return task_arithmetic(deltas, weights) / sum(weights)


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float = 0.2) -> Tensor:
    trimmed = []
    for weight, delta in zip(weights, deltas, strict=True):
        kept = max(1, int(density * delta.numel()))
        smallest = sorted(delta.abs().flatten().tolist(), reverse=True)[kept - 1]
        trimmed.append(weight * delta * (delta.abs() >= smallest))
    merged = torch.zeros_like(deltas[0])
    for i in range(merged.shape[0]):
        for j in range(merged.shape[1]):
            values = [t[i, j].item() for t in trimmed]
            total = sum(values)
            agreeing = [v for v in values if v * total > 0]
            merged[i, j] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return merged


def opcm_sum(deltas: Sequence[Tensor], weights: Sequence[float], alpha: float = 0.5) -> Tensor:
    """The unscaled sum, with every intermediate model scaled and accumulated as the paper has it."""
    merged, scale, norms = weights[0] * deltas[0], 1.0, [torch.linalg.norm(weights[0] * deltas[0])]
    for weight, delta in zip(weights[1:], deltas[1:], strict=True):
        task = weight * delta
        cleaned = task - _projected(task, merged, alpha) if task.shape[0] > 1 else task
        total = scale * merged + cleaned
        norms.append(torch.linalg.norm(task))
        scale = (torch.linalg.norm(total) / (sum(norms) / len(norms))).item()
        merged = total / scale
    return scale * merged


def _projected(task: Tensor, merged: Tensor, alpha: float) -> Tensor:
    U, s, Vh = torch.linalg.svd(merged, full_matrices=True)
    rank = sum(1 for value in s if value > 1e-5 * s[0])
    shares = [sum(s[: i + 1].tolist()) / sum(s[:rank].tolist()) for i in range(rank)]
    k = next((i for i, share in enumerate(shares) if share > alpha), rank) if alpha < 1 else rank
    P = U.T @ task @ Vh.T
    removed = torch.zeros_like(P)
    for i in range(rank):
        for j in range(rank):
            if i == j or (i < k and j < k):
                removed[i, j] = P[i, j]
    return U @ removed @ Vh


def opcm(deltas: Sequence[Tensor], weights: Sequence[float], alpha: float = 0.5) -> Tensor:
    return opcm_model({"only": deltas}, weights, alpha)["only"]


def opcm_model(model: dict[str, Sequence[Tensor]], weights: Sequence[float], alpha: float = 0.5) -> dict[str, Tensor]:
    """All weights of a model, scaled to the mean norm of the tasks over all of them."""
    sums = {name: opcm_sum(deltas, weights, alpha) for name, deltas in model.items()}
    norm = sum(torch.linalg.norm(s) ** 2 for s in sums.values()) ** 0.5
    tasks = [sum(torch.linalg.norm(w * d[t]) ** 2 for d in model.values()) ** 0.5 for t, w in enumerate(weights)]
    return {name: s * (sum(tasks) / len(tasks)) / norm for name, s in sums.items()}


def dora(weight: Tensor, B: Tensor, A: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """The DoRA weight, row by row."""
    directed = weight + scale * (B @ A)
    return torch.stack([m * row / row.norm() for m, row in zip(magnitude, directed, strict=True)])


def reflected(weight: Tensor, rows: Tensor) -> Tensor:
    """``W H_1 ... H_r`` with each reflection as an n x n matrix."""
    for u in rows:
        weight = weight @ (torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(u, u) / (u @ u))
    return weight


def rotated(weight: Tensor, triangles: Tensor, size: int, map: str, degree: int) -> Tensor:
    """``W Q^T`` with the n x n block-diagonal rotation ``Q``; one triangle is shared by all blocks."""
    blocks = []
    for entries in triangles:
        S = torch.zeros(size, size, dtype=entries.dtype)
        position = 0
        for i in range(size):
            for j in range(i + 1, size):
                S[i, j], S[j, i] = entries[position], -entries[position]
                position += 1
        eye = torch.eye(size, dtype=entries.dtype)
        if map == "cayley":
            blocks.append((eye + S) @ torch.linalg.inv(eye - S))
        else:
            size_of_S = (entries**2).sum().sqrt()  # ||S||_F / sqrt(2)
            S = S / size_of_S if size_of_S > 1 and degree > 1 else S
            powers = sum((torch.linalg.matrix_power(S, i) for i in range(1, degree)), eye)
            blocks.append((eye + S) @ powers)
    blocks = blocks * (weight.shape[1] // size) if len(blocks) == 1 else blocks
    return weight @ torch.block_diag(*blocks).T
