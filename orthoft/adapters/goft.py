"""GOFT and qGOFT: the input of a frozen layer passes a tree of plane rotations. arXiv 2404.04316."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn

from orthoft.adapter import InputRotation, whole
from orthoft.config import OrthoConfig
from orthoft.delta import Delta, Dense
from orthoft.givens import plane_rotations, tree_blocks, tree_flops, tree_product
from orthoft.layer import OrthoLayer
from orthoft.linalg import at_least_float32, inverse_update
from orthoft.tuner import OrthoModel

Mode = Literal["strict", "quasi"]


class TreeRotation(InputRotation):
    """``Q = P_L ... P_1 diag(s)``, ``P_s`` the plane rotations of stage s of a tournament tree over n coordinates.

    Strict: ``angles`` (n - 1,) float32, zero at the start, exactly orthogonal without ``scale``. They are plain angles:
    a rotation has a period, so that a bound such as ``pi tanh`` would only flatten gradients.
    Quasi: ``planes`` (n - 1, 2, 2) float32, free matrices in place of rotations, the identity at the start.
    ``scale`` (n,) float32, ones at the start, if there is one.
    """

    angles: nn.Parameter | None
    planes: nn.Parameter | None
    scale: nn.Parameter | None

    def __init__(self, features: int, config: GOFTConfig) -> None:
        super().__init__()
        self.features, self.block_size = features, config.block_size
        self.orthogonality_weight = config.orthogonality_weight
        strict = config.mode == "strict"
        self.angles = nn.Parameter(torch.empty(features - 1)) if strict else None
        self.planes = None if strict else nn.Parameter(torch.empty(features - 1, 2, 2))
        self.scale = nn.Parameter(torch.empty(features)) if config.scale else None

    @torch.no_grad()
    def reset_parameters(self, identity: bool = True) -> None:
        for name, parameter in self.named_parameters():
            parameter.fill_(1.0 if name == "scale" else 0.0)
            if name == "planes":
                parameter.diagonal(dim1=1, dim2=2).fill_(1.0)
            if not identity:
                parameter.add_(torch.randn_like(parameter), alpha=0.3 if name == "angles" else 0.1)

    def build(self) -> Tensor:
        """Return the composed stages less the identity, as blocks (b, k, k) of all levels."""
        if self.planes is None:
            assert self.angles is not None
            updates = plane_rotations(at_least_float32(self.angles))
        else:
            planes = at_least_float32(self.planes)
            updates = planes - torch.eye(2, dtype=planes.dtype, device=planes.device)
        scale = None if self.scale is None else at_least_float32(self.scale)
        return tree_blocks(updates, self.block_size, scale)

    def rotate(self, x: Tensor, transpose: bool = False, inverse: bool = False) -> Tensor:
        blocks = self.matrices()
        if inverse and self.planes is None and self.scale is None:
            transpose, inverse = not transpose, False  # the inverse of a rotation is its transpose
        leaders_first = transpose == inverse  # each of the two reverses the order of the factors
        blocks = inverse_update(blocks) if inverse else blocks
        return tree_product(x, blocks.mT if transpose else blocks, leaders_first)

    def delta(self, weight: Tensor) -> Delta:
        return Dense(self.merged(weight) - weight)

    def flops_per_token(self) -> int:
        return tree_flops(self.features, self.block_size)

    def combine(self, adapters: Sequence[Self], weights: Sequence[float]) -> None:
        """Angles add up, plane by plane; free matrices and scales add their distances to the identity."""
        self.reset_parameters()
        for name, parameter in self.named_parameters():
            changes = [a.get_parameter(name).double() - parameter for a in adapters]
            parameter.copy_(parameter + sum(w * change for w, change in zip(weights, changes, strict=True)))

    def penalty(self) -> Tensor | None:
        """``lambda sum <a_i, b_i>^2`` over the columns of each 2 x 2 matrix of the quasi mode."""
        if self.planes is None or self.orthogonality_weight == 0.0:
            return None
        first, second = at_least_float32(whole(self.planes)).unbind(-1)  # (n - 1, 2)
        return self.orthogonality_weight * torch.sum((first * second).sum(-1) ** 2)


@dataclass
class GOFTConfig(OrthoConfig):
    """Configuration of GOFT and qGOFT (arXiv 2404.04316): ``W' = W Q^T``, ``Q`` a tree of rotations in n - 1 planes.

    Trains ``n - 1`` numbers per layer of n inputs (strict) or ``4 (n - 1)`` (quasi), and n more with a scale.

    Args:
        mode: "strict" (rotations, exactly orthogonal; the paper's choice for language models) or "quasi" (free 2 x 2
            matrices, which also stretch and shear; the paper's choice for encoders and vision).
        scale: also train a factor for each input (after the rotation), as the authors' code does by default.
        orthogonality_weight: lambda of the paper's regulariser of the quasi mode, the squared inner products of the
            columns of each 2 x 2 matrix; add `orthoft.penalty(model)` to your loss (the recipes do).
        block_size: stages are composed into blocks of up to this size, a power of two. It changes the speed only,
            never the result: more passes over the activations when small, more arithmetic when large.

    Raises:
        ValueError: an unknown mode, a block size that is no power of two, a negative weight, a weight in strict
            mode.
    """

    mode: Mode = field(default="strict", metadata={"help": "'strict' (rotations) or 'quasi' (free 2 x 2 matrices)."})
    scale: bool = field(default=False, metadata={"help": "Also train a factor for each input."})
    orthogonality_weight: float = field(default=0.0, metadata={"help": "Weight of the paper's regulariser (quasi)."})
    block_size: int = field(default=32, metadata={"help": "Size of the composed blocks; for speed only."})

    method = "goft"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("mode", ("strict", "quasi"))
        self._check_whole("block_size", self.block_size)
        if self.block_size < 2 or self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size must be a power of two, 2 or more, got {self.block_size}")
        if not self.orthogonality_weight >= 0:
            raise ValueError(f"orthogonality_weight must not be negative, got {self.orthogonality_weight}")
        if self.orthogonality_weight and self.mode == "strict":
            raise ValueError(
                f"orthogonality_weight={self.orthogonality_weight} has no effect in mode 'strict', which is exactly "
                "orthogonal: leave it at 0, or choose mode='quasi'"
            )

    def combined(self, others: Sequence[Self], keys: Sequence[str]) -> Self:
        """As for every adapter; block sizes may differ."""
        return OrthoConfig.combined(self, [replace(c, block_size=self.block_size) for c in others], keys)

    def make_adapter(self, key: str, in_features: int, out_features: int) -> TreeRotation:
        if in_features < 2:
            raise ValueError(f"{key!r} has {in_features} input, and a plane rotation needs 2: exclude this layer")
        return TreeRotation(in_features, self)


class GOFTLayer(OrthoLayer):
    """A frozen layer with GOFT adapters."""

    adapter_layer_names = ("orthoft_goft_adapter",)


class GOFTLinear(GOFTLayer):
    """A frozen linear layer with GOFT adapters; PEFT's "all-linear" knows such layers by the name of their class."""


class GOFTModel(OrthoModel):
    """A model whose layers carry GOFT adapters."""

    prefix = "orthoft_goft_"
    tuner_layer_cls = GOFTLayer
    linear_layer_cls = GOFTLinear
