"""Trees of plane rotations as pure functions: composed into blocks, applied to blocks of coordinates, then to leaders.

Stage s = 1, 2, ... of the tournament tree acts on the planes ``(2^s j, 2^s j + 2^(s-1))`` of n coordinates, for every j
whose second coordinate exists: the first of each plane is its leader and goes on to the next stage. That makes n - 1
planes, kept stage by stage, j ascending. With ``P_s`` the n x n matrix of stage s, rows are mapped to
``x' = x P_L ... P_1``.

The log2(k) stages of one *level* compose into k x k blocks, and the next level acts on every k-th coordinate, so two
levels of k = 64 serve 4096 coordinates: two block products in place of twelve passes. GOFT, arXiv 2404.04316.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from orthoft.linalg import add_blocks


def plane_rotations(angles: Tensor) -> Tensor:
    """Return ``G - I`` (..., 2, 2) for ``G = [[cos a, -sin a], [sin a, cos a]]``, exact for small ``angles`` (...)."""
    sine, fall = torch.sin(angles), -2 * torch.sin(angles / 2) ** 2  # cos a - 1 without cancellation
    return torch.stack([fall, -sine, sine, fall], dim=-1).reshape(*angles.shape, 2, 2)


def tree_blocks(planes: Tensor, block_size: int, scale: Tensor | None = None) -> Tensor:
    """Return the blocks of ``Q = P_L ... P_1 diag(s)`` as updates, those of the first level first.

    Args:
        planes: (n - 1, 2, 2), ``G - I`` of each plane.
        block_size: a power of two; blocks are smaller where n is. `tree_product` with them does not depend on it.
        scale: ``s`` (n,), or None for ones.

    Returns:
        (b, k, k) with ``B - I`` of each block: ceil(n / k) for the first level, ceil(n / k^2) for the second, and so
        on. The last block of a level is the identity beyond its coordinates.
    """
    n = len(planes) + 1
    depth = (min(block_size, n) - 1).bit_length()
    size = 2**depth
    counts = [-(-width // size) for width in _widths(n, size)]
    by_stage = torch.split(planes, [(n + half - 1) // (2 * half) for half in _powers_below(n)])
    leaves = planes.new_zeros(0) if scale is None else scale - 1
    blocks = pad(leaves, (0, size * sum(counts) - len(leaves))).reshape(-1, 1, 1)
    for t in range(depth):
        wanted = [count * size >> (t + 1) for count in counts]
        stages = [*by_stage[t::depth], planes.new_zeros(0, 2, 2)][: len(counts)]  # the last level may have fewer
        whole = [pad(stage, (0, 0, 0, 0, 0, w - len(stage))) for stage, w in zip(stages, wanted, strict=True)]
        blocks = _join(blocks, torch.cat(whole))
    return blocks


def tree_product(x: Tensor, blocks: Tensor, leaders_first: bool = True) -> Tensor:
    """Return ``x Q`` for rows ``x`` (..., n) and the ``blocks`` (b, k, k) of `tree_blocks`, never forming n x n.

    ``Q`` takes the leaders first. Transposed or inverted blocks give ``x Q^T`` or ``x Q^-1`` with ``leaders_first``
    False, and blocks that are both give ``x Q^-T``. ``x`` may have any dtype; the blocks are cast to it, never ``x``.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    blocks = blocks.to(x.dtype)
    if leaders_first:
        return cast(Tensor, _LeadersFirst.apply(rows, blocks)).reshape(x.shape)  # type: ignore[no-untyped-call]
    return _blocks_first(rows, blocks).reshape(x.shape)


def tree_flops(n: int, block_size: int) -> int:
    """Return the floating-point operations of `tree_product` per row."""
    size = 1 << (min(block_size, n) - 1).bit_length()
    levels = list(_widths(n, size))
    products = sum(2 * part.number * part.width**2 for width in levels for part in _parts(width, size))
    return products + 2 * sum(levels[:-1])  # and the changes of the leaders, once through each block


def _widths(n: int, size: int) -> Iterator[int]:
    """Yield the number of coordinates of each level: n, then the leaders of its blocks, down to the last block."""
    while n > 1:
        yield n
        n = -(-n // size)


def _powers_below(n: int) -> Iterator[int]:
    half = 1
    while half < n:
        yield half
        half *= 2


def _join(blocks: Tensor, stage: Tensor) -> Tensor:
    """Return the updates (p, 2h, 2h) of ``P diag(B_1, B_2)`` for pairs of ``blocks`` (2p, h, h) and planes (p, 2, 2).

    ``P`` mixes the two leading rows ``e + d`` (one-hot plus update): row a becomes ``sum_b (I + S)_ab (e_b + d_b)``,
    which less ``e_a`` is ``sum_b S_ab (e_b + d_b) + d_a``.
    """
    pairs = blocks.reshape(len(stage), 2, *blocks.shape[1:])  # (p, 2, h, h)
    leading = pairs[:, None, :, 0]  # (p, 1, 2, h)
    both = torch.eye(2, dtype=blocks.dtype, device=blocks.device)
    mixed = stage.unsqueeze(-1) * (leading + _one_hot(blocks)) + both.unsqueeze(-1) * leading  # (p, 2, 2, h)
    others = pairs[:, :, 1:, None] * both[:, None, :, None]  # (p, 2, h - 1, 2, h)
    return torch.cat([mixed.unsqueeze(2), others], dim=2).flatten(3).flatten(1, 2)


def _one_hot(blocks: Tensor) -> Tensor:
    """Return the first row (1, k) of the identity of the blocks (b, k, k)."""
    return torch.eye(1, blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)


class _LeadersFirst(torch.autograd.Function):
    """`tree_product` for ``Q``: saves the rows alone, and passes over them as rarely as block products can."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, blocks: Tensor) -> Tensor:
        return _leaders_first(rows, blocks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        rows, blocks = ctx.saved_tensors
        return _gradients(rows, blocks, grad)


def _leaders_first(rows: Tensor, blocks: Tensor) -> Tensor:
    """Return ``x Q``: block products of the rows as they are, then what the change of the leaders adds to them."""
    out = _add_blocks(rows, blocks)
    size, count = _first_level(rows, blocks)
    if len(blocks) > count:
        change = _change_of_leaders(rows, blocks).mT.unsqueeze(-1)  # (g, t, 1)
        into = blocks[:count, :1] + _one_hot(blocks)  # (g, 1, k)
        for part in _parts(rows.shape[1], size):
            part.of(out).addcmul_(change[part.blocks], into[part.blocks, :, : part.width])
    return out


def _first_level(rows: Tensor, blocks: Tensor) -> tuple[int, int]:
    """Return the size k and the number ceil(n / k) of the blocks that act on all coordinates of rows (t, n)."""
    size = blocks.shape[-1]
    return size, -(-rows.shape[1] // size)


def _change_of_leaders(rows: Tensor, blocks: Tensor) -> Tensor:
    """Return what the levels above the first add to its leaders (t, g), every k-th coordinate of the rows."""
    size, count = _first_level(rows, blocks)
    leaders = rows[:, ::size].contiguous()
    return _leaders_first(leaders, blocks[count:]) - leaders


def _blocks_first(rows: Tensor, blocks: Tensor) -> Tensor:
    """Return ``x Q^T`` or ``x Q^-1`` from blocks transposed or inverted; plain operations, differentiated as such."""
    size, count = _first_level(rows, blocks)
    out = _add_blocks(rows, blocks)
    if len(blocks) > count:
        out[:, ::size] = _blocks_first(out[:, ::size].contiguous(), blocks[count:])  # a copy for autograd to keep
    return out


def _gradients(rows: Tensor, blocks: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `_leaders_first` with respect to rows (t, n) and blocks (b, k, k)."""
    size, count = _first_level(rows, blocks)
    towards = _add_blocks(grad, blocks.mT)
    outer = torch.cat([pad(part.of(rows).mT @ part.of(grad), part.missing) for part in _parts(rows.shape[1], size)])
    if len(blocks) == count:
        return towards, outer
    change = _change_of_leaders(rows, blocks).mT.unsqueeze(1)  # (g, 1, t)
    first = torch.cat([pad(change[p.blocks] @ p.of(grad), p.missing[:2]) for p in _parts(rows.shape[1], size)])
    outer = torch.cat([outer[:, :1] + first, outer[:, 1:]], dim=1)
    leaders, above = _gradients(rows[:, ::size].contiguous(), blocks[count:], towards[:, ::size].contiguous())
    towards[:, ::size] = leaders
    return towards, torch.cat([outer, above])


def _add_blocks(rows: Tensor, blocks: Tensor) -> Tensor:
    """Return ``x (I + blockdiag(D_1, ..., D_g))`` for rows (t, n), g = ceil(n / k), the last block cut to fit."""
    parts = _parts(rows.shape[1], blocks.shape[-1])
    done = [add_blocks(p.columns(rows), blocks[p.blocks, : p.width, : p.width]) for p in parts]
    return done[0] if len(done) == 1 else torch.cat(done, dim=1)


class _Part(NamedTuple):
    """Equal blocks of one level: all whole ones, or the narrower last one."""

    start: int
    number: int
    width: int
    size: int

    @property
    def blocks(self) -> slice:
        return slice(self.start, self.start + self.number)

    @property
    def missing(self) -> tuple[int, int, int, int]:
        """The padding to whole blocks."""
        return (0, self.size - self.width) * 2

    def columns(self, rows: Tensor) -> Tensor:
        """Return the columns (t, number width) of rows (t, n) in these blocks, a view."""
        return rows.narrow(1, self.start * self.size, self.number * self.width)

    def of(self, rows: Tensor) -> Tensor:
        """Return the same as (number, t, width), a view."""
        return self.columns(rows).view(rows.shape[0], self.number, self.width).transpose(0, 1)


def _parts(n: int, size: int) -> list[_Part]:
    whole, tail = n // size, n % size  # divmod stops torch.compile
    parts = [_Part(0, whole, size, size), _Part(whole, 1, tail, size)]
    return [part for part in parts if part.number and part.width]
