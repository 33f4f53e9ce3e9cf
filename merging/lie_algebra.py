"""Rotations and their skew generators, where they can be added: charts, mean lengths, the Procrustes rotation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from orthoft.linalg import cayley_update, on_spectrum

Chart = Literal["cayley", "log"]
LARGEST = 1e4  # norm of a generator; beyond it a plane turns by more than 179.99 degrees
CANCELLED = 1e-5  # length of a merged generator, relative to those of the tasks, that is rounding of float32 updates
MARGIN = 1e-3  # of the regularised Procrustes problem, relative to the mean eigenvalue of the Gram matrix


def nearest_orthogonal(update: Tensor) -> tuple[Tensor, float]:
    """Return ``polar(C) - I`` for ``C - I`` (..., b, b), and ``||polar(C) - C||_2``, the largest of the batch."""
    eye = torch.eye(update.shape[-1], dtype=update.dtype, device=update.device)
    U, s, Vh = torch.linalg.svd(update + eye)
    return U @ Vh - eye, float((s - 1).abs().amax()) if s.numel() else 0.0


def generator(update: Tensor, chart: Chart) -> Tensor:
    """Return the skew ``S`` (..., b, b) of an orthogonal ``C = I + update``: ``C = (I + S)(I - S)^-1``, or ``exp(S)``.

    An angle ``a`` is an eigenvalue ``i tan(a / 2)`` in the Cayley chart, ``i a`` in the logarithm's.

    Raises:
        ValueError: an eigenvalue of C is -1, which has no (or no unique) generator.
    """
    eye = torch.eye(update.shape[-1], dtype=update.dtype, device=update.device)
    S, info = torch.linalg.solve_ex(update + 2 * eye, update)
    if info.any() or not torch.linalg.vector_norm(S) <= LARGEST:
        raise ValueError(
            "space 'rotation' has no coordinates for a reflection or a turn by 180 degrees (an odd number of "
            "reflections, say): take space 'full' or 'core'"
        )
    S = (S - S.mT) / 2
    return S if chart == "cayley" else on_spectrum(S, lambda w: 2 * torch.atan(w))


def turn(S: Tensor, chart: Chart) -> Tensor:
    """Return ``C - I`` of the rotation with this generator (..., b, b)."""
    if chart == "cayley":
        return cayley_update(S)
    rotated: Tensor = torch.linalg.matrix_exp(S)
    return rotated - torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)


def with_mean_length(merged: Tensor, lengths: Sequence[float]) -> Tensor:
    """Return ``Q * mean_t ||Q_t|| / ||Q||``, the mean over the tasks that turn at all.

    A sum of generators is shorter than they are, as far as they disagree: the direction is kept, the length restored.
    Where they cancel up to rounding, ``||Q|| <= 1e-5 mean``, no direction is left, and the result is zero. OrthoMerge,
    arXiv 2602.05943.
    """
    turning, norm = [length for length in lengths if length > 0], float(torch.linalg.vector_norm(merged))
    mean = sum(turning) / max(len(turning), 1)
    return merged * (mean / norm) if norm > CANCELLED * mean else torch.zeros_like(merged)


def procrustes(gram: Tensor, cross: Tensor) -> Tensor:
    """Return ``R - I`` (n, n) of the rotation that minimises ``||W R - Y||_F^2 + mu ||R - I||_F^2``.

    ``R = polar(M)`` with ``M = G + W^T (Y - W) + mu I``, for ``gram`` ``G = W^T W`` and ``cross`` ``W^T (Y - W)``
    (n, n) in float64. If the symmetric part of M is positive, so is that of ``P^(-1/2) M P^(-1/2)``, ``P^2 = M^T M``,
    to which R is similar: all turns are below 90 degrees. ``mu`` is the smallest number for which the least eigenvalue
    of that part is ``MARGIN`` times the mean one of G, often 0: inputs that W hardly sees stay where they are, while
    the plain solution (mu = 0) reflects them at random.
    """
    n = len(gram)
    eye = torch.eye(n, dtype=gram.dtype, device=gram.device)
    scale = gram.trace() / n
    if scale == 0:
        return torch.zeros_like(gram)
    M = (gram + cross) / scale
    least = torch.linalg.eigvalsh((M + M.mT) / 2)[0]
    M = M + (MARGIN - least).clamp(min=0) * eye
    values, vectors = torch.linalg.eigh(M.mT @ M)
    R: Tensor = M @ (vectors * values.rsqrt()) @ vectors.mT
    R = 1.5 * R - 0.5 * R @ (R.mT @ R)  # one step of Newton-Schulz: orthogonal to the square of what was left
    return R - eye
