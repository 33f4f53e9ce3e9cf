"""KnOTS: one output basis for all tasks, each task its own inputs. arXiv 2410.19735."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orthoft.delta import Delta, LowRank
from orthoft.merging.spaces.registry import Decode, space
from orthoft.merging.spectra import RANGE

Part = tuple[Tensor, Tensor | None]  # a delta L A, or L alone


@space("knots", keeps_factors=True)
def knots(deltas: Sequence[Delta], base: Tensor | None, weights: Tensor) -> tuple[Tensor, Decode]:
    """``x_t = U^T D_t = diag(s) V_t^T`` (k, n) of the thin SVD ``[D_1 ... D_T] = U diag(s) [V_1 ... V_T]^T``.

    ``U`` are eigenvectors of ``sum_t D_t D_t^T`` within the span of the stacked ``B_t``: a problem of size R, the sum
    of the ranks, or m where that is smaller, never m x Tn. In float64, so that the Gram form resolves singular values
    down to 1e-8 of the largest; those below 1e-5 of it are dropped (the published code drops below 1e-5 itself,
    whatever the scale). Their signs, which are arbitrary, flip whole rows of all tasks alike: no entrywise election
    sees them. Equal singular values leave more than signs open, and there the result of an entrywise method is not
    unique.
    """
    frame, parts = _within_frame([delta.factors() or (delta.dense(), None) for delta in deltas])
    dtype = deltas[0].rows(0, 0).dtype
    values, vectors = torch.linalg.eigh(torch.stack([_gram(L, A) for L, A in parts]).sum(0))  # (p,) ascending, (p, p)
    kept = vectors[:, values > RANGE**2 * values[-1:].clamp(min=0)].flip(1)  # (p, k), the largest first
    rank = kept.shape[1]
    rows = min(2, deltas[0].shape[0])  # a single row would count as a vector, which only one output is
    kept = torch.nn.functional.pad(kept, (0, max(0, rows - rank)))
    turned = [((kept.mT @ L.double()).to(dtype), A) for L, A in parts]
    x = torch.stack([left if A is None else left @ A for left, A in turned])  # (T, k, n)
    U = (kept if frame is None else frame @ kept)[:, :rank].to(dtype)  # (m, k)

    def decode(merged: Tensor) -> LowRank:
        n = merged.shape[1]
        return LowRank(U, merged[:rank]) if rank <= n else LowRank(U @ merged[:rank], torch.eye(n).to(U))

    return x, decode


def _within_frame(parts: Sequence[Part]) -> tuple[Tensor | None, Sequence[Part]]:
    """Return orthonormal columns (m, R) that span all the left factors, and these in them; None where R reaches m."""
    ranks = [L.shape[1] for L, _ in parts]
    if sum(ranks) >= parts[0][0].shape[0]:
        return None, parts
    frame, R = torch.linalg.qr(torch.cat([L for L, _ in parts], 1).double())
    return frame, [(left, A) for left, (_, A) in zip(R.split(ranks, dim=1), parts, strict=True)]


def _gram(L: Tensor, A: Tensor | None) -> Tensor:
    """Return ``L A A^T L^T`` in float64."""
    L = L.double()
    if A is None:
        return L @ L.mT
    A = A.double()
    return L @ (A @ A.mT) @ L.mT
