"""Sparse cores between singular vectors: which entries of a (k, k) matrix are trained, and its products.

Entries are flat row-major indices ``i k + j``, ascending, on the CPU: they follow from a configuration and the bases,
and are never saved.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from orthoft.bases import SVD, fingerprint, generator_of, signed_svd

Pattern = Literal["plain", "banded", "random", "top_k"]


def entry_count(k: int, off_diagonals: int) -> int:
    """Return the number of entries with ``|i - j| <= d``: ``k (2 d + 1) - d (d + 1)``, all from d = k - 1 on."""
    d = min(off_diagonals, k - 1)
    return k * (2 * d + 1) - d * (d + 1)


def core_size(count: int, off_diagonals: int) -> int:
    """Return the k of a core with ``count`` entries: the inverse of `entry_count`."""
    k = (count + off_diagonals * (off_diagonals + 1)) // (2 * off_diagonals + 1)
    return k if k > off_diagonals else math.isqrt(count)


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
    chosen = torch.randperm(k * k, generator=generator_of(name))[:count]
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


def weight_is_cheaper(tokens: int, shape: tuple[int, int], k: int, *, chain: bool, known: bool, training: bool) -> bool:
    """Say which schedule takes fewer multiplications for T tokens, an (m, n) weight and k singular vectors.

    On activations: ``T k (m + n)``, and ``T m n`` for the frozen layer unless the chain replaces it; backward as many.
    On the weight: ``T m n + k m n`` for the output and ``U (M V)``; backward ``T m n`` each for the gradients of the
    input and of the weight, ``k m n`` for ``U^T`` times the latter. A weight that is not known takes the frozen layer
    besides, ``T m n`` forward and backward. At width d: 2 against ``1.5 + d / T`` times the frozen layer's own cost.
    """
    m, n = shape
    passes = 2 if training else 1
    on_activations = passes * tokens * (k * (m + n) + (0 if chain else m * n))
    on_weight = (3 * tokens + 2 * k if training else tokens + k) * m * n + (0 if known else passes * tokens * m * n)
    return on_weight < on_activations


def sparse_product(values: Tensor, cols: Tensor, offsets: Tensor, Z: Tensor) -> Tensor:
    """Return ``M Z`` for the (k, k) matrix in compressed rows and ``Z`` (k, t), in the dtype of ``Z``.

    A row of the result is a weighted sum of rows of ``Z``, which is an embedding bag: far faster than torch's sparse
    tensors, forward and backward, in every float dtype; the gradient of ``values`` takes nnz dot products only.
    """
    return torch.nn.functional.embedding_bag(
        cols, Z, offsets, mode="sum", per_sample_weights=values.to(Z.dtype)
    )  # (k, t)


def spectral_bases(weight: Tensor, rank: int | None, svd: SVD, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U`` (m, k), the singular values (k,) and ``V`` (k, n) of a weight in its own dtype.

    Found in float64: in float32 neighbouring singular vectors are determined to some 1e-3 only, which differs from
    machine to machine.
    """
    precise = weight.to("cpu" if weight.device.type == "mps" else weight.device, torch.float64)  # MPS has none
    U, s, V = (part.to(weight.device, weight.dtype).contiguous() for part in signed_svd(precise, rank, svd, seed))
    return U, s, V


def spectral_fingerprint(U: Tensor, V: Tensor, entries: Tensor) -> Tensor:
    """Return the numbers (17,) by which ``U`` (m, k), ``V`` (k, n) and the entries of the core are known."""
    scattered = (entries.cpu() * 2654435761) % 2**20  # Knuth's multiplicative hash
    checksum = (scattered.sum() % 2**20) / 2**20
    return torch.cat([fingerprint(U.mT), fingerprint(V), checksum.reshape(1).float()])
