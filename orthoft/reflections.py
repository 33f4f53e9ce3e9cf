"""Products of Householder reflections in compact WY form. HRA, arXiv 2405.17484."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orthoft.linalg import combine_generators, orthonormal_rows


def householder_factors(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``U, M`` (r, n) with ``H_1 H_2 ... H_r = I - U^T M`` for ``H_i = I - 2 u_i^T u_i / |u_i|^2``.

    ``u`` (r, n) holds the reflection vectors as rows, ``U`` the normalised ones, and ``M = T U`` solves the triangular
    system ``(triu(U U^T, 1) + I/2) M = U``: the compact WY form, exact for any vectors, also equal or parallel ones.
    HRA, arXiv 2405.17484.
    """
    U = torch.nn.functional.normalize(u, dim=-1, eps=torch.finfo(u.dtype).tiny)
    half = torch.eye(u.shape[0], dtype=u.dtype, device=u.device) / 2
    M = torch.linalg.solve_triangular(torch.triu(U @ U.mT, 1) + half, U, upper=True)
    return U, M


def paired_factors(U: Tensor, M: Tensor, apart: bool) -> tuple[Tensor, Tensor]:
    """Return ``U', M'`` (r, n) with ``U'^T M' = U^T M``, in which reflections that nearly cancel no longer have to.

    Of a pair of neighbours (``apart``: of rows i and i + r / 2) with the rows ``a, b`` of ``U`` and ``p, q`` of ``M``,
    ``a^T p + b^T q = ((a + b) / 2)^T (p + q) + (b - a)^T (q - p) / 2``. Near the identity ``b = a`` and ``q = -p``: the
    terms on the left are of size 1, those on the right as small as their sum, and rounding them to half precision
    keeps its digits. An odd last row stays as it is.
    """
    half = len(U) // 2
    first, second = (slice(0, half), slice(half, None)) if apart else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    (a, p), (b, q), (u, m) = ((U[rows], M[rows]) for rows in (first, second, slice(2 * half, None)))
    return torch.cat([(a + b) / 2, b - a, u]), torch.cat([p + q, (q - p) / 2, m])


def reflection_rows(u: Tensor, u0: Tensor | None = None) -> Tensor:
    """Return the vectors HRA reflects along: ``u`` (r, n), or (2r, n) with a frozen ``u0`` for the orthonormal variant.

    The paper's orthonormal variant, ``I - 2 U^T U`` with orthonormal rows, is never near the identity. Paired with the
    reflection in the span it starts from, ``(I - 2 U0^T U0)(I - 2 U^T U)``, it is: equal spans cancel.
    """
    return u if u0 is None else torch.cat([orthonormal_rows(u0), orthonormal_rows(u)])


def combine_reflections(pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float], count: int) -> Tensor:
    """Return ``u`` (count, n) whose reflections multiply to ``exp(sum_i w_i log H_i)``, ``H_i = I - U_i^T M_i``.

    All of them act in the span of the ``U_i`` (K dimensions, K <= count): there the generators add up, and each plane
    of the resulting rotation is a pair of reflections: ``H(a - w b) H(a)`` turns ``a`` by ``2 atan w`` towards ``-b``.

    Raises:
        ValueError: an odd number of reflections, which has determinant -1 and no logarithm.
    """
    if any(len(U) % 2 for U, _ in pairs):
        raise ValueError("an odd number of reflections is no rotation, so it cannot be combined with others")
    B = torch.linalg.qr(torch.cat([U for U, _ in pairs]).mT).Q.mT  # (K, n)
    eye = torch.eye(len(B), dtype=B.dtype, device=B.device)
    turns = [eye - (U @ B.mT).mT @ (M @ B.mT) for U, M in pairs]  # (K, K)
    skews = [torch.linalg.solve(C + eye, C - eye) for C in turns]
    w, Z = torch.linalg.eigh(-1j * combine_generators([(S - S.mT) / 2 for S in skews], weights))
    w, Z = w[len(B) // 2 :, None], Z[:, len(B) // 2 :].mT  # one of each pair +-w: (K / 2, 1), (K / 2, K)
    real_larger = Z.real.norm(dim=1, keepdim=True) >= Z.imag.norm(dim=1, keepdim=True)
    a = torch.where((w > 1e-12) | real_larger, Z.real, Z.imag)  # a plane that does not turn may have no real part
    b = torch.where(w > 1e-12, Z.imag, torch.zeros_like(a))
    u = torch.nn.functional.normalize(torch.stack([a - w * b, a], dim=1).flatten(0, 1), dim=1) @ B
    rest = B[:1].expand(count - len(u), -1)  # equal reflections cancel
    scale: float = (2 * u.shape[1] / (3 * count)) ** 0.5  # the norms of `Reflections` at its start
    return scale * torch.cat([u, rest])
