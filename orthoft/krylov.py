"""Leading singular triplets of a dense matrix, without its whole SVD."""

from __future__ import annotations

import torch
from torch import Tensor

CONVERGED = 1e-5  # residual of each triplet, relative to the largest singular value
SEED = 0  # of the first block; the result does not depend on it but for rounding

Triplets = tuple[Tensor, Tensor, Tensor]


def leading_triplets(matrix: Tensor, rank: int) -> Triplets:
    """Return ``U`` (m, k), ``s`` (k,), ``Vh`` (k, n) in float64 of the best approximation of rank k, or of full rank.

    Block Krylov: an orthonormal ``V`` grows by ``A^T A V``, the triplets are those of ``A V`` (Rayleigh-Ritz by its
    Gram matrix in float64), until ``||A^T u_i - s_i v_i|| < 1e-5 s_1`` for all. The error of the approximation is
    second order in that residual. Spectra so flat that a third of all directions does not get there, and ranks that are
    not small, take the SVD. arXiv 1504.05477.
    """
    found = _krylov(matrix, rank) if 0 < 8 * rank <= min(matrix.shape) else None
    if found is not None:
        return found
    U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return U[:, :rank], s[:rank], Vh[:rank]


def _krylov(A: Tensor, k: int) -> Triplets | None:
    block, random = max(16, min(k, 64)), torch.Generator().manual_seed(SEED)
    start = torch.randn(A.shape[1], block, generator=random).to(A)
    V = torch.linalg.qr(start).Q  # (n, size)
    AV = A @ V  # (m, size)
    while V.shape[1] <= max(min(A.shape) // 3, 2 * block):
        squares, W = torch.linalg.eigh(AV.double().mT @ AV.double())
        if squares[-k] <= 1e-12 * squares[-1]:
            return None  # of lower rank than asked for: nothing to divide by
        s, W = squares[-k:].flip(0).sqrt(), W[:, -k:].flip(1)
        U, right = AV.double() @ W / s, V.double() @ W  # (m, k), (n, k)
        residual = (A.mT @ U.to(A)).double() - right * s
        if torch.linalg.vector_norm(residual, dim=0).max() < CONVERGED * s[0]:
            return U, s, right.mT
        V, AV = _grown(A, V, AV, block)
    return None


def _grown(A: Tensor, V: Tensor, AV: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return ``V`` and ``A V`` with one more block, made orthonormal twice: what is left after the first time may be
    rounding, which only shows its share of ``V`` once it has length 1."""
    new = A.mT @ AV[:, -block:]
    for _ in range(2):
        new = torch.linalg.qr(new - V @ (V.mT @ new)).Q
    return torch.cat([V, new], 1), torch.cat([AV, A @ new], 1)
