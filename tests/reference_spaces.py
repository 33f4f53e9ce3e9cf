"""Oracles for the spaces: concatenated SVDs and n x n rotations on dense float64 matrices, without shortcuts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Merge = Callable[[Sequence[Tensor], Sequence[float]], Tensor]


def knots(deltas: Sequence[Tensor], weights: Sequence[float], merge: Merge) -> Tensor:
    """``U merge(diag(s) V_t^T)`` from the SVD of the (m, Tn) concatenation."""
    U, s, Vh = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=False)
    kept = s > 1e-5 * s[0]
    tasks = (torch.diag(s[kept]) @ Vh[kept]).split(deltas[0].shape[1], dim=1)
    return U[:, kept] @ merge(tasks, weights)


def cayley(S: Tensor) -> Tensor:
    eye = torch.eye(len(S), dtype=S.dtype)
    return (eye + S) @ torch.linalg.inv(eye - S)


def generator(rotation: Tensor, chart: str) -> Tensor:
    """The skew matrix of an n x n rotation: by the Cayley map, or as the logarithm of its eigenvalues."""
    eye = torch.eye(len(rotation), dtype=rotation.dtype)
    if chart == "cayley":
        return torch.linalg.inv(rotation + eye) @ (rotation - eye)
    values, vectors = torch.linalg.eig(rotation)
    return (vectors @ torch.diag(1j * values.angle()) @ torch.linalg.inv(vectors)).real


def averaged(rotations: Sequence[Tensor], weights: Sequence[float], chart: str = "cayley") -> Tensor:
    """The sum of the generators at their mean length, as an n x n rotation."""
    generators = [w * generator(rotation, chart) for w, rotation in zip(weights, rotations, strict=True)]
    total = sum(generators[1:], generators[0])
    lengths = [Q.norm() for Q in generators]
    total = total * (sum(lengths) / len(lengths)) / total.norm()
    return cayley(total) if chart == "cayley" else torch.matrix_exp(total)


def procrustes(weight: Tensor, target: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(weight.T @ target)
    return U @ Vh


def decoupled(
    weight: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], merge: Merge, conflict: bool = False
) -> Tensor:
    """The change ``W R + merge(E_t) - W`` with the plain Procrustes rotations."""
    mean = sum(deltas[1:], deltas[0]) / len(deltas)
    rotations = []
    for delta in deltas:
        target = weight + delta
        if conflict:
            for row in range(len(weight)):
                if delta[row] @ mean[row] >= 0:
                    target[row] = weight[row]
        rotations.append(procrustes(weight, target))
    residuals = [weight + delta - weight @ R for delta, R in zip(deltas, rotations, strict=True)]
    return weight @ averaged(rotations, weights) + merge(residuals, weights) - weight
