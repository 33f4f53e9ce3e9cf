"""What a fine-tuning did to one weight: ``W' = W + delta``, kept in factors for as long as it can be."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from orthoft.linalg import add_block_product, at_least_float32


class Delta(ABC):
    """The change of one (m, n) weight. ``dense`` is the meaning; everything else has a default that uses it."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n): outputs, inputs."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the change as an (m, n) tensor."""

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return ``B`` (m, r), ``A`` (r, n) with ``delta = B A``, or None without such a form below full rank."""
        return None

    def rank(self) -> int | None:
        """Return the number of columns of ``B``, an upper bound of the rank, or None without factors."""
        factors = self.factors()
        return None if factors is None else factors[0].shape[1]

    def norm(self) -> Tensor:
        """Return the Frobenius norm, a scalar tensor."""
        norm: Tensor = torch.linalg.vector_norm(self.dense())
        return norm

    def scaled(self, scale: float) -> Delta:
        """Return ``scale * delta``."""
        return Dense(scale * self.dense())

    def transposed(self) -> Delta:
        """Return the (n, m) change of the transposed weight."""
        return Dense(self.dense().mT)

    def upcast(self) -> Delta:
        """Return the change with its parts in float32 or more."""
        return Dense(at_least_float32(self.dense()))

    def truncated(self, rank: int) -> tuple[LowRank, Tensor]:
        """Return the best approximation of at most this rank, and the Frobenius norm of what it leaves out.

        By SVD in float64, of the (r, r) core where there are factors, never of the (m, n) product then. ``B`` carries
        the singular values, the rows of ``A`` are orthonormal.
        """
        factors = self.factors()
        parts = (self.dense(),) if factors is None else factors
        dtype = torch.promote_types(parts[0].dtype, torch.float32)
        U, s, Vh = _thin_svd(*(part.double() for part in parts))
        kept = LowRank((U[:, :rank] * s[:rank]).to(dtype), Vh[:rank].to(dtype).contiguous())
        return kept, torch.linalg.vector_norm(s[rank:])


class Dense(Delta):
    """A change stored entry by entry."""

    def __init__(self, d: Tensor) -> None:
        if d.ndim != 2:
            raise ValueError(f"a dense delta is a matrix, got shape {tuple(d.shape)}")
        self.d = d

    @property
    def shape(self) -> tuple[int, int]:
        return self.d.shape[0], self.d.shape[1]

    def dense(self) -> Tensor:
        return self.d


class LowRank(Delta):
    """``delta = B A`` with ``B`` (m, r) and ``A`` (r, n): LoRA with its scale inside ``B``, HRA, PSOFT."""

    def __init__(self, B: Tensor, A: Tensor) -> None:
        if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
            raise ValueError(f"factors must be (m, r) and (r, n), got {tuple(B.shape)} and {tuple(A.shape)}")
        self.B, self.A = B, A

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    def dense(self) -> Tensor:
        return self.B @ self.A

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.B, self.A

    def norm(self) -> Tensor:
        """``||B A||_F = ||R_B R_A^T||_F`` from two QR factorisations: no (m, n) product, and stable where the Gram form
        is not (reflections near the identity cancel in ``B A``)."""
        r_b = torch.linalg.qr(self.B, mode="r").R
        r_a = torch.linalg.qr(self.A.mT, mode="r").R
        norm: Tensor = torch.linalg.vector_norm(r_b @ r_a.mT)
        return norm

    def scaled(self, scale: float) -> LowRank:
        return LowRank(scale * self.B, self.A)

    def transposed(self) -> LowRank:
        return LowRank(self.A.mT, self.B.mT)

    def upcast(self) -> LowRank:
        return LowRank(at_least_float32(self.B), at_least_float32(self.A))


class Rotated(Delta):
    """``delta = W Q^T - W`` of a block rotation, stored as the weight and the blocks of ``Q^T - I`` (g, b, b)."""

    def __init__(self, weight: Tensor, update: Tensor) -> None:
        if weight.shape[1] % update.shape[-1]:
            raise ValueError(f"blocks of {update.shape[-1]} do not divide the {weight.shape[1]} inputs of the weight")
        self.weight, self.update = weight, update

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def dense(self) -> Tensor:
        return add_block_product(self.weight, self.update) - self.weight

    def upcast(self) -> Rotated:
        return Rotated(at_least_float32(self.weight), at_least_float32(self.update))


def _thin_svd(left: Tensor, right: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD of ``left``, or of ``left @ right`` (m, r), (r, n) through QR of both."""
    if right is None:
        U, s, Vh = torch.linalg.svd(left, full_matrices=False)
        return U, s, Vh
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right.mT)
    U, s, Vh = torch.linalg.svd(R_left @ R_right.mT, full_matrices=False)
    return Q_left @ U, s, Vh @ Q_right.mT
