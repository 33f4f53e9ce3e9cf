"""Measures of the deltas of one weight, as pure functions: leading directions, inner products, overlaps, conflicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthoft.delta import Delta, Rotated, SubspaceRotated, Transposed
from orthoft.merging.spectra import RANGE

LEADING = 32  # singular triplets of a delta without factors
OVERSAMPLING = 8
SLICE = 1 << 22  # entries of all deltas together in a slice of rows: 16 MB
SAMPLED = 1 << 16  # entries of a delta in a sample of rows: shares are then known to about 0.002
NEIGHBOURS = 4  # rows that are sampled together


@dataclass(frozen=True)
class Leading:
    """Singular triplets ``U`` (m, k), ``s`` (k,), ``V`` (n, k) of one delta, largest first; ``rank`` if it is known."""

    U: Tensor
    s: Tensor
    V: Tensor
    rank: int | None


def leading(delta: Delta, generator: torch.Generator) -> Leading:
    """Return all singular triplets of a delta with factors, and the leading ones of another, on the numerical range.

    With factors all of them, through QR of both. Without the leading 32, from the SVD of ``D Q`` for ``Q`` (n, 40) that
    spans ``(D^T D)^2 X`` for a Gaussian ``X``: exact up to 40 rows or columns or a rank of 40; else values come out too
    small, never too large, by a few per cent at the end of a decaying spectrum, by up to 15 % where it is flat. arXiv
    0909.4061.
    """
    if delta.rank() is not None:
        kept, _ = delta.truncated(min(delta.shape))
        s = torch.linalg.vector_norm(kept.B, dim=0)
        return _ranged(kept.B / s.clamp(min=torch.finfo(s.dtype).tiny), s, kept.A.mT, complete=True, most=len(s))
    D = delta.dense()
    k = min(LEADING + OVERSAMPLING, *D.shape)
    X = torch.randn(D.shape[1], k, generator=generator, dtype=D.dtype).to(D.device)
    for _ in range(2):
        Q = torch.linalg.qr(D @ X).Q  # (m, k)
        X = torch.linalg.qr(D.mT @ Q).Q  # (n, k)
    Y = D @ X
    U, s, Wh = torch.linalg.svd(Y.double(), full_matrices=False)
    return _ranged(U.to(D.dtype), s.to(D.dtype), X @ Wh.mT.to(D.dtype), complete=k == min(D.shape), most=LEADING)


def _ranged(U: Tensor, s: Tensor, V: Tensor, complete: bool, most: int) -> Leading:
    rank = int((s > RANGE * s[:1]).sum()) if s.numel() and s[0] > 0 else 0
    kept = min(rank, most)
    return Leading(U[:, :kept], s[:kept], V[:, :kept], rank if complete or rank < len(s) else None)


def spectrum(delta: Delta, generator: torch.Generator) -> tuple[Tensor, int | None]:
    """Return the singular values of a delta, as `leading` has them, and its rank if it is known; no vectors."""
    factors = delta.factors()
    if factors is None:
        found = leading(delta, generator)
        return found.s, found.rank
    r_b, r_a = (torch.linalg.qr(part, mode="r").R for part in (factors[0], factors[1].mT))
    s = torch.linalg.svdvals((r_b @ r_a.mT).double())
    rank = int((s > RANGE * s[:1]).sum()) if s.numel() and s[0] > 0 else 0
    return s[:rank], rank


class Bases:
    """The singular vectors of all tasks side by side, ``U`` (m, R) and ``V`` (n, R), and their products (R, R)."""

    def __init__(self, tasks: Sequence[Leading]) -> None:
        self.tasks = tasks
        self.U, self.V = torch.cat([task.U for task in tasks], 1), torch.cat([task.V for task in tasks], 1)
        self.s = torch.cat([task.s for task in tasks])
        self.owner = _owner([len(task.s) for task in tasks], self.s)
        self._outputs, self._inputs = self.U.mT @ self.U, self.V.mT @ self.V

    def products(self) -> Tensor:
        """Return ``<D_i, D_j> = sum (U_i^T U_j) o (V_i^T V_j) o s_i s_j^T`` (T, T), of complete triplets."""
        return (self.owner.mT @ (self._outputs * self._inputs * self.s[:, None] * self.s) @ self.owner).double()

    def products_with(self, delta: Delta) -> Tensor:
        """Return ``<M, D_i> = sum_k s_k u_k^T M v_k`` (T,), of complete triplets."""
        factors = delta.factors()
        MV = delta.dense() @ self.V if factors is None else factors[0] @ (factors[1] @ self.V)  # (m, R)
        return ((self.U * MV).sum(0) * self.s @ self.owner).double()

    def overlaps(self) -> tuple[Tensor, Tensor]:
        """Return ``||V_i^T V_j||_F^2 / min(r_i, r_j)`` (T, T), 1 if one holds the other, and the same of the ``U_i``.

        Two random subspaces of r of d dimensions overlap by r / d. NaN where one is empty.
        """
        ranks = self.owner.sum(0)
        least = torch.minimum(ranks[:, None], ranks)
        inputs, outputs = (self.owner.mT @ K**2 @ self.owner / least for K in (self._inputs, self._outputs))
        return inputs.double(), outputs.double()


def products_by_rows(deltas: Sequence[Delta]) -> Tensor:
    """Return the Frobenius inner products (T, T) of any deltas, slice by slice of their rows."""
    m, n = deltas[0].shape
    step = max(1, SLICE // (n * len(deltas)))
    gram = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for start in range(0, m, step):
        x = torch.stack([delta.rows(start, min(start + step, m)).flatten() for delta in deltas])  # (T, step n)
        gram += (x @ x.mT).double().cpu()
    return gram


def cross_talk(inputs: Sequence[Tensor]) -> Tensor:
    """Return ``||A_i A_j^T||_F / (||A_i||_F ||A_j||_F)`` (T, T) of input factors (r_i, n): 0 if the sum is exact.

    The measure of Orthogonal Adaptation, arXiv 2312.02432. NaN where a factor is zero.
    """
    A = torch.cat(list(inputs))  # (R, n)
    owner = _owner([len(part) for part in inputs], A)
    squares = owner.mT @ (A**2).sum(1)
    return ((owner.mT @ (A @ A.mT) ** 2 @ owner / (squares[:, None] * squares)).sqrt()).double()


def sign_conflicts(samples: Sequence[Tensor]) -> Tensor:
    """Return the share (T, T) of entries with opposite signs, among those that both tasks change; NaN without any."""
    signs = torch.stack([sample.flatten() for sample in samples]).sign()  # (T, entries)
    both = signs.abs() @ signs.abs().mT
    return ((both - signs @ signs.mT) / (2 * both)).double()


def sample_rows(m: int, n: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """Return ranges of rows, drawn without repetition, that hold about `SAMPLED` entries; all rows if they are few."""
    if m * n <= SAMPLED:
        return [(0, m)]
    starts = range(0, m, NEIGHBOURS)
    count = max(1, SAMPLED // (NEIGHBOURS * n))
    drawn = torch.randperm(len(starts), generator=generator)[:count].tolist()
    return [(starts[i], min(starts[i] + NEIGHBOURS, m)) for i in sorted(drawn)]


def rows_of(delta: Delta, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Return the rows of a delta in these ranges, one below the other."""
    return torch.cat([delta.rows(start, stop) for start, stop in ranges])


def rounding_error(weight: Tensor, merged: Tensor, dtype: torch.dtype) -> float:
    """Return ``||round(W + M) - (W + M)||_F / ||M||_F``, what writing in ``dtype`` does to a delta; NaN for zero."""
    exact = weight.double() + merged.double()
    return float(torch.linalg.vector_norm(exact.to(dtype).double() - exact) / torch.linalg.vector_norm(merged.double()))


def rotation_blocks(delta: Delta) -> Tensor | None:
    """Return the blocks of ``Q^T - I`` (g, b, b) of a rotation, one for that of a subspace; None of another delta."""
    inner = delta.transposed() if isinstance(delta, Transposed) else delta
    if not isinstance(inner, Rotated | SubspaceRotated):
        return None
    return inner.update if inner.update.ndim == 3 else inner.update[None]


def rotation_defect(delta: Delta) -> float:
    """Return the largest ``||Q Q^T - I||_F`` of the blocks of a rotation, NaN for other deltas."""
    update = rotation_blocks(delta)
    if update is None or update.numel() == 0:
        return float("nan")
    D = update.double()
    return float(torch.linalg.matrix_norm(D + D.mT + D.mT @ D).max())


def _owner(sizes: Sequence[int], like: Tensor) -> Tensor:
    """Return which of R columns belongs to which task, as 0 and 1 (R, T)."""
    return torch.eye(len(sizes)).repeat_interleave(torch.tensor(sizes), 0).to(like)
