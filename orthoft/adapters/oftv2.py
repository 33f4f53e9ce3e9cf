"""OFTv2: the input of a frozen layer is rotated block by block. arXiv 2506.19847."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn

from orthoft.adapter import InputRotation, Map, cast_for_autocast
from orthoft.config import OrthoConfig
from orthoft.delta import Delta, Rotated
from orthoft.layer import OrthoLayer
from orthoft.linalg import (
    RotationMap,
    add_block_product,
    at_least_float32,
    combine_generators,
    inverse_update,
    of_map,
    rotation_update,
    skew,
    within_radius,
)
from orthoft.tuner import OrthoModel

LARGE_BLOCK = 64  # from here the series is no longer cheaper than the exact solve, and its argument no longer small


class BlockRotation(InputRotation):
    """``Q = blockdiag(R_1, ..., R_g)``, ``R_i`` the Cayley map (or its odd series) of a skew b x b matrix.

    ``skew`` (g, b (b - 1) / 2) float32 holds the strict upper triangles, zero at the start: ``Q = I`` exactly.
    With the exact map ``Q`` is orthogonal; with the series of degree D up to ``||S||^(2D)``.
    """

    def __init__(self, features: int, block_size: int, config: OFTv2Config) -> None:
        super().__init__()
        self.block_size, self.map, self.degree = block_size, config.map, config.degree
        self.dropout, self.radius = config.dropout, config.radius
        blocks = 1 if config.block_share else features // block_size
        self.skew = nn.Parameter(torch.empty(blocks, block_size * (block_size - 1) // 2))
        self.features = features

    def reset_parameters(self, identity: bool = True) -> None:
        if identity:
            nn.init.zeros_(self.skew)
        else:
            nn.init.normal_(self.skew, std=0.3 / self.block_size**0.5)

    def build(self) -> Tensor:
        """Return ``Q - I`` as blocks (g, b, b)."""
        return rotation_update(self.generators(), self.block_size, self.map, self.degree)

    def generators(self) -> Tensor:
        """Return the strict upper triangles (g, b (b - 1) / 2) of the skew matrices, within the radius."""
        return within_radius(at_least_float32(self.skew), self.radius, self.features // self.block_size)

    def rotate(self, x: Tensor, transpose: bool = False, inverse: bool = False) -> Tensor:
        update = self.matrices()
        if inverse and self.map == "cayley":
            transpose, inverse = not transpose, False  # the inverse of an exact rotation is its transpose
        update = update.mT if transpose else update
        return add_block_product(x, inverse_update(update) if inverse else update)

    def delta(self, weight: Tensor) -> Delta:
        update = self.matrices().mT
        return Rotated(weight, update.expand(self.features // self.block_size, -1, -1))

    def turn(self, x: Tensor) -> Tensor:
        return add_block_product(cast_for_autocast(x), self._drop(self.matrices()))

    def lookup(self, ids: Tensor, embed: Map) -> Tensor:
        return add_block_product(embed(ids), self._drop(self.matrices()).mT)

    def in_training(self, weight: Tensor) -> Tensor:
        return add_block_product(weight, self._drop(self.matrices()).mT)

    def flops_per_token(self) -> int:
        return self.features * (2 * self.block_size + 1)

    def combine(self, adapters: Sequence[Self], weights: Sequence[float]) -> None:
        """``R = exp(sum_i w_i log R_i)``, block by block."""
        if any((a.block_size, a.skew.shape) != (self.block_size, self.skew.shape) for a in adapters):
            raise ValueError("adapters of one combination need blocks of the same size in each layer")
        generators = [skew(of_map(a.generators().double(), a.map, a.degree), self.block_size) for a in adapters]
        rows, cols = torch.triu_indices(self.block_size, self.block_size, 1, device=self.skew.device)
        degrees = [a.degree if a.map == "series" else None for a in adapters]
        self.skew.copy_(combine_generators(generators, weights, degrees)[:, rows, cols])

    def _drop(self, update: Tensor) -> Tensor:
        """Multiplicative dropout: a block is left out, i.e. replaced by the identity, with probability ``dropout``."""
        if not self.training or self.dropout == 0.0:
            return update
        blocks = self.features // self.block_size
        keep = torch.rand(blocks, 1, 1, device=update.device) >= self.dropout
        return update * keep


@dataclass
class OFTv2Config(OrthoConfig):
    """Configuration of OFTv2 (arXiv 2506.19847): ``W' = W Q^T`` with a block-diagonal rotation ``Q`` of the inputs.

    Trains ``n (b - 1) / 2`` numbers per layer of n inputs.

    Args:
        block_size: size b of the blocks; has to divide the number of inputs of each layer.
        map: "series" (odd polynomial, three small products at degree 5, orthogonal to ``||S||^(2 degree)``) or
            "cayley" (one small solve, exactly orthogonal). Blocks of 64 and more always take "cayley".
        degree: degree of the series, odd.
        block_share: one block for all, ``b (b - 1) / 2`` numbers per layer.
        radius: bound of ``||S||_F`` over the skew generators of all blocks of a layer (constrained OFT), None for free.
        dropout: probability with which a block is left out of a training step.
        block_size_pattern: block sizes of single layers, by module name or regular expression, as in `rank_pattern`.

    Raises:
        ValueError: an even degree, an unknown map, a radius of 0 or less, a dropout outside [0, 1), a block size
            below 2.
    """

    block_size: int = field(default=32, metadata={"help": "Size of the rotated blocks; divides the layer's inputs."})
    map: RotationMap = field(default="series", metadata={"help": "'series' (odd polynomial) or 'cayley' (exact)."})
    degree: int = field(default=5, metadata={"help": "Odd degree of the series."})
    block_share: bool = field(default=False, metadata={"help": "One block for all blocks of a layer."})
    radius: float | None = field(default=None, metadata={"help": "Bound of the generators' norm in a layer."})
    dropout: float = field(default=0.0, metadata={"help": "Probability that a block is left out of a training step."})
    block_size_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Block sizes of single layers, by name or regular expression."}
    )

    method = "oftv2"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("map", ("series", "cayley"))
        self._check_whole("degree", self.degree)
        self._check_whole("block_size", self.block_size, *self.block_size_pattern.values())
        if self.degree < 1 or self.degree % 2 == 0:
            raise ValueError(f"degree must be odd (the defect is ||S||^(2 degree) then), got {self.degree}")
        if self.radius is not None and not self.radius > 0:
            raise ValueError(f"radius must be positive, or None for no constraint, got {self.radius}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        largest = max([self.block_size, *self.block_size_pattern.values()])
        if self.map == "series" and largest >= LARGE_BLOCK:
            warnings.warn(f"blocks of {largest} take the exact map: setting map='cayley'", stacklevel=3)
            self.map = "cayley"

    def combined(self, others: Sequence[Self], keys: Sequence[str]) -> Self:
        """As for every adapter, with the exact map: sums leave the range of the series, and any radius."""
        alike = [replace(c, map=self.map, degree=self.degree) for c in others]
        config = super().combined(alike, keys)
        config.map, config.radius = "cayley", None
        return config

    def make_adapter(self, key: str, in_features: int, out_features: int) -> BlockRotation:
        size = self._by_pattern(self.block_size_pattern, key, self.block_size)
        if in_features < 2:
            raise ValueError(f"{key!r} has {in_features} input, and a block needs 2: exclude this layer")
        if size < 2 or in_features % size:
            divisors = [d for d in range(2, in_features + 1) if in_features % d == 0]
            near = sorted(divisors, key=lambda d: abs(d - size))[:4]
            raise ValueError(
                f"block_size {size} does not divide the {in_features} inputs of {key!r}: choose one of "
                f"{sorted(near)}, or set block_size_pattern={{{key.rpartition('.')[2]!r}: ...}} for this layer"
            )
        return BlockRotation(in_features, size, self)


class OFTv2Layer(OrthoLayer):
    """A frozen layer with OFTv2 adapters."""

    adapter_layer_names = ("orthoft_oftv2_adapter",)


class OFTv2Linear(OFTv2Layer):
    """A frozen linear layer with OFTv2 adapters; PEFT's "all-linear" knows such layers by the name of their class."""


class OFTv2Model(OrthoModel):
    """A model whose layers carry OFTv2 adapters."""

    prefix = "orthoft_oftv2_"
    tuner_layer_cls = OFTv2Layer
    linear_layer_cls = OFTv2Linear
