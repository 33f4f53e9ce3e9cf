"""PSOFT: the input of a frozen layer is rotated within the principal subspace of its weight. arXiv 2505.11235."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from orthoft.adapter import InputRotation, is_replica
from orthoft.adapters.oftv2 import LARGE_BLOCK
from orthoft.bases import SVD, add_subspace_product, check_fingerprint, fingerprint, signed_svd, subspace_update
from orthoft.config import OrthoConfig
from orthoft.delta import Delta, LowRank
from orthoft.layer import OrthoLayer
from orthoft.linalg import RotationMap, at_least_float32, combine_generators, inverse_update, of_map, skew
from orthoft.tuner import OrthoModel


class SubspaceRotation(InputRotation):
    """``Q^T = I + V (C - I) V^T``, ``C = diag(beta) R diag(alpha)``, ``V`` (n, r) top right singular vectors of ``W``.

    ``skew`` (r (r - 1) / 2,) float32, zero at the start, is the strict upper triangle behind the rotation ``R``;
    ``alpha``, ``beta`` (r,), one at the start, exist with `relax` only, and without them ``Q`` is orthogonal (to
    ``||S||^(2D)`` with the series). ``basis`` (r, n) float32 is ``V^T``, frozen. It is saved with the adapter, or in
    its place a ``fingerprint`` (8,), by which loading refuses a weight with other singular vectors.
    """

    kept = ("basis", "fingerprint")

    basis: Tensor
    fingerprint: Tensor | None

    def __init__(self, key: str, features: int, r: int, config: PSOFTConfig) -> None:
        super().__init__()
        self.key, self.r, self.map, self.degree = key, r, config.map, config.degree
        self.svd, self.seed, self.save_basis = config.svd, config.seed, config.save_basis
        self.skew = nn.Parameter(torch.empty(r * (r - 1) // 2))
        self.alpha = nn.Parameter(torch.empty(r)) if config.relax else None
        self.beta = nn.Parameter(torch.empty(r)) if config.relax else None
        self.register_buffer("basis", torch.empty(r, features), persistent=self.save_basis)
        self.register_buffer("fingerprint", None if self.save_basis else torch.empty(8))

    @torch.no_grad()
    def adopt(self, weight: Callable[[], Tensor]) -> None:
        """Take the basis from the weight, unless parameters on the meta device say that all of it will be loaded."""
        if self.save_basis and self.skew.is_meta:
            self.basis = self.basis.to("meta")
            return
        self.basis = signed_svd(weight(), self.r, self.svd, self.seed)[2].contiguous()
        if self.fingerprint is not None and not self.basis.is_meta:
            self.fingerprint.copy_(fingerprint(self.basis))

    def reset_parameters(self, identity: bool = True) -> None:
        nn.init.normal_(self.skew, std=0.0 if identity else 0.3 / self.r**0.5)
        for scales in (self.alpha, self.beta):
            if scales is not None:
                nn.init.normal_(scales, mean=1.0, std=0.0 if identity else 0.1)

    def sources(self) -> list[Tensor]:
        """Return the parameters only: the basis, which is large, enters no cached matrix."""
        return list(self.parameters())

    def build(self) -> Tensor:
        """Return ``C - I`` (r, r)."""
        alpha, beta = (None if scales is None else at_least_float32(scales) for scales in (self.alpha, self.beta))
        return subspace_update(at_least_float32(self.skew), self.r, self.map, self.degree, alpha, beta)

    def rotate(self, x: Tensor, transpose: bool = False, inverse: bool = False) -> Tensor:
        update = self.matrices()  # of Q^T
        if inverse and self.map == "cayley" and self.alpha is None:
            transpose, inverse = not transpose, False  # the inverse of an exact rotation is its transpose
        update = inverse_update(update) if inverse else update
        return add_subspace_product(x, self.basis, update if transpose else update.mT)

    def delta(self, weight: Tensor) -> Delta:
        basis = self.basis.to(weight.dtype)
        return LowRank(weight @ basis.mT @ self.matrices().to(weight.dtype), basis)

    def flops_per_token(self) -> int:
        return 2 * self.r * (2 * self.basis.shape[1] + self.r)

    def combine(self, adapters: Sequence[Self], weights: Sequence[float]) -> None:
        """``R = exp(sum_i w_i log R_i)``, and products of powers for the scales: ``alpha = prod_i alpha_i^w_i``.

        Raises:
            ValueError: other bases, or a negative scale to a fractional power.
        """
        first = adapters[0].basis
        if any(a.basis.shape != first.shape or not torch.allclose(a.basis, first, rtol=0, atol=1e-5) for a in adapters):
            raise ValueError(f"adapters of one combination need the same basis, those of {self.key!r} have others")
        self.basis.copy_(first)
        rows, cols = torch.triu_indices(self.r, self.r, 1, device=self.skew.device)
        generators = [skew(of_map(a.skew.double(), a.map, a.degree), self.r) for a in adapters]
        degrees = [a.degree if a.map == "series" else None for a in adapters]
        self.skew.copy_(combine_generators(generators, weights, degrees)[rows, cols])
        for name in ("alpha", "beta") if self.alpha is not None else ():
            powers = [getattr(a, name).double() ** w for a, w in zip(adapters, weights, strict=True)]
            scales = torch.stack(powers).prod(dim=0)
            if not scales.isfinite().all():
                raise ValueError(f"{name} of {self.key!r} is not positive everywhere: its power does not exist")
            getattr(self, name).copy_(scales)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load, after the check that the adapter was trained in the basis it will act in.

        Raises:
            ValueError: it was not.
        """
        if (saved := state_dict.get(prefix + "fingerprint")) is not None:
            self._check(saved)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.basis.is_meta and not self.skew.is_meta:
            raise ValueError(f"{self._name()} was saved without its basis: load it without low_cpu_mem_usage")

    def __setattr__(self, name: str, value: Any) -> None:
        """Check a fingerprint on this way in too: transformers' own loader sets tensors one by one."""
        if name == "fingerprint" and not is_replica(self):
            self._check(value)
        super().__setattr__(name, value)

    def _check(self, saved: Tensor) -> None:
        if self.basis.is_meta:
            raise ValueError(f"{self._name()} needs the weight for its basis: load the base model without offloading")
        check_fingerprint(saved, fingerprint(self.basis), self._name())

    def _name(self) -> str:
        return f"the adapter of {self.key!r}"


@dataclass
class PSOFTConfig(OrthoConfig):
    """Configuration of PSOFT (arXiv 2505.11235): ``W' = W (I + V (C - I) V^T)`` in the principal subspace of ``W``.

    Trains ``r (r - 1) / 2 + 2 r`` numbers per layer, whatever its width; the update has rank r, so that it exports to a
    LoRA without loss. Loading with ``low_cpu_mem_usage=True`` spares the SVD where the basis was saved.

    Args:
        r: dimensions of the principal subspace, at most the smaller side of each weight.
        relax: train the scales alpha and beta around the rotation; without them the transform is orthogonal.
        map: "cayley" (one r x r solve, exactly orthogonal) or "series" (odd polynomial). From r = 64 on "cayley".
        degree: degree of the series, odd.
        svd: "full" or "lowrank" (randomised, close to it, and much faster on large weights).
        seed: seed of the randomised SVD.
        save_basis: save ``V`` with the adapter (r n numbers per layer); otherwise it is computed again on loading, and
            a saved fingerprint refuses another base weight.
        rank_pattern: r of single layers, by module name or regular expression.

    Raises:
        ValueError: r below 1 (2 without `relax`, or nothing is trained), an even degree, an unknown map or svd.
    """

    r: int = field(default=32, metadata={"help": "Dimensions of the principal subspace."})
    relax: bool = field(default=True, metadata={"help": "Train scales around the rotation."})
    map: RotationMap = field(default="cayley", metadata={"help": "'cayley' (exact) or 'series' (odd polynomial)."})
    degree: int = field(default=5, metadata={"help": "Odd degree of the series."})
    svd: SVD = field(default="full", metadata={"help": "'full' or 'lowrank' (randomised)."})
    seed: int = field(default=0, metadata={"help": "Seed of the randomised SVD."})
    save_basis: bool = field(default=True, metadata={"help": "Save the basis, or only its fingerprint."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Dimensions for single layers, by name or regular expression."}
    )

    method = "psoft"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("map", ("cayley", "series"))
        self._check_choice("svd", ("full", "lowrank"))
        ranks = [self.r, *self.rank_pattern.values()]
        self._check_whole("degree", self.degree)
        self._check_whole("r", *ranks)
        least = 1 if self.relax else 2
        if min(ranks) < least:
            raise ValueError(
                f"r must be at least {least} for something to train (relax={self.relax}), got {min(ranks)}"
            )
        if self.degree < 1 or self.degree % 2 == 0:
            raise ValueError(f"degree must be odd (the defect is ||S||^(2 degree) then), got {self.degree}")
        if self.map == "series" and max(ranks) >= LARGE_BLOCK:
            warnings.warn(f"rotations of {max(ranks)} take the exact map: setting map='cayley'", stacklevel=3)
            self.map = "cayley"

    def combined(self, others: Sequence[Self], keys: Sequence[str]) -> Self:
        """As for every adapter, with the exact map: sums leave the range of the series."""
        alike = [replace(c, save_basis=self.save_basis, map=self.map, degree=self.degree) for c in others]
        config = super().combined(alike, keys)
        config.map = "cayley"
        return config

    def make_adapter(self, key: str, in_features: int, out_features: int) -> SubspaceRotation:
        r = self._by_pattern(self.rank_pattern, key, self.r)
        if r > min(in_features, out_features):
            raise ValueError(
                f"r = {r} does not fit {key!r}, which has {in_features} inputs and {out_features} outputs: choose a "
                "smaller r, or set rank_pattern for this layer"
            )
        return SubspaceRotation(key, in_features, r, self)


class PSOFTLayer(OrthoLayer):
    """A frozen layer with PSOFT adapters."""

    adapter_layer_names = ("orthoft_psoft_adapter",)


class PSOFTLinear(PSOFTLayer):
    """A frozen linear layer with PSOFT adapters; PEFT's "all-linear" knows such layers by the name of their class."""


class PSOFTModel(OrthoModel):
    """A model whose layers carry PSOFT adapters."""

    prefix = "orthoft_psoft_"
    tuner_layer_cls = PSOFTLayer
    linear_layer_cls = PSOFTLinear
