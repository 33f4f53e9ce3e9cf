"""Core Space: common bases of all low-rank changes, exact and small. arXiv 2509.17786."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from orthoft.delta import Delta, LowRank
from orthoft.merging.spaces.registry import Decode, space

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
    return U, torch.split(s[:, None] * Vh, sizes, dim=1)


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
