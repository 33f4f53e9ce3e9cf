"""A few leading eigenvectors of a large symmetric operator, without the rest of its spectrum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import eigh, qr

DENSE = 512  # sizes at which all eigenvectors cost no more
OVERSAMPLING = 8  # columns of a block beyond those that are wanted
TOLERANCE = 1e-9  # of a residual, relative to the largest eigenvalue


def leading_eigenvectors(apply: Callable[[Tensor], Tensor], n: int, r: int, like: Tensor) -> Tensor:
    """Return the eigenvectors (n, r) of the r largest eigenvalues, the largest first, of a symmetric operator.

    Block Lanczos: a basis ``P`` (n, k) of the Krylov space of a random block grows until the Ritz pairs of
    ``H = P^T A P`` leave residuals ``|A v - theta v| <= 1e-9 theta_max``. It costs ``k / b`` products with blocks of
    ``b = r + 8`` columns and ``2 n k^2`` to keep ``P`` orthonormal, where all eigenvectors cost some ``9 n^3``. A small
    operator, or one whose spectrum is so flat that the basis would become half the space, is taken apart whole.

    Args:
        apply: the product with a matrix (n, b).
        like: whose dtype (float64) and device are taken.
    """
    b = r + OVERSAMPLING
    if n <= max(DENSE, 4 * b):
        return _all(apply, n, like)[:, :r]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, b, generator=generator, dtype=like.dtype).to(like.device)
    P, H = qr(start).Q, like.new_zeros(0, 0)
    while P.shape[1] <= n // 2:
        product = apply(P[:, -b:])
        H = _grown(H, P.mT @ product)
        values, Y = eigh(H)
        product = product - P @ (P.mT @ product)
        Q, B = qr(product - P @ (P.mT @ product))  # twice: once leaves what rounding brought back
        residual = torch.linalg.vector_norm(B @ Y[-b:, -r:], dim=0).max()
        if residual <= TOLERANCE * values.abs().max():
            found: Tensor = (P @ Y[:, -r:]).flip(1)
            return found
        P = torch.cat([P, qr(Q - P @ (P.mT @ Q)).Q], 1)  # where the block lost rank, its columns are new directions
    return _all(apply, n, like)[:, :r]


def _grown(H: Tensor, columns: Tensor) -> Tensor:
    """Return ``H`` with its next block of columns (k, b), which are its next rows as well."""
    k, b = columns.shape
    grown = columns.new_zeros(k, k)
    grown[: k - b, : k - b] = H
    grown[:, k - b :] = columns
    grown[k - b :, :] = columns.mT
    return (grown + grown.mT) / 2


def _all(apply: Callable[[Tensor], Tensor], n: int, like: Tensor) -> Tensor:
    """Return all eigenvectors (n, n), that of the largest eigenvalue first."""
    A = apply(torch.eye(n, dtype=like.dtype, device=like.device))
    vectors: Tensor = eigh((A + A.mT) / 2).eigenvectors.flip(1)
    return vectors
