"""PEFT's BOFT on disk: a rotation as a product of butterfly factors, and a scale for each output."""

from __future__ import annotations

import torch
from torch import Tensor

from orthoft.delta import Delta, Dense, Rotated
from orthoft.linalg import add_block_product, cayley_update
from orthoft.merging.formats.registry import Config, Extent, Shapes, Tensors, reader


def butterfly_update(matrices: Tensor) -> Tensor:
    """Return ``R - I`` of the blocks of ``R = F_N ... F_1``, from BOFT's matrices (N, g, b, b), as PEFT composes them.

    ``F_i = P_i diag(C_1, ..., C_g) P_i^T``, ``C`` the Cayley maps ``(I - S)(I + S)^-1`` of the skew parts. ``P_i``
    mixes within ``b 2^(i-1)`` neighbours, so that ``R`` has blocks of ``B = b 2^(N-1)``.

    Returns:
        (g b / B, B, B)

    Raises:
        ValueError: the blocks are odd, or too few, for so many factors.
    """
    factors, count, size, _ = matrices.shape
    joined = 2 ** (factors - 1)
    if count % joined or (factors > 1 and size % 2):
        raise ValueError(f"{count} blocks of {size} cannot have {factors} butterfly factors")
    small = cayley_update((matrices.mT - matrices) / 2)  # (N, g, b, b)
    total = small.new_zeros(count // joined, joined * size, joined * size)
    for stage, updates in enumerate(small):
        order = butterfly_order(size, stage).repeat(joined // 2**stage)
        order = order + torch.arange(len(order)) // (size * 2**stage) * (size * 2**stage)
        factor = _block_diagonal(updates.unflatten(0, (-1, joined)))[:, order][:, :, order]
        total = total + factor + factor @ total
    return total


def butterfly_order(size: int, stage: int) -> Tensor:
    """Return the permutation of ``b 2^stage`` coordinates: half blocks, those at even places before those at odd."""
    width = size * 2**stage
    if stage == 0:
        return torch.arange(width)
    return torch.arange(width).reshape(2**stage, 2, size // 2).transpose(0, 1).flatten()


def _block_diagonal(blocks: Tensor) -> Tensor:
    """Return (g, k b, k b) of (g, k, b, b)."""
    groups, count, size, _ = blocks.shape
    whole = blocks.new_zeros(groups, count, size, count, size)
    index = torch.arange(count)
    whole[:, index, :, index] = blocks.transpose(0, 1)
    return whole.reshape(groups, count * size, count * size)


def _extent(config: Config, shapes: Shapes) -> Extent:
    _, count, size, other = shapes["boft_R"]
    if size != other:
        raise ValueError("blocks are square")
    return Extent(torch.Size(shapes["boft_s"]).numel(), count * size, None)


@reader("BOFT", prefix="boft_", extent=_extent, names=frozenset(["boft_R", "boft_s"]))
def boft(config: Config, module: str, tensors: Tensors, weight: Tensor) -> Delta:
    """``W' = diag(s) W R^T`` of a linear layer or a flattened convolution; a rotation where all ``s`` are 1.

    The number of factors is that of the file: PEFT trains only one where it cannot compile its CUDA kernel, whatever
    the configuration says. arXiv 2311.06243.
    """
    try:
        update = butterfly_update(tensors["boft_R"]).mT
    except ValueError as error:
        raise ValueError(f"module {module!r}: {error}") from error
    scale = tensors["boft_s"].reshape(-1, 1)
    if bool((scale == 1).all()):
        return Rotated(weight, update)
    return Dense(scale * add_block_product(weight, update) - weight)
