"""Core Space: common bases of all low-rank changes, exact and small. arXiv 2509.17786."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from orthoft.delta import Delta, LowRank
from orthoft.merging.spaces.registry import Decode, space
from orthoft.merging.spectra import RANGE

Basis = Literal["svd", "qr"]
RESOLVED = 1e-8  # the share of the largest eigenvalue above which a float64 Gram matrix knows the smallest


@space("core", needs_factors=True, keeps_factors=True, commuting={"basis": "qr"})
def core(
    deltas: Sequence[Delta], base: Tensor | None, weights: Tensor, *, basis: Basis = "svd"
) -> tuple[Tensor, Decode]:
    """``U^T D_t V`` in the bases of the stacked factors, exact, at cost O((m + n) R^2), R the sum of the ranks.

    ``U`` (m, p) are the left singular vectors of ``[B_1 ... B_T]``, ``V`` (n, q) the right ones of the stacked ``A_t``,
    p, q <= R, in float64, as in the paper. ``basis="qr"`` takes the columns of QR factorisations instead, in less time:
    the first tasks then lie in the leading rows and columns. It is the default where the method commutes, which sees no
    difference.

    Singular vectors to equal values, as those of stacked ``A_t`` with orthonormal rows, are any basis of their span,
    which rounding would choose. Here it is one that follows the factors in their order (`_settled`): orthonormal rows
    themselves. What other tasks have there is rounding, but not zero, and counts for methods that count who agrees.
    """
    factors = [f for delta in deltas if (f := delta.factors()) is not None]
    dtype = factors[0][0].dtype
    U, left = _bases([B for B, _ in factors], basis)  # (m, p), U^T B_t (p, r_t)
    V, right = _bases([A.mT for _, A in factors], basis)  # (n, q), V^T A_t^T (q, r_t)
    x = torch.stack([l @ r.mT for l, r in zip(left, right, strict=True)])  # (T, p, q)
    rank = x.shape[1]
    if rank == 1 < U.shape[0]:  # a single row would count as a vector
        x = torch.nn.functional.pad(x, (0, 0, 0, 1))

    def decode(merged: Tensor) -> LowRank:
        merged = merged[:rank]
        tall = merged.shape[0] >= merged.shape[1]
        B, A = (U @ merged, V.mT) if tall else (U, merged @ V.mT)
        return LowRank(B.to(dtype), A.to(dtype))

    return x, decode


def _bases(parts: Sequence[Tensor], basis: Basis) -> tuple[Tensor, Sequence[Tensor]]:
    """Return orthonormal columns (m, p) for matrices (m, r_t) side by side, and each of them in these (p, r_t)."""
    stacked, sizes = torch.cat(list(parts), 1).double(), [part.shape[1] for part in parts]
    if basis == "qr":
        Q, R = torch.linalg.qr(stacked)
        return Q, torch.split(R, sizes, dim=1)
    U, s, Vh = _tall_svd(stacked)
    U, coordinates = _settled(U, s, Vh)
    return U, torch.split(coordinates, sizes, dim=1)


def _settled(U: Tensor, s: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``U`` (m, p) and ``diag(s) Vh`` (p, R), in a basis of their own where values in ``s`` are equal.

    Among k equal singular values ``U_k`` is turned by the eigenvectors of ``Vh_k diag(sqrt(1), ..., sqrt(R)) Vh_k^T``
    (k, k), and ``diag(s_k) Vh_k`` with it, so that the product stays: what comes out depends on their span alone, as
    the columns have different numbers. Equal are those that differ by `RANGE` of the largest at most, the rounding of
    float32 factors. Other singular vectors stay as they are.
    """
    coordinates, numbers = s[:, None] * Vh, torch.arange(1, Vh.shape[1] + 1).to(s).sqrt()
    for start, stop in pairwise([*_firsts(s.tolist()), len(s)]):
        if stop - start > 1:
            part = Vh[start:stop]
            turn = torch.linalg.eigh(part * numbers @ part.mT).eigenvectors
            U[:, start:stop] = U[:, start:stop] @ turn
            coordinates[start:stop] = turn.mT @ coordinates[start:stop]
    return U, coordinates


def _firsts(s: Sequence[float]) -> list[int]:
    """Return where groups of equal singular values begin, in values that fall."""
    firsts = [0]
    for i, value in enumerate(s):
        if s[firsts[-1]] - value > RANGE * s[0]:
            firsts.append(i)
    return firsts


def _tall_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD of (m, R) in float64, from its Gram matrix where that resolves the smallest singular value.

    With ``s_R > 1e-4 s_1`` the columns of U are orthonormal to about 1e-8 that way, at half the time.
    """
    if 0 < matrix.shape[1] <= matrix.shape[0]:
        squares, V = torch.linalg.eigh(matrix.mT @ matrix)
        if squares[0] > RESOLVED * squares[-1]:
            s, V = squares.flip(0).sqrt(), V.flip(1)
            return matrix @ V / s, s, V.mT
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U, s, Vh
