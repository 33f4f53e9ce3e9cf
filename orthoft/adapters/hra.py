"""HRA: the input of a frozen layer is reflected along r trained directions. arXiv 2405.17484."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn

from orthoft.adapter import InputRotation, whole
from orthoft.bases import generator_of
from orthoft.config import OrthoConfig
from orthoft.delta import Delta, LowRank
from orthoft.layer import OrthoLayer
from orthoft.linalg import add_low_rank_product, at_least_float32
from orthoft.reflections import combine_reflections, householder_factors, paired_factors, reflection_rows
from orthoft.tuner import OrthoModel


class Reflections(InputRotation):
    """``Q^T = H_1 ... H_r``, ``H_i = I - 2 u_i^T u_i / |u_i|^2``, in compact WY form ``Q^T = I - U^T M``.

    ``u`` (r, n) float32. It starts with equal neighbours (u1, u1, u2, u2, ...): their reflections cancel, ``Q = I``.
    The orthonormal variant has twice as many reflections, half of them frozen (``u0``, a saved buffer). They are drawn
    by the name of the layer: whoever copies the parameters of an adapter into another, as TRL does, copies all of it.
    Exactly orthogonal, and exactly ``I`` plus rank r (2r orthonormal).
    """

    u0: Tensor | None

    def __init__(self, key: str, features: int, r: int, orthonormal: bool, orthogonality_weight: float) -> None:
        super().__init__()
        self.name = f"{key}:{r}:{features}"
        self.orthonormal, self.orthogonality_weight = orthonormal, orthogonality_weight
        self.u = nn.Parameter(torch.empty(r, features))
        self.register_buffer("u0", torch.empty(r, features) if orthonormal else None)

    def reset_parameters(self, identity: bool = True) -> None:
        """Draw the directions uniformly from +-sqrt(2 / r), the scale for which published learning rates are meant."""
        if self.u.is_meta:
            return
        bound = (2 / len(self.u)) ** 0.5
        with torch.no_grad():
            if self.u0 is None:
                self.u.uniform_(-bound, bound)
                if identity:
                    self.u[1::2] = self.u[0::2]
                return
            drawn = torch.rand(self.u.shape, generator=generator_of(self.name), device="cpu")
            self.u0.copy_(bound * (2 * drawn - 1))
            self.u.copy_(self.u0)
            if not identity:
                self.u.add_(0.1 * torch.randn_like(self.u) * self.u.std())

    def build(self) -> tuple[Tensor, Tensor]:
        """Return ``U, M``, both (r, n), with ``Q = I - U^T M``: the compact WY form, by pairs (2r when orthonormal)."""
        u0 = None if self.u0 is None else at_least_float32(self.u0)
        return paired_factors(*householder_factors(reflection_rows(at_least_float32(self.u), u0)), self.orthonormal)

    def rotate(self, x: Tensor, transpose: bool = False, inverse: bool = False) -> Tensor:
        U, M = self.matrices()
        # Q = I - M^T U, and the inverse is the transpose.
        return add_low_rank_product(x, U, M) if transpose != inverse else add_low_rank_product(x, M, U)

    def delta(self, weight: Tensor) -> Delta:
        U, M = self.matrices()
        return LowRank(-(weight @ U.to(weight.dtype).mT), M.to(weight.dtype))

    def flops_per_token(self) -> int:
        return 4 * self.u.numel() * (2 if self.orthonormal else 1)

    def combine(self, adapters: Sequence[Self], weights: Sequence[float]) -> None:
        """``H = exp(sum_i w_i log H_i)``, again a product of as many reflections as all of them have together."""
        pairs = [householder_factors(reflection_rows(a.u.double(), _double(a.u0))) for a in adapters]
        self.u.copy_(combine_reflections(pairs, weights, len(self.u)))

    def penalty(self) -> Tensor | None:
        """``lambda ||I - U U^T||_F^2`` over the normalised directions, as in the paper (squared)."""
        if self.orthogonality_weight == 0.0 or self.orthonormal:
            return None
        U = nn.functional.normalize(at_least_float32(whole(self.u)), dim=-1)
        eye = torch.eye(U.shape[0], dtype=U.dtype, device=U.device)
        return self.orthogonality_weight * torch.sum((U @ U.mT - eye) ** 2)


def _double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


@dataclass
class HRAConfig(OrthoConfig):
    """Configuration of HRA (arXiv 2405.17484): ``W' = W H``, H the product of r trained Householder reflections.

    Trains ``r n`` numbers per layer of n inputs; the update has rank r, so that it exports to a LoRA without loss.

    Args:
        r: number of reflections; even, for the identity at the start (any number when `orthonormal`).
        orthonormal: keep the directions orthonormal (the paper's lambda = infinity), paired with a frozen copy so that
            training starts at the identity.
        orthogonality_weight: lambda of the paper's regulariser ``lambda ||I - U U^T||_F^2``; add
            `orthoft.penalty(model)` to your loss (the recipes do).
        rank_pattern: numbers of reflections of single layers, by module name or regular expression.

    Raises:
        ValueError: an odd r without `orthonormal`, r below 1, a negative weight.
    """

    r: int = field(default=8, metadata={"help": "Number of reflections, even."})
    orthonormal: bool = field(default=False, metadata={"help": "Keep the directions orthonormal."})
    orthogonality_weight: float = field(default=0.0, metadata={"help": "Weight of the paper's regulariser."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Numbers of reflections of single layers, by name or expression."}
    )

    method = "hra"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole("r", self.r, *self.rank_pattern.values())
        for r in (self.r, *self.rank_pattern.values()):
            if r < 1:
                raise ValueError(f"r must be a positive number of reflections, got {r}")
            if r % 2 and self.init_weights and not self.orthonormal:
                raise ValueError(f"r must be even to start at the identity (reflections cancel in pairs), got {r}")
        if not self.orthogonality_weight >= 0:
            raise ValueError(f"orthogonality_weight must not be negative, got {self.orthogonality_weight}")

    def combined(self, others: Sequence[Self], keys: Sequence[str]) -> Self:
        """A product of all reflections, as many as the adapters have together."""
        every = (self, *others)
        counts = {k: sum((1 + c.orthonormal) * self._by_pattern(c.rank_pattern, k, c.r) for c in every) for k in keys}
        alike = [replace(c, r=2, rank_pattern={}, orthonormal=False) for c in every]
        config = OrthoConfig.combined(alike[0], alike[1:], keys)
        config.r = max(counts.values())
        config.rank_pattern = {re.escape(key): count for key, count in counts.items() if count != config.r}
        return config

    def make_adapter(self, key: str, in_features: int, out_features: int) -> Reflections:
        r = self._by_pattern(self.rank_pattern, key, self.r)
        if r > in_features:
            raise ValueError(f"r = {r} reflections do not fit the {in_features} inputs of {key!r}: choose a smaller r")
        return Reflections(key, in_features, r, self.orthonormal, self.orthogonality_weight)


class HRALayer(OrthoLayer):
    """A frozen layer with HRA adapters."""

    adapter_layer_names = ("orthoft_hra_adapter",)


class HRALinear(HRALayer):
    """A frozen linear layer with HRA adapters; PEFT's "all-linear" knows such layers by the name of their class."""


class HRAModel(OrthoModel):
    """A model whose layers carry HRA adapters."""

    prefix = "orthoft_hra_"
    tuner_layer_cls = HRALayer
    linear_layer_cls = HRALinear
