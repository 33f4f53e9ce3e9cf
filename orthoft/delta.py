"""What a fine-tuning did to one weight: ``W' = W + delta``, kept in factors for as long as it can be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from orthoft.krylov import leading_triplets
from orthoft.linalg import add_block_product, at_least, at_least_float32, frobenius_norm


class Delta(ABC):
    """The change of one (m, n) weight. ``dense`` is the meaning; everything else has a default that uses it."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n): outputs, inputs."""

    @property
    def dtype(self) -> torch.dtype:
        """That of ``dense()``."""
        factors = self.factors()
        return (self.rows(0, 0) if factors is None else factors[0]).dtype

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

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows ``start`` to ``stop`` of the change, a (stop - start, n) tensor."""
        return self.dense()[start:stop]

    def part(self, start: int, stop: int) -> Delta:
        """Return the change of these rows as a delta of its own: a rotation of all rows is one of some."""
        return Dense(self.rows(start, stop))

    def norm(self) -> Tensor:
        """Return the Frobenius norm, a scalar tensor."""
        return frobenius_norm(self.dense())

    def scaled(self, scale: float) -> Delta:
        """Return ``scale * delta``."""
        return Dense(scale * self.dense())

    def transposed(self) -> Delta:
        """Return the (n, m) change of the transposed weight."""
        return Dense(self.dense().mT)

    def upcast(self, dtype: torch.dtype = torch.float32) -> Delta:
        """Return the change with its parts in this dtype or more."""
        return Dense(at_least(self.dense(), dtype))

    def truncated(self, rank: int) -> tuple[LowRank, Tensor]:
        """Return the best approximation of at most this rank, and the Frobenius norm of what it leaves out.

        In float64: by SVD of the (r, r) core where there are factors, never of the (m, n) product then, else by
        `orthoft.krylov.leading_triplets`. ``B`` carries the singular values, the rows of ``A`` are orthonormal.
        """
        factors = self.factors()
        if factors is None:
            whole = at_least_float32(self.dense())
            U, s, Vh = leading_triplets(whole, rank)
            lost = torch.linalg.vector_norm(whole - (U * s) @ Vh)
        else:
            U, s, Vh = _factored_svd(*(factor.double() for factor in factors))
            lost = torch.linalg.vector_norm(s[rank:])
        dtype = torch.promote_types((whole if factors is None else factors[0]).dtype, torch.float32)
        return LowRank((U[:, :rank] * s[:rank]).to(dtype), Vh[:rank].to(dtype).contiguous()), lost


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

    def rows(self, start: int, stop: int) -> Tensor:
        return self.B[start:stop] @ self.A

    def norm(self) -> Tensor:
        """``||B A||_F = ||R_B R_A^T||_F`` from two QR factorisations: no (m, n) product, and stable where the Gram form
        is not (reflections near the identity cancel in ``B A``)."""
        r_b = torch.linalg.qr(self.B, mode="r").R
        r_a = torch.linalg.qr(self.A.mT, mode="r").R
        return frobenius_norm(r_b @ r_a.mT)

    def scaled(self, scale: float) -> LowRank:
        return LowRank(scale * self.B, self.A)

    def transposed(self) -> LowRank:
        return LowRank(self.A.mT, self.B.mT)

    def upcast(self, dtype: torch.dtype = torch.float32) -> LowRank:
        return LowRank(at_least(self.B, dtype), at_least(self.A, dtype))


class SubspaceRotated(Delta):
    """``delta = W Q^T - W`` with ``Q^T = I + V^T (C - I) V``: HRA, and PSOFT without its scales.

    Stored as the weight, the orthonormal rows of ``V`` (r, n), and ``C - I`` (r, r) of an orthogonal ``C``; as factors,
    ``B = W V^T (C - I)`` and ``A = V``.
    """

    def __init__(self, weight: Tensor, basis: Tensor, update: Tensor) -> None:
        self.weight, self.basis, self.update = weight, basis, update
        self._product = LowRank(weight @ basis.mT @ update, basis)

    @property
    def shape(self) -> tuple[int, int]:
        return self._product.shape

    def dense(self) -> Tensor:
        return self._product.dense()

    def factors(self) -> tuple[Tensor, Tensor]:
        return self._product.factors()

    def rows(self, start: int, stop: int) -> Tensor:
        return self._product.rows(start, stop)

    def part(self, start: int, stop: int) -> SubspaceRotated:
        return SubspaceRotated(self.weight[start:stop], self.basis, self.update)

    def norm(self) -> Tensor:
        return self._product.norm()

    def scaled(self, scale: float) -> LowRank:
        return self._product.scaled(scale)

    def transposed(self) -> Transposed:
        return Transposed(self)

    def upcast(self, dtype: torch.dtype = torch.float32) -> SubspaceRotated:
        return SubspaceRotated(*(at_least(part, dtype) for part in (self.weight, self.basis, self.update)))


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

    def rows(self, start: int, stop: int) -> Tensor:
        return self.part(start, stop).dense()

    def part(self, start: int, stop: int) -> Rotated:
        return Rotated(self.weight[start:stop], self.update)

    def transposed(self) -> Transposed:
        return Transposed(self)

    def upcast(self, dtype: torch.dtype = torch.float32) -> Rotated:
        return Rotated(at_least(self.weight, dtype), at_least(self.update, dtype))


class Transposed(Delta):
    """The change of a weight that is stored inputs first, with the change of the weight itself in ``inner``."""

    def __init__(self, inner: Delta) -> None:
        self.inner = inner

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape[1], self.inner.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    def dense(self) -> Tensor:
        return self.inner.dense().mT

    def factors(self) -> tuple[Tensor, Tensor] | None:
        factors = self.inner.factors()
        return None if factors is None else (factors[1].mT, factors[0].mT)

    def norm(self) -> Tensor:
        return self.inner.norm()

    def scaled(self, scale: float) -> Delta:
        return self.inner.scaled(scale).transposed()

    def transposed(self) -> Delta:
        return self.inner

    def upcast(self, dtype: torch.dtype = torch.float32) -> Transposed:
        return Transposed(self.inner.upcast(dtype))


def of_one_dtype(deltas: Sequence[Delta]) -> list[Delta]:
    """Return the deltas with their parts in the widest of their dtypes, so that none rounds the others."""
    dtype = reduce(torch.promote_types, (delta.dtype for delta in deltas))
    return [delta if delta.dtype == dtype else delta.upcast(dtype) for delta in deltas]


def _factored_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD of ``left @ right`` (m, r), (r, n) through QR of both."""
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right.mT)
    U, s, Vh = torch.linalg.svd(R_left @ R_right.mT, full_matrices=False)
    return Q_left @ U, s, Vh @ Q_right.mT
