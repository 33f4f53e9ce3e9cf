"""The transforms as pure functions: skew generators, the Cayley map and its series, block products, compact WY.

Every function works in the dtype it is given, on any device, batched over leading dimensions, and is differentiable.
Rotations are handled as their *update* ``Q - I``: it keeps small angles exact and survives a cast to bfloat16 better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor

RotationMap = Literal["series", "cayley"]
PIECE = 128  # squares that are added up one after the other
BLOCK = 2**8  # pieces that are cast at once: in memory that is not fresh each time


def at_least(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` in ``dtype``, or unchanged when its own holds all of that already."""
    return x.to(dtype if x.dtype.itemsize == 1 else torch.promote_types(x.dtype, dtype))  # float8 has no promotion


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or unchanged when it is float32 or float64 already."""
    return at_least(x, torch.float32)


def frobenius_norm(x: Tensor, batch: int = 0) -> Tensor:
    """Return the Frobenius norms (...) of ``x`` over all dimensions but the first ``batch``, in float32 or more.

    Of pieces first, then of their norms. On the CPU torch adds float32 squares up in float32, one after the other: of a
    weight of 4096 x 14336 half a percent is lost that way, and a third of 6e8 equal entries; here less than 1e-6 is.
    """
    x = x.mT if x.ndim - batch == 2 and x.mT.is_contiguous() else x
    x = x.flatten(batch) if x.is_contiguous() else x
    whole, rest = x.shape[-1] // PIECE, x.shape[-1] % PIECE
    pieces = x.narrow(-1, 0, whole * PIECE).view(*x.shape[:-1], whole, PIECE)
    last = torch.linalg.vector_norm(at_least_float32(x.narrow(-1, whole * PIECE, rest)), dim=-1, keepdim=True)
    norms = torch.cat([_row_norms(pieces), last], -1).flatten(batch)
    return norms[..., 0] if norms.shape[-1] == 1 else frobenius_norm(norms, batch)


def _row_norms(x: Tensor) -> Tensor:
    """Return the norms of rows (..., n), in float32 or more; half precision is cast in blocks, never as a whole."""
    blocks = [x] if x.dtype.itemsize >= 4 else torch.split(x, BLOCK, -2)
    return torch.cat([torch.linalg.vector_norm(at_least_float32(rows), dim=-1) for rows in blocks], -1)


def skew(entries: Tensor, size: int) -> Tensor:
    """Return the skew-symmetric matrices with the given strict upper triangles.

    Args:
        entries: (..., size (size - 1) / 2), rows of the triangle one after the other.

    Returns:
        (..., size, size) with ``S = -S^T``.
    """
    rows, cols = torch.triu_indices(size, size, 1, device=entries.device)
    flat = entries.new_zeros(*entries.shape[:-1], size * size)
    upper = flat.index_copy(-1, rows * size + cols, entries).reshape(*entries.shape[:-1], size, size)
    return upper - upper.mT


def cayley_update(S: Tensor) -> Tensor:
    """Return ``C(S) - I`` for the Cayley map ``C(S) = (I + S)(I - S)^{-1} = I + 2 (I - S)^{-1} S``.

    ``C(S)`` is exactly orthogonal with determinant 1 for every skew ``S`` (..., b, b), and ``C(S)^T = C(-S)``.
    """
    return cast(Tensor, _Cayley.apply(S))  # type: ignore[no-untyped-call]


def series_update(S: Tensor, degree: int = 5) -> Tensor:
    """Return ``R(S) - I`` for the truncated Cayley map ``R(S) = (I + S)(I + S + ... + S^(degree-1))``.

    Equal to ``I + 2S + 2S^2 + ... + 2S^(degree-1) + S^degree``. At odd degree D the defect is
    ``||R^T R - I||_2 = ||S||_2^(2D)`` (even degrees would give ``2 ||S||^D``, so they are refused). Horner's rule in
    ``S^2`` takes (D + 1) / 2 products. Cayley-Neumann parametrisation of OFTv2, arXiv 2506.19847.

    Raises:
        ValueError: ``degree`` is even or less than 1.
    """
    if degree < 1 or degree % 2 == 0:
        raise ValueError(f"degree must be odd and positive (orthogonal to ||S||^(2 degree)), got {degree}")
    return S if degree == 1 else cast(Tensor, _Series.apply(S, degree))  # type: ignore[no-untyped-call]


class _Cayley(torch.autograd.Function):
    """Saves two matrices a block, where the solve by itself would save four: ``dC = (I - S)^{-1} dS (I + C)``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(S: Tensor) -> Tensor:
        eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
        half: Tensor = torch.linalg.solve_ex(eye - S, S)[0]  # never singular: no need to wait and look, as solve does
        return 2 * half

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        S, update = ctx.saved_tensors
        eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
        of_half: Tensor = torch.linalg.solve_ex((eye - S).mT, grad)[0]
        of_S: Tensor = of_half @ (2 * eye + update).mT
        return of_S


class _Series(torch.autograd.Function):
    """Horner's rule, ``H <- 2 I + 2 S + S^2 H`` from ``2 I + S``; backward computes it again, and saves ``S`` alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(S: Tensor, degree: int) -> Tensor:
        S2, inner = _horner(S, degree)
        return 2 * S + S2 @ inner[-1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.degree = inputs[1]
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (S,) = ctx.saved_tensors
        S2, inner = _horner(S, ctx.degree)
        of_S, of_S2, of_inner = 2 * grad, grad @ inner[-1].mT, S2.mT @ grad
        for H in reversed(inner[:-1]):
            of_S = of_S + 2 * of_inner
            of_S2 = of_S2 + of_inner @ H.mT
            of_inner = S2.mT @ of_inner
        return of_S + of_inner + of_S2 @ S.mT + S.mT @ of_S2, None


def _horner(S: Tensor, degree: int) -> tuple[Tensor, list[Tensor]]:
    """Return ``S^2`` and the values of ``H`` for a degree of 3 or more."""
    S2 = S @ S
    eye2 = 2 * torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    inner = [eye2 + S]
    for _ in range((degree - 3) // 2):
        inner.append(eye2 + 2 * S + S2 @ inner[-1])
    return S2, inner


def within_radius(entries: Tensor, radius: float | None, blocks: int) -> Tensor:
    """Return the skew ``entries`` (g, b (b - 1) / 2), each block shrunk to ``||S_i||_F <= radius / sqrt(blocks)``.

    Then ``||S||_F <= radius`` over all ``blocks``: the constrained variant of OFT (arXiv 2306.07280). Gradients pass
    through the projection.
    """
    return entries if radius is None else within_ball(entries, radius / blocks**0.5)


def within_ball(entries: Tensor, norm: float) -> Tensor:
    """Return the skew ``entries`` (..., b (b - 1) / 2), each block shrunk to ``||S||_F <= norm`` if it is beyond."""
    norms = 2**0.5 * torch.linalg.vector_norm(entries, dim=-1, keepdim=True)  # both triangles
    excess: Tensor = (norms / norm).clamp(min=1)  # exactly 1 inside
    return entries / excess


def of_map(entries: Tensor, map: RotationMap, degree: int) -> Tensor:
    """Return the entries that a map takes: for the series those with ``||S||_2 <= ||S||_F / sqrt(2) <= 1``.

    Beyond this ball the series diverges, and one large step would overflow its powers; degree 1 has none.
    """
    return within_ball(entries, 2**0.5) if map == "series" and degree > 1 else entries


def rotation_update(entries: Tensor, size: int, map: RotationMap = "series", degree: int = 5) -> Tensor:
    """Return ``Q - I`` (..., size, size) of the rotations with the skew ``entries`` (..., size (size - 1) / 2)."""
    S = skew(of_map(entries, map, degree), size)
    return cayley_update(S) if map == "cayley" else series_update(S, degree)


def combine_generators(
    generators: Sequence[Tensor], weights: Sequence[float], degrees: Sequence[int | None] | None = None
) -> Tensor:
    """Return the Cayley generator of ``exp(sum_i w_i log R_i)`` for skew ``S_i`` (..., b, b), in float64.

    ``R_i`` is the Cayley map of ``S_i``, or with a degree the rotation nearest to its series. ``i S`` is Hermitian, and
    the maps act on eigenvalues: ``S = i w`` turns by ``2 atan w``, less ``arg(1 - (i w)^D)`` for the series cut at D.
    """
    parts = zip(generators, weights, degrees or [None] * len(generators), strict=True)
    total = sum(w * on_spectrum(S, partial(_half_angle, degree=degree)) for S, w, degree in parts)
    return on_spectrum(cast(Tensor, total), torch.tan)


def _half_angle(w: Tensor, degree: int | None) -> Tensor:
    """Return half the angle by which the map turns at the eigenvalue ``i w``: ``(1 + iw)(1 - (iw)^D) / (1 - iw)``."""
    if degree is None:
        return torch.atan(w)
    return torch.atan(w) - torch.atan(w**degree) / (2 if degree % 4 == 1 else -2)


def on_spectrum(S: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``U diag(i f(w)) U^H`` of a skew ``S = U diag(i w) U^H`` (..., b, b) and an odd function, real."""
    w, U = torch.linalg.eigh(-1j * S.double())
    return cast(Tensor, (U * (1j * function(w)).unsqueeze(-2)) @ U.mH).real


def inverse_update(update: Tensor) -> Tensor:
    """Return ``(I + D)^{-1} - I = -(I + D)^{-1} D`` for an update ``D`` (..., b, b)."""
    eye = torch.eye(update.shape[-1], dtype=update.dtype, device=update.device)
    inverse: Tensor = torch.linalg.solve(eye + update, update)
    return -inverse


def add_block_product(x: Tensor, update: Tensor) -> Tensor:
    """Return ``x (I + blockdiag(D_1, ..., D_g))`` without forming the n x n matrix.

    Args:
        x: (..., n), in any dtype; ``update`` is cast to it, ``x`` never is.
        update: (g, b, b) with g b = n, or (1, b, b) for one block shared by all.
    """
    update = update.to(x.dtype)
    if update.shape[0] == 1:
        blocks = x.reshape(*x.shape[:-1], x.shape[-1] // update.shape[-1], update.shape[-1])  # (..., g, b)
        return (blocks + blocks @ update[0]).flatten(-2)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return cast(Tensor, _BlockProduct.apply(rows, update)).reshape(x.shape)  # type: ignore[no-untyped-call]


class _BlockProduct(torch.autograd.Function):
    """One copy of the rows and one batched product into it, forward and backward; saves the rows and the blocks."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, update: Tensor) -> Tensor:
        return add_blocks(rows, update)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, update = ctx.saved_tensors
        of_rows = add_blocks(grad, update.mT) if ctx.needs_input_grad[0] else None
        size = update.shape[-1]
        of_update = _by_blocks(rows, size).mT @ _by_blocks(grad, size) if ctx.needs_input_grad[1] else None
        return of_rows, of_update


def add_blocks(rows: Tensor, update: Tensor) -> Tensor:
    """Return ``x (I + blockdiag(D_1, ..., D_g))`` for rows (t, g b) and (g, b, b), not for autograd."""
    blocks = _by_blocks(rows, update.shape[-1])
    if torch.compiler.is_compiling():  # it fuses the sum by itself, and cannot put products into strided views
        return rows + (blocks @ update).transpose(0, 1).flatten(1)
    out = rows.clone(memory_format=torch.contiguous_format)
    _by_blocks(out, update.shape[-1]).baddbmm_(blocks, update)
    return out


def _by_blocks(rows: Tensor, size: int) -> Tensor:
    """Return rows (t, g b) as (g, t, b), a view where they are contiguous."""
    return rows.reshape(rows.shape[0], rows.shape[1] // size, size).transpose(0, 1)  # len() would fix an exported one


def add_low_rank_product(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``x (I - L^T R)`` for rows ``x`` (..., n) and ``L``, ``R`` (r, n), as two thin products.

    ``x`` may have any dtype; the factors are cast to it, ``x`` never is.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    thin = torch.nn.functional.linear(rows, left.to(x.dtype))  # (rows, r); its gradient is (r, n), never transposed
    return torch.addmm(rows, thin, right.to(x.dtype), alpha=-1).reshape(x.shape)


def orthonormal_rows(u: Tensor) -> Tensor:
    """Return rows spanning those of ``u`` (r, n), r <= n, orthonormal as Gram-Schmidt would leave them (signs too)."""
    q: Tensor
    q, r = torch.linalg.qr(u.mT)
    return (q * torch.sign(torch.diagonal(r))).mT
