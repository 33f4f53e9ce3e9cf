"""OrthoMerge: rotations by their angles; of any other change the rotation that explains most, and the rest.

arXiv 2602.05943.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from orthoft.delta import Delta, Dense, LowRank, Rotated, SubspaceRotated, Transposed
from orthoft.linalg import at_least_float32, skew
from orthoft.merging.lie_algebra import Chart, generator, nearest_orthogonal, procrustes, turn, with_mean_length
from orthoft.merging.spaces.registry import Decode, space
from orthoft.merging.spectra import RANGE

NEARLY = 0.1  # a truncated series within this of orthogonal is read as the nearest rotation
Turns = Sequence[tuple[Delta, Tensor | None]]  # each delta, and its C - I in float64 if it is a rotation


@space("rotation", isometric=False)
def rotation(
    deltas: Sequence[Delta],
    base: Tensor | None,
    weights: Tensor,
    *,
    chart: Chart = "cayley",
    conflict: bool = False,
    residual_scale: float = 1.0,
) -> tuple[Tensor, Decode]:
    """Skew generators ``Q_t`` of tasks that rotate the inputs of W, ``W_t = W R_t``; residuals of all others.

    * Block rotations (OFT): the entries above the diagonals of ``Q_t``, (g, b (b - 1) / 2) for g blocks of size b;
      blocks of different sizes are embedded in blocks of their least common multiple.
    * Rotations of subspaces (HRA, PSOFT without scales): the same of the one block in the joint span of their bases,
      (1, K (K - 1) / 2), a vector to the method. Entries refer to the basis of the first task, completed by the others.
    * Anything else, and mixtures: ``R_t`` is known or the Procrustes rotation; the coordinates are the residuals
      ``E_t = W_t - W R_t`` (m, n), and the result ``W R + residual_scale E`` is dense. O(T n^3) in float64.

    The merged generator is scaled to the mean length of the ``w_t Q_t``, over all blocks of the weight together; of
    residuals it is their sum. In the chart "cayley", OrthoMerge's, the result on OFT is the published one; "log" is the
    matrix logarithm, in which angles add up. The inverse of one is an exact rotation for any Q, hence the result is
    exactly orthogonal. A series of even degree is read as the nearest rotation. arXiv 2602.05943.

    Args:
        conflict: rotate only towards the outputs of a task that disagree with the mean change (cosine below 0).

    Raises:
        ValueError: no base weight, or a task that reflects or turns by 180 degrees.
    """
    if base is None:
        raise ValueError("space 'rotation' turns the base weight, and none was given: pass base=")
    base = at_least_float32(base)
    if any(isinstance(delta, Transposed) for delta in deltas):
        flipped = [delta.transposed() for delta in deltas]
        x, back = rotation(flipped, base.mT, weights, chart=chart, conflict=conflict, residual_scale=residual_scale)
        return x, lambda merged: back(merged).transposed()
    turns = [(delta, _exact_update(delta, base)) for delta in deltas]
    moving = [(delta, update) for delta, update in turns if delta.rank() != 0]
    if not moving:
        return torch.zeros(len(deltas), 1, 1), lambda merged: LowRank(base[:, :0], base[:0])
    if not conflict and all(isinstance(delta, Rotated) and update is not None for delta, update in moving):
        return _of_blocks(turns, base, weights, chart)
    if not conflict and all(isinstance(delta, SubspaceRotated) and update is not None for delta, update in moving):
        return _of_subspaces(turns, base, weights, chart)
    return _decoupled(turns, base, weights, chart, conflict, residual_scale)


def _exact_update(delta: Delta, base: Tensor) -> Tensor | None:
    """Return ``C - I`` in float64, made orthogonal, of a delta that rotates this weight; None of any other."""
    if not isinstance(delta, Rotated | SubspaceRotated):
        return None
    wide = torch.promote_types(delta.weight.dtype, base.dtype)
    if delta.weight is not base and not torch.equal(delta.weight.to(wide), base.to(wide)):
        return None
    update, distance = nearest_orthogonal(delta.update.double())
    return update if distance <= NEARLY else None


def _of_blocks(turns: Turns, base: Tensor, weights: Tensor, chart: Chart) -> tuple[Tensor, Decode]:
    n = base.shape[1]
    size = math.lcm(*(update.shape[-1] for _, update in turns if update is not None))
    rows, cols = torch.triu_indices(size, size, 1)
    x = base.new_zeros(len(turns), n // size, len(rows), dtype=torch.float64)  # (T, g, b (b - 1) / 2)
    for task, (_, update) in zip(x, turns, strict=True):
        if update is not None:
            task.copy_(generator(_enlarged(update, size, n), chart)[:, rows, cols])
    lengths = _lengths(x, weights)

    def decode(merged: Tensor) -> Rotated:
        return Rotated(base, turn(skew(with_mean_length(merged, lengths), size), chart).to(base.dtype))

    return x, decode


def _of_subspaces(turns: Turns, base: Tensor, weights: Tensor, chart: Chart) -> tuple[Tensor, Decode]:
    bases = [delta.basis.double() for delta, _ in turns if isinstance(delta, SubspaceRotated)]
    spanning = torch.cat([*bases, bases[0].new_zeros(max(0, 2 - sum(map(len, bases))), base.shape[1])])  # a plane
    joint = torch.linalg.qr(spanning.mT).Q  # (n, K)
    size = joint.shape[1]
    rows, cols = torch.triu_indices(size, size, 1)
    x = joint.new_zeros(len(turns), 1, len(rows))
    for task, (delta, update) in zip(x, turns, strict=True):
        if isinstance(delta, SubspaceRotated) and update is not None:
            inside = joint.mT @ delta.basis.double().mT  # (K, r)
            task.copy_(generator(inside @ update @ inside.mT, chart)[rows, cols][None])
    lengths = _lengths(x, weights)

    def decode(merged: Tensor) -> SubspaceRotated:
        update = turn(skew(with_mean_length(merged[0], lengths), size), chart)
        return SubspaceRotated(base, joint.mT.to(base.dtype), update.to(base.dtype))

    return x, decode


def _decoupled(
    turns: Turns, base: Tensor, weights: Tensor, chart: Chart, conflict: bool, residual_scale: float
) -> tuple[Tensor, Decode]:
    W = base.double()
    gram = W.mT @ W
    total, lengths, x = torch.zeros_like(gram), [], []
    mean = torch.stack([delta.dense() for delta, _ in turns]).mean(0) if conflict else None
    for (delta, known), weight in zip(turns, weights.tolist(), strict=True):
        change = delta.dense().double()
        if known is None or mean is not None:
            target = change if mean is None else change * _disagrees(change, mean)
            update = procrustes(gram, W.mT @ target) if target.any() else torch.zeros_like(gram)
        else:
            update = _whole(delta, known, base.shape[1])
        Q = generator(update, chart)
        total += weight * Q
        lengths.append(abs(weight) * float(torch.linalg.vector_norm(Q)))
        rest = change - W @ update
        rounding = torch.linalg.vector_norm(rest) <= RANGE * torch.linalg.vector_norm(change)
        x.append(torch.zeros_like(base) if rounding else rest.to(base.dtype))  # no noise for a method to blow up
    turned = (W @ turn(with_mean_length(total, lengths), chart)).to(base.dtype)  # W (R - I)
    return torch.stack(x), lambda merged: Dense(turned + residual_scale * merged)


def _disagrees(change: Tensor, mean: Tensor) -> Tensor:
    """Return 1 for the outputs (rows) whose change points away from the mean change, else 0, as a column."""
    return ((change * mean).sum(1, keepdim=True) < 0).to(change)


def _whole(delta: Delta, update: Tensor, n: int) -> Tensor:
    """Return ``C - I`` as an (n, n) matrix."""
    if isinstance(delta, SubspaceRotated):
        basis = delta.basis.double()
        return basis.mT @ update @ basis
    return _enlarged(update, n, n)[0]


def _enlarged(update: Tensor, size: int, n: int) -> Tensor:
    """Return blocks (g, b, b), or one shared block, as blocks (n / size, size, size), zero beside the diagonal."""
    b = update.shape[-1]
    each = update.expand(n // b, b, b).reshape(n // size, size // b, b, b)
    large = update.new_zeros(n // size, size // b, b, size // b, b)
    large.diagonal(dim1=1, dim2=3).copy_(each.permute(0, 2, 3, 1))
    return large.reshape(n // size, size, size)


def _lengths(x: Tensor, weights: Tensor) -> list[float]:
    lengths: list[float] = (weights.abs().to(x) * torch.linalg.vector_norm(x, dim=(1, 2))).tolist()
    return lengths
