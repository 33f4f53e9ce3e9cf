"""Singular values and vectors on the numerical range of a matrix: what the spectral methods share.

Everything goes through the smaller Gram matrix in float64. Its eigenvalues are the squares of the singular values, so a
singular value of relative size c is known to about 1e-16 / c^2: at the end of the range, c = 1e-5, that is the error of
a float32 SVD, and far less above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from orthoft.linalg import frobenius_norm

RANGE = 1e-5  # singular values below this share of the largest are rounding errors of float32 deltas
ABSENT = 1e-9  # a task below this share of the largest is a rounding error of the coordinates, of a task that is zero
RESOLVED = 1e-3  # eigenvalues above this share of the largest are not touched by the rounding of a float32 Gram matrix

Range = Literal["numerical", "full"]
Triplets = tuple[Tensor, Tensor, Tensor]


def range_svd(matrix: Tensor, floor: float = 0.0) -> Triplets:
    """Return the thin SVD ``U`` (m, r), ``s`` (r,), ``Vh`` (r, n) of a matrix (m, n) on its numerical range.

    Singular values of at most `RANGE` times the largest, or of at most ``floor``, are left out: a zero has r = 0.
    """
    tall = _tall(matrix).double()  # (a, b), a >= b
    squares, V = torch.linalg.eigh(tall.mT @ tall)
    s = squares.clamp(min=0).sqrt()
    kept = s > (RANGE * s[-1:]).clamp(min=floor)
    s, V = s[kept].flip(0), V[:, kept].flip(1)
    return _oriented(matrix, tall @ V / s, s, V)


def leading_svd(matrix: Tensor, count: int, floor: float = 0.0) -> Triplets:
    """Return the first ``count`` triplets of `range_svd`, or all if they are fewer.

    Those of a matrix of lower rank come from a sketch that holds all of it. A few triplets of a float32 matrix come
    from the float32 Gram matrix, at half the time, unless they reach below its precision: it gives the subspace, and
    the triplets within it are those of a float64 SVD.
    """
    if (sketched := _sketched(matrix, count, floor)) is not None:
        return sketched
    if matrix.dtype == torch.float32 and 0 < 4 * count <= min(matrix.shape):
        tall = _tall(matrix)
        squares, V = torch.linalg.eigh(tall.mT @ tall)
        if squares[-count] > max(RESOLVED * squares[-1].item(), floor**2):
            V = V[:, -count:]  # (b, count)
            U, s, Wh = range_svd(tall @ V)
            return _oriented(matrix, U, s, V @ Wh.mT)
    U, s, Vh = range_svd(matrix, floor)
    return U[:, :count], s[:count], Vh[:count]


def _sketched(matrix: Tensor, count: int, floor: float) -> Triplets | None:
    """Return the first triplets of a matrix of rank ``count + 8`` or less, None of any other.

    The products with as many random vectors span its range; whether they do is checked on the whole matrix.
    """
    size = count + 8
    if 4 * size > min(matrix.shape):
        return None
    random = torch.randn(matrix.shape[1], size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Q = torch.linalg.qr(matrix @ random.to(matrix)).Q
    Q = torch.linalg.qr(matrix @ (matrix.mT @ Q)).Q  # (m, size), once more for the directions that came out short
    within = Q.mT @ matrix  # (size, n)
    exact = 16 * torch.finfo(matrix.dtype).eps
    if frobenius_norm(matrix - Q @ within) > exact * frobenius_norm(matrix):
        return None
    U, s, Vh = range_svd(within, floor)
    return (Q @ U)[:, :count], s[:count], Vh[:count]


def svd(matrix: Tensor, range: Range, count: int | None = None, floor: float = 0.0) -> Triplets:
    """Return the first triplets (all for None): of the numerical range, or of all min(m, n) as the published codes.

    Below the numerical range the vectors are arbitrary, and differ between machines and precisions.
    """
    if range == "numerical":
        return range_svd(matrix, floor) if count is None else leading_svd(matrix, count, floor)
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :count], s[:count], Vh[:count]


def polar(matrix: Tensor, range: Range = "numerical") -> Tensor:
    """Return the polar factor ``U V^T`` (m, n): a partial isometry where the matrix has no full numerical rank."""
    U, _, Vh = svd(matrix, range)
    return U @ Vh


def isotropised(matrix: Tensor, range: Range = "numerical") -> Tensor:
    """Return ``mean(s) U V^T`` (m, n): all singular values on the range replaced by their mean. arXiv 2502.04959."""
    U, s, Vh = svd(matrix, range)
    return s.sum() / max(1, len(s)) * (U @ Vh)


def numerical_rank(matrix: Tensor) -> int:
    """Return the number of singular values above `RANGE` times the largest."""
    tall = _tall(matrix).double()
    squares = torch.linalg.eigvalsh(tall.mT @ tall)
    return int((squares > RANGE**2 * squares[-1:]).sum().item())


def largest_norm(tasks: Tensor) -> float:
    """Return the Frobenius norm of the largest of the tasks (T, p, q)."""
    return float(frobenius_norm(tasks, 1).max())


def changing(tasks: Tensor) -> list[Tensor]:
    """Return those of the tasks (T, p, q) that change the weight: not zero, nor rounding errors of zero."""
    least = ABSENT * largest_norm(tasks)
    return [task for task in tasks if frobenius_norm(task) > least]


def joint_rank(tasks: Sequence[Tensor]) -> int:
    """Return ``R``: the rank of the tasks (m, n) side by side, or of them stacked, whichever is less.

    Each task counts with norm 1, so that weights have no influence. ``R = min(m, n)`` if one task has full rank, and
    ``R = sum_t r_t`` for low-rank tasks that share no direction, in whatever coordinates.
    """
    norms = [frobenius_norm(task).item() for task in tasks]
    scaled = [task / norm for task, norm in zip(tasks, norms, strict=True) if norm > 0]
    if not scaled:
        return 0
    combined: Tensor = sum(((i + 2) * task for i, task in enumerate(scaled[1:])), scaled[0])
    full = min(combined.shape)
    if numerical_rank(combined) == full:  # the rank of a combination is a lower bound, and cheaper than the rest
        return full
    return min(numerical_rank(torch.cat(scaled, 1)), numerical_rank(torch.cat(scaled, 0)))


def participants(tasks: Tensor, range: Range) -> tuple[list[Tensor], int]:
    """Return the tasks that change the weight and their joint rank; all and min(p, q) in the published form."""
    if range == "full":
        return list(tasks), min(tasks.shape[1:])
    changed = changing(tasks)
    return changed, joint_rank(changed)


def whitened_product(parts: Sequence[Triplets], range: Range = "numerical") -> Tensor:
    """Return ``polar([U_1 ... U_T]) diag(s_1 ... s_T) polar([V_1 ... V_T])^T`` (m, n) of at least one part."""
    U = polar(torch.cat([U for U, _, _ in parts], 1), range)  # (m, K)
    V = polar(torch.cat([Vh for _, _, Vh in parts]), range)  # (K, n)
    return U * torch.cat([s for _, s, _ in parts]) @ V


def _tall(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[0] < matrix.shape[1] else matrix


def _oriented(matrix: Tensor, U: Tensor, s: Tensor, V: Tensor) -> Triplets:
    """Return the triplets of ``matrix``, in its dtype, from those of ``_tall(matrix)``."""
    left, right = (V, U) if matrix.shape[0] < matrix.shape[1] else (U, V)
    return left.to(matrix.dtype), s.to(matrix.dtype), right.mT.to(matrix.dtype)
