"""Sparse cores: which entries of a (k, k) matrix are trained, and its product with a dense matrix.

Entries are flat row-major indices ``i k + j``, ascending, on the CPU: they follow from a configuration and the bases,
and are never saved.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

from orthoft.bases import fingerprint

Pattern = Literal["plain", "banded", "random", "top_k"]


def entry_count(k: int, off_diagonals: int) -> int:
    """Return the number of entries with ``|i - j| <= d``: ``k (2 d + 1) - d (d + 1)``, all from d = k - 1 on."""
    d = min(off_diagonals, k - 1)
    return k * (2 * d + 1) - d * (d + 1)


def find_entries(pattern: Pattern, off_diagonals: int, U: Tensor, V: Tensor, name: str) -> Tensor:
    """Return the entries of a pattern for the bases ``U`` (m, k) and ``V`` (k, n); ``name`` seeds the random one."""
    k = V.shape[0]
    if pattern == "random":
        return random_entries(k, entry_count(k, off_diagonals), name)
    if pattern == "top_k":
        return top_entries(U, V, entry_count(k, off_diagonals))
    return banded_entries(k, 0 if pattern == "plain" else off_diagonals)


def banded_entries(k: int, off_diagonals: int) -> Tensor:
    """Return the entries with ``|i - j| <= off_diagonals``."""
    d = min(off_diagonals, k - 1)
    i = torch.arange(k)[:, None]
    j = i + torch.arange(-d, d + 1)  # (k, 2d + 1)
    return (i * k + j)[(j >= 0) & (j < k)]


def random_entries(k: int, count: int, name: str) -> Tensor:
    """Return ``count`` distinct entries, uniform over the whole matrix; the diagonal has no privilege, as in the paper.

    The generator is seeded by ``name``, so that layers differ and their order does not matter.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    chosen = torch.randperm(k * k, generator=torch.Generator().manual_seed(seed))[:count]
    return chosen.sort().values


def top_entries(U: Tensor, V: Tensor, count: int) -> Tensor:
    """Return the ``count`` entries with the largest ``|u_i^T v_j|``, for ``U`` (n, k) and rows ``V`` (k, n).

    Computed in float64 and rounded to 2^-20, ties to the smaller index: rounding noise must not choose, since the
    entries are found again when an adapter is loaded.

    Raises:
        ValueError: the vectors have different lengths, so that there is no such product.
    """
    if U.shape[0] != V.shape[1]:
        raise ValueError(
            f"top_k compares left with right singular vectors, which needs a square weight, got ({U.shape[0]}, "
            f"{V.shape[1]}): choose another pattern, or leave this layer out with exclude_modules"
        )
    scores = (U.double().mT @ V.double().mT).abs().flatten()  # (k k,)
    order = torch.sort(torch.round(scores * 2**20), descending=True, stable=True).indices
    return order[:count].sort().values.cpu()


def compressed(entries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the column of each entry (nnz,) and where each row begins (k,): compressed sparse rows."""
    return entries % k, torch.searchsorted(entries, torch.arange(k) * k)


def sparse_product(values: Tensor, cols: Tensor, offsets: Tensor, Z: Tensor) -> Tensor:
    """Return ``M Z`` for the (k, k) matrix in compressed rows and ``Z`` (k, t), in the dtype of ``Z``.

    A row of the result is a weighted sum of rows of ``Z``, which is an embedding bag: far faster than torch's sparse
    tensors, forward and backward, in every float dtype; the gradient of ``values`` takes nnz dot products only.
    """
    return torch.nn.functional.embedding_bag(
        cols, Z, offsets, mode="sum", per_sample_weights=values.to(Z.dtype)
    )  # (k, t)


def spectral_fingerprint(U: Tensor, V: Tensor, entries: Tensor) -> Tensor:
    """Return the numbers (17,) by which ``U`` (m, k), ``V`` (k, n) and the entries of the core are known."""
    scattered = (entries.cpu() * 2654435761) % 2**20  # Knuth's multiplicative hash
    checksum = (scattered.sum() % 2**20) / 2**20
    return torch.cat([fingerprint(U.mT), fingerprint(V), checksum.reshape(1).float()])
