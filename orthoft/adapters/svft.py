"""SVFT: a sparse matrix between the singular vectors of the frozen weight is trained. arXiv 2405.19597."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, get_args

from torch import Tensor

from orthoft.bases import SVD
from orthoft.config import OrthoConfig
from orthoft.layer import OrthoLayer
from orthoft.sparse import Pattern
from orthoft.spectral import SpectralUpdate
from orthoft.tuner import OrthoModel

Schedule = Literal["auto", "activations", "weight"]


@dataclass
class SVFTConfig(OrthoConfig):
    """Configuration of SVFT (arXiv 2405.19597): ``W' = U (Sigma + M) V^T``, M sparse, over the singular vectors of W.

    Trains k numbers per layer with k = min(m, n) singular vectors (plain), or ``k (2 d + 1) - d (d + 1)``. The bases
    take ``k (m + n)`` numbers of memory per layer, in float32.

    Args:
        pattern: "plain" (the diagonal), "banded" (``|i - j| <= d``), "random" (as many entries anywhere) or "top_k"
            (as many with the largest ``|u_i^T v_j|``; square weights only).
        off_diagonals: d, not used by "plain".
        rank: keep the leading singular vectors only; all if None.
        gate: one more number per layer, ``M = values * sigmoid(gate)``.
        schedule: "activations", "weight" (for many tokens per call: forms W' in each training step, and keeps
            ``U M V^T`` in evaluation mode), or "auto", the cheaper one for the number of tokens.
        svd: "full", or "lowrank" (randomised, with a rank).
        seed: of the random pattern and of the randomised SVD.
        save_basis: save the singular vectors with the adapter; otherwise they are computed again when it is loaded,
            and compared with a saved fingerprint.
        rank_pattern: ranks of single layers, by module name or regular expression.

    Raises:
        ValueError: an unknown pattern, schedule or svd, a negative number of off-diagonals, a rank below 1, "lowrank"
            without a rank.
    """

    pattern: Pattern = field(default="plain", metadata={"help": "'plain', 'banded', 'random' or 'top_k'."})
    off_diagonals: int = field(default=2, metadata={"help": "Off-diagonals on each side, or as many entries."})
    rank: int | None = field(default=None, metadata={"help": "Number of leading singular vectors, all if None."})
    gate: bool = field(default=False, metadata={"help": "Train a common factor per layer as well."})
    schedule: Schedule = field(default="auto", metadata={"help": "'auto', 'activations' or 'weight'."})
    svd: SVD = field(default="full", metadata={"help": "'full', or 'lowrank' (randomised) with a rank."})
    seed: int = field(default=0, metadata={"help": "Seed of the random pattern and the randomised SVD."})
    save_basis: bool = field(default=False, metadata={"help": "Save the singular vectors with the adapter."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Ranks of single layers, by name or regular expression."}
    )

    method = "svft"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("pattern", get_args(Pattern))
        self._check_choice("schedule", get_args(Schedule))
        self._check_choice("svd", get_args(SVD))
        self._check_whole("off_diagonals", self.off_diagonals)
        self._check_whole("rank", *([] if self.rank is None else [self.rank]), *self.rank_pattern.values())
        if self.off_diagonals < 0:
            raise ValueError(f"off_diagonals must not be negative, got {self.off_diagonals}")
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank is not None and rank < 1:
                raise ValueError(f"rank must be a positive number of singular vectors, got {rank}")
        if self.svd == "lowrank" and self.rank is None:
            raise ValueError("svd='lowrank' finds the leading singular vectors only: give a rank, or take svd='full'")

    def combined(self, others: Sequence[Self], keys: Sequence[str]) -> Self:
        """As for the others, but they may be run and saved in different ways."""
        alike = [replace(c, schedule=self.schedule, save_basis=self.save_basis) for c in others]
        return super().combined(alike, keys)

    def make_adapter(self, key: str, in_features: int, out_features: int) -> SpectralUpdate:
        full = min(in_features, out_features)
        rank = self._rank(key, full)
        if rank > full:
            raise ValueError(
                f"rank {rank} does not fit {key!r}, which has {full} singular vectors: choose a smaller rank, or set "
                f"rank_pattern={{{key.rpartition('.')[2]!r}: ...}} for this layer"
            )
        if self.pattern == "top_k" and in_features != out_features:
            raise ValueError(
                f"pattern 'top_k' compares left with right singular vectors, so it needs square weights, but {key!r} "
                f"is ({out_features}, {in_features}): choose another pattern, or leave it out with exclude_modules"
            )
        return SpectralUpdate(self, key, (out_features, in_features), rank)

    def _rank(self, key: str, full: int) -> int:
        """Return the number of singular vectors of the layer ``key``, which has ``full`` of them."""
        return self._by_pattern(self.rank_pattern, key, full if self.rank is None else self.rank)


class SVFTLayer(OrthoLayer):
    """A frozen layer with SVFT adapters."""

    adapter_layer_names = ("orthoft_svft_adapter",)

    def update_layer(self, adapter_name: str, config: OrthoConfig, key: str) -> None:
        super().update_layer(adapter_name, config, key)
        adapter = self.adapters[adapter_name]
        assert isinstance(adapter, SpectralUpdate)
        adapter.embed_scale = _embed_scale(self.get_base_layer())


class SVFTLinear(SVFTLayer):
    """A frozen linear layer with SVFT adapters; PEFT's "all-linear" knows such layers by the name of their class."""


class SVFTModel(OrthoModel):
    """A model whose layers carry SVFT adapters."""

    prefix = "orthoft_svft_"
    tuner_layer_cls = SVFTLayer
    linear_layer_cls = SVFTLinear


def _embed_scale(base: Any) -> float:
    """Return what an embedding multiplies its rows by, rounded as it does (Gemma casts it, BART has a number)."""
    scale = getattr(base, "embed_scale", 1.0)
    return float(scale.to(base.weight.dtype) if isinstance(scale, Tensor) else scale)
