"""Core Space: common bases of all factors. arXiv 2509.17786."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orthoft.delta import Delta, LowRank
from orthoft.merging.spaces.registry import Decode, space


@space("core", needs_factors=True, keeps_factors=True)
def core(deltas: Sequence[Delta], base: Tensor | None, weights: Tensor) -> tuple[Tensor, Decode]:
    """``U^T D_t V`` in the bases of the stacked factors, exact, at cost O((m + n) R^2), R the sum of the ranks.

    ``U`` (m, p) are the left singular vectors of ``[B_1 ... B_T]``, ``V`` (n, q) the right ones of the stacked ``A_t``,
    p, q <= R. In float64, as in the paper, of tall matrices, whose SVD is several times faster than that of wide ones.
    """
    factors = [f for delta in deltas if (f := delta.factors()) is not None]
    dtype = factors[0][0].dtype
    U, left = _bases([B for B, _ in factors])  # (m, p), U^T B_t (p, r_t)
    V, right = _bases([A.mT for _, A in factors])  # (n, q), V^T A_t^T (q, r_t)
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


def _bases(parts: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the left singular vectors (m, p) of matrices (m, r_t) side by side, and each of them in these (p, r_t)."""
    U, s, Vh = torch.linalg.svd(torch.cat(list(parts), 1).double(), full_matrices=False)
    return U, (s[:, None] * Vh).split([part.shape[1] for part in parts], dim=1)
