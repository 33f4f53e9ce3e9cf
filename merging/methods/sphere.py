"""What the geometric methods share: they combine the tasks with coefficients that depend on inner products only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

On = Literal["deltas", "weights"]
Coefficients = Callable[[Tensor], Tensor]
CANCELLED = 1e-6  # a mean of unit vectors shorter than this has no direction
CHUNK = 1 << 18  # entries of each task in float64 at a time


def on_deltas(params: Mapping[str, Any]) -> bool:
    """Say whether a method acts on the deltas, of which it then needs Frobenius inner products only."""
    return bool(params["on"] == "deltas")


def on_weights(params: Mapping[str, Any]) -> bool:
    """Say whether a method acts on the weights themselves, base and all."""
    return not on_deltas(params)


def combine(x: Tensor, base: Tensor | None, on: On, coefficients: Coefficients) -> Tensor:
    """Return the delta ``sum_t c_t x_t``, or on weights that of ``sum_t c_t (base + x_t)``; ``c`` of the Gram matrix.

    Args:
        x: (T, p, q); ``base`` (p, q).
        coefficients: takes the inner products (T, T) of what is combined, in float64, to ``c`` (T,).

    Raises:
        ValueError: on weights, without the base.
    """
    if on == "deltas":
        return torch.einsum("t,tpq->pq", coefficients(gram(x)).to(x), x)
    if base is None:
        raise ValueError("on='weights' needs the weight itself: give base, or take on='deltas'")
    c = coefficients(gram(x + base.to(x)))
    excess = float(c.sum() - 1)
    return torch.einsum("t,tpq->pq", c.to(x), x) + excess * base.to(x)


def gram(x: Tensor) -> Tensor:
    """Return the Frobenius inner products ``<x_s, x_t>`` (T, T), summed up in float64; on the CPU, as they are few."""
    flat = x.flatten(1)  # (T, p q)
    total = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
    for chunk in torch.split(flat, CHUNK, dim=1):
        wide = chunk.double()
        total += wide @ wide.mT
    return total.cpu()


def cosines(products: Tensor) -> tuple[Tensor, Tensor]:
    """Return norms (..., T) and cosines (..., T, T) of inner products; a zero task has only cosines of 0."""
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    inverse = inverse_norms(norms)
    return norms, (products * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)).clamp(-1.0, 1.0)


def inverse_norms(norms: Tensor) -> Tensor:
    """Return ``1 / norms``, 0 for those that are 0."""
    return torch.where(norms > 0, 1.0 / torch.where(norms > 0, norms, 1.0), 0.0)


def direction(cosine: Tensor, v: Tensor) -> Tensor | None:
    """Return ``a`` (T,) for which ``sum_t a_t u_t`` is ``sum_t v_t u_t`` at length 1; None where the ``u_t`` cancel.

    The ``u_t`` are unit vectors, given by their cosines (T, T).
    """
    length = length_of(cosine, v)
    return v / length if length > CANCELLED else None


def length_of(cosine: Tensor, a: Tensor) -> Tensor:
    """Return ``||sum_t a_t u_t||``."""
    return (a @ cosine @ a).clamp(min=0.0).sqrt()


def at_mean_norm(a: Tensor, norms: Tensor, v: Tensor) -> Tensor:
    """Return the coefficients (T,) on the tasks of ``(sum_t v_t ||x_t||) sum_t a_t x_t / ||x_t||``."""
    return (v @ norms) * a * inverse_norms(norms)


def shares(weights: Tensor, name: str) -> Tensor:
    """Return the weights divided by their sum, in float64.

    Raises:
        ValueError: a weight is negative, or all are zero.
    """
    if (weights < 0).any() or not (weights > 0).any():
        raise ValueError(f"method {name!r} takes relative weights, 0 or more and not all zero, got {weights.tolist()}")
    return weights.double() / weights.double().sum()
