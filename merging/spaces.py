"""Common coordinates for the deltas of one weight, in which a method merges them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthoft.delta import Delta, Dense, LowRank
from orthoft.errors import unknown

Decode = Callable[[Tensor], Delta]
Encode = Callable[[Sequence[Delta], Tensor | None], tuple[Tensor, Decode]]


@dataclass(frozen=True)
class Space:
    """``encode(deltas, base) -> x (T, p, q), decode``: coordinates with the deltas' Frobenius norms, and the way back.

    ``needs_factors``: every delta has to have factors.
    """

    name: str
    encode: Encode
    needs_factors: bool


SPACES: dict[str, Space] = {}


def space(name: str, *, needs_factors: bool = False) -> Callable[[Encode], Encode]:
    """Register an encoder as the space of this name; see `Space`."""

    def register(encode: Encode) -> Encode:
        SPACES[name] = Space(name, encode, needs_factors)
        return encode

    return register


def choose_space(name: str, commutes: bool, factored: bool) -> Space:
    """Return the space of this name; "auto" is ``core`` where that provably makes no difference, else ``full``.

    Args:
        commutes: the method commutes with orthogonal changes of basis on both sides.
        factored: all deltas have factors.

    Raises:
        ValueError: the name is unknown, or the space needs factors that a delta does not have.
    """
    if name == "auto":
        return SPACES["core" if commutes and factored else "full"]
    if name not in SPACES:
        raise unknown("space", name, ["auto", *SPACES])
    if SPACES[name].needs_factors and not factored:
        raise ValueError(
            f"space {name!r} needs low-rank factors, which not all sources have here: take 'full' or 'auto'"
        )
    return SPACES[name]


@space("full")
def full(deltas: Sequence[Delta], base: Tensor | None) -> tuple[Tensor, Decode]:
    """The (m, n) entries themselves."""
    return torch.stack([delta.dense() for delta in deltas]), Dense


@space("core", needs_factors=True)
def core(deltas: Sequence[Delta], base: Tensor | None) -> tuple[Tensor, Decode]:
    """Core Space: ``U^T D_t V`` in the bases of the stacked factors, exact, at cost O((m + n) R^2), R the sum of ranks.

    ``U`` (m, p) are the left singular vectors of ``[B_1 ... B_T]``, ``V`` (n, q) the right ones of the stacked ``A_t``,
    p, q <= R. In float64, as in the paper. arXiv 2509.17786.
    """
    factors = [f for delta in deltas if (f := delta.factors()) is not None]
    dtype = factors[0][0].dtype
    ranks = [B.shape[1] for B, _ in factors]
    U, s_b, Vh_b = torch.linalg.svd(torch.cat([B for B, _ in factors], 1).double(), full_matrices=False)
    U_a, s_a, Vh = torch.linalg.svd(torch.cat([A for _, A in factors]).double(), full_matrices=False)
    left = (s_b[:, None] * Vh_b).split(ranks, dim=1)  # U^T B_t, (p, r_t)
    right = (U_a * s_a).split(ranks, dim=0)  # A_t V, (r_t, q)
    x = torch.stack([l @ r for l, r in zip(left, right, strict=True)])  # (T, p, q)

    def decode(merged: Tensor) -> LowRank:
        tall = merged.shape[0] >= merged.shape[1]
        B, A = (U @ merged, Vh) if tall else (U, merged @ Vh)
        return LowRank(B.to(dtype), A.to(dtype))

    return x, decode
