"""Bases that adapters take from the frozen weight: singular vectors with fixed signs, fingerprints, products."""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import torch
from torch import Tensor

from orthoft.linalg import RotationMap, rotation_update

SVD = Literal["full", "lowrank"]


def generator_of(name: str) -> torch.Generator:
    """Return a generator seeded by a name: what it draws differs from layer to layer, not by the order of layers."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))


def signed_svd(
    weight: Tensor, rank: int | None = None, svd: SVD = "full", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U`` (m, k), ``s`` (k,), ``Vh`` (k, n) of the leading k = ``rank`` (or all min(m, n)) singular triplets.

    The entry of largest magnitude in each row of ``Vh`` is positive: signs are otherwise arbitrary, and would make two
    computations on the same weight disagree. "lowrank" is the randomised range finder with ten power iterations
    (arXiv 0909.4061), seeded on the CPU so that it does not depend on the device.

    Raises:
        ValueError: a rank above min(m, n), an empty weight, or one with NaN or Inf.
    """
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise ValueError("a weight with NaN or Inf has no singular vectors: the base model seems broken")
    if rank is not None and not 1 <= rank <= min(weight.shape):
        raise ValueError(f"a weight of {tuple(weight.shape)} has {min(weight.shape)} singular vectors, not {rank}")
    if svd == "lowrank" and rank is not None:
        range_ = _leading_range(weight, min(rank + 10, *weight.shape), seed)  # (m, k + 10)
        U, s, Vh = torch.linalg.svd(range_.mT @ weight, full_matrices=False)
        U = range_ @ U
    else:
        U, s, Vh = torch.linalg.svd(weight, full_matrices=False)
    U, s, Vh = U[:, :rank], s[:rank], Vh[:rank]
    signs = torch.sign(Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True)))  # (k, 1)
    return U * signs.mT, s, Vh * signs


def _leading_range(weight: Tensor, size: int, seed: int, iterations: int = 10) -> Tensor:
    start = torch.randn(weight.shape[1], size, generator=torch.Generator().manual_seed(seed))
    Q: Tensor = torch.linalg.qr(weight @ start.to(weight)).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(weight @ torch.linalg.qr(weight.mT @ Q).Q).Q
    return Q


def subspace_update(
    entries: Tensor, size: int, map: RotationMap, degree: int, alpha: Tensor | None = None, beta: Tensor | None = None
) -> Tensor:
    """Return ``C - I`` (r, r) of ``C = diag(beta) R diag(alpha)``, ``R`` the rotation with the skew ``entries``.

    Summed as ``diag(beta) (R - I) diag(alpha) + diag(alpha beta - 1)``, which keeps small angles exact. ``alpha`` and
    ``beta`` (r,) scale on the input and the output side; without them ``C = R``. PSOFT, arXiv 2505.11235.
    """
    update = rotation_update(entries, size, map, degree)
    if alpha is None or beta is None:
        return update
    return beta[:, None] * update * alpha + torch.diag(alpha * beta - 1)


def add_subspace_product(x: Tensor, basis: Tensor, update: Tensor) -> Tensor:
    """Return ``x (I + B^T D B)`` for rows ``x`` (..., n), a frozen basis ``B`` (r, n) and ``D`` (r, r).

    ``x`` may have any dtype; basis and update are cast to it, ``x`` never is. The update stands between the two thin
    products, so that backward needs ``x B^T`` (..., r) and not ``x``, and no third thin product.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    basis = basis.to(x.dtype)
    thin = rows @ basis.mT @ update.to(x.dtype)  # (rows, r)
    return torch.addmm(rows, thin, basis).reshape(x.shape)


def fingerprint(rows: Tensor, size: int = 8) -> Tensor:
    """Return ``size`` numbers ``r_j^T B g_j / sqrt(k)`` of a basis ``B`` (k, n) with unit rows, float32 on the CPU.

    ``r_j``, ``g_j`` are seeded Gaussian vectors. The numbers are of order 1, do not change with rounding, and do when a
    single row changes its sign or turns within a degenerate subspace.
    """
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(size, rows.shape[0], generator=generator, dtype=torch.float64)
    right = torch.randn(size, rows.shape[1], generator=generator, dtype=torch.float64)
    product = right @ rows.detach().to("cpu", torch.float64).mT  # (size, k)
    return ((left * product).sum(1) / math.sqrt(rows.shape[0])).float()


def check_fingerprint(saved: Tensor, found: Tensor, what: str, tolerance: float = 5e-3) -> None:
    """Compare the fingerprints of the basis an adapter was trained in and of the one it meets.

    Raises:
        ValueError: they differ by more than ``tolerance``.
    """
    distance = (saved.float().cpu() - found.float().cpu()).abs().max().item()
    if not distance <= tolerance:
        raise ValueError(
            f"{what} was trained in another basis than this base weight gives (fingerprints differ by {distance:.2g}): "
            "load it on the base it was trained on, in the same dtype, or train it with save_basis=True"
        )
