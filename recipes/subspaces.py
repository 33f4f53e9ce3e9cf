"""Where a task may write, chosen before it is trained: input subspaces that keep the tasks' updates apart.

An update ``B_t A_t`` of a layer reads its inputs x (n,) through the rows of ``A_t`` (r, n) alone. What it does to the
inputs of another task is of size ``tr(A_t C_s A_t^T)``, where ``C_s = X_s^T X_s / N_s`` (n, n) is the covariance, about
zero, of that task's inputs. All functions here are pure, in float64, and fix the signs of eigenvectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import solve_triangular as solve

from orthoft.bases import signed_svd
from orthoft.linalg import orthonormal_rows
from orthoft.recipes.eigen import leading_eigenvectors

RIDGE = 0.1  # of the mean eigenvalue of the others' covariance: what was measured on eight tasks, docs/results.md
DEPENDENT = 1e-6  # least eigenvalue of the Gram matrix of unit rows that still span what they seem to


def mean_of_others(covariances: Sequence[Tensor], task: int, general: Tensor | None = None) -> Tensor:
    """Return the mean of all covariances (n, n) but the task's own, with that of general text as one more of them.

    Raises:
        ValueError: there are no others.
    """
    others = [C for s, C in enumerate(covariances) if s != task] + ([] if general is None else [general])
    if not others:
        raise ValueError("a subspace away from the others needs inputs of another task, or of general text")
    total = torch.zeros_like(others[0], dtype=torch.float64)
    for C in others:  # one after the other: side by side they would be as many copies in float64
        total += C
    return total.div_(len(others))


def osrm(others: Tensor, r: int) -> Tensor:
    """Return the orthonormal rows ``A`` (r, n) along which the others' inputs vary least.

    ``A`` minimises ``tr(A C A^T)`` over ``A A^T = I`` for ``C = others`` (n, n): eigenvectors of the r least values,
    whose sum the minimum is. Directions that no task uses come first, so that tasks may share them. OSRM, arXiv
    2505.22934, by the covariance of the paper.

    Raises:
        ValueError: r is not between 1 and n.
    """
    _check_rank(r, len(others))
    return _signed(torch.linalg.eigh(others.double()).eigenvectors[:, :r].mT)


def contrastive(own: Tensor, others: Tensor, r: int, ridge: float = RIDGE) -> Tensor:
    """Return rows ``A`` (r, n) along which the task's inputs vary much and the others' little, of one length.

    Their span maximises ``tr((A M A^T)^-1 A C A^T)`` for ``C = own`` and ``M = others + ridge mean(eig(others)) I``
    (n, n): the generalised eigenvectors ``C v = mu M v`` of the r largest ``mu``, whose sum the maximum is. The rows
    are ``c Q`` with ``Q Q^T = I`` and ``c^2 = r / tr(Q C Q^T)``, so that ``A x`` has a root mean square of 1 on the
    task's inputs.

    Raises:
        ValueError: r is not between 1 and n, a ridge that is not positive, or inputs that are all zero.
    """
    n = len(own)
    _check_rank(r, n)
    own, others = own.double(), others.double()
    if not ridge > 0:
        raise ValueError(f"ridge must be positive (of the others' mean eigenvalue; 0.1, say), got {ridge}")
    if not (own.trace() > 0 and others.trace() > 0):
        raise ValueError("a contrast needs inputs that are not all zero, on both sides")
    M = others + ridge * others.trace() / n * torch.eye(n, dtype=others.dtype, device=others.device)
    L = torch.linalg.cholesky(M)
    top = leading_eigenvectors(lambda X: solve(L, own @ solve(L.mT, X, upper=True), upper=False), n, r, own)
    Q = orthonormal_rows(_signed(solve(L.mT, top, upper=True).mT))
    return Q * (r / ((Q @ own) * Q).sum()).sqrt()


def orthogonal(ranks: Sequence[int], n: int, generator: torch.Generator) -> list[Tensor]:
    """Return a slice (r_t, n) for each task of the rows of one random orthonormal basis: ``A_i A_j^T = 0`` for i != j.

    It needs no data. The rows of a task are the same however many tasks follow it. Orthogonal Adaptation, arXiv
    2312.02432.

    Raises:
        ValueError: the ranks add up to more than n.
    """
    _check_room(ranks, n, f"{n} inputs")
    drawn = [torch.randn(r, n, generator=generator, dtype=torch.float64) for r in ranks]
    return list(torch.split(orthonormal_rows(torch.cat(drawn)), list(ranks)))


def principal(ranks: Sequence[int], weight: Tensor) -> list[Tensor]:
    """Return for each task its share (r_t, n) of the leading right singular vectors of ``weight`` (m, n).

    They are dealt out in turn, the largest first, to the tasks that still lack some, so that all get directions of
    like weight: PSOFT's principal subspace (arXiv 2505.11235), shared without overlap, ``V_i V_j^T = 0``.

    Raises:
        ValueError: the ranks add up to more than the smaller side.
    """
    _check_room(ranks, min(weight.shape), f"{min(weight.shape)} singular vectors")
    if not sum(ranks):
        return [weight.new_zeros(0, weight.shape[1], dtype=torch.float64) for _ in ranks]
    V = signed_svd(weight.double(), sum(ranks))[2]
    turns = sorted((turn, task) for task, r in enumerate(ranks) for turn in range(r))
    return [V[[place for place, (_, owner) in enumerate(turns) if owner == task]] for task in range(len(ranks))]


def mutually_orthogonal(rows: Sequence[Tensor]) -> list[Tensor]:
    """Return the orthonormal rows ``V_t`` (r_t, n), ``V_i V_j^T = 0`` for i != j, nearest to the tasks' unit rows.

    All rows ``M`` (R, n) at once: ``V = (M M^T)^(-1/2) M``, which favours no task. Rotations
    ``Q_t = I + V_t^T (C_t - I) V_t`` then commute, for any ``C_t``, and their product is a sum:
    ``Q_1 Q_2 ... = I + sum_t (Q_t - I)``. Hence task arithmetic with weights of 1, on the deltas ``W (Q_t^T - I)``, is
    exactly the weight that all of them have turned; the space "rotation" turns it by less, to the tasks' mean length.

    Raises:
        ValueError: more rows than n, or rows that depend on each other.
    """
    _check_room([len(part) for part in rows], rows[0].shape[1], f"{rows[0].shape[1]} inputs")
    M = torch.nn.functional.normalize(torch.cat([part.double() for part in rows]), dim=1)
    values, U = torch.linalg.eigh(M @ M.mT)
    if values.numel() and values[0] < DEPENDENT:
        told = " + ".join(str(len(part)) for part in rows)
        raise ValueError(
            f"the tasks' subspaces ({told} directions of {M.shape[1]} inputs) overlap and cannot be told apart: choose "
            "smaller ranks, or another method"
        )
    V = (U * values.rsqrt()) @ U.mT @ M
    return list(torch.split(V, [len(part) for part in rows]))


def _signed(rows: Tensor) -> Tensor:
    """Return the rows (r, n), each with its largest entry positive."""
    return rows * torch.sign(rows.gather(1, rows.abs().argmax(1, keepdim=True)))


def _check_rank(r: int, n: int) -> None:
    if not 1 <= r <= n:
        raise ValueError(f"{n} inputs have subspaces of 1 to {n} dimensions, not {r}: choose another rank")


def _check_room(ranks: Sequence[int], room: int, what: str) -> None:
    if sum(ranks) > room:
        told = " + ".join(map(str, ranks))
        raise ValueError(f"{told} orthogonal directions do not fit {what}: choose smaller ranks, or fewer tasks")
