"""What SVFT trains: a sparse matrix between the singular vectors of a frozen weight. arXiv 2405.19597."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from orthoft.adapter import Adapter, FrozenLinear, Map, cast_for_autocast, have_values, is_replica
from orthoft.bases import check_fingerprint
from orthoft.delta import Delta, Dense, LowRank
from orthoft.errors import NeedsWeights
from orthoft.linalg import at_least_float32
from orthoft.sparse import (
    compressed,
    entry_count,
    find_entries,
    sparse_product,
    spectral_bases,
    spectral_fingerprint,
    weight_is_cheaper,
)

if TYPE_CHECKING:
    from orthoft.adapters.svft import SVFTConfig


class SpectralUpdate(Adapter):
    """``W' = W + U M V = U (Sigma + M) V``: M is sparse (k, k), ``U`` (m, k) and ``V`` (k, n) singular vectors of W.

    ``values`` (nnz,) float32 holds the entries of M, zero at the start, times ``sigmoid(gate)`` with a ``gate`` (1,).
    ``cols`` (nnz,) and ``offsets`` (k,) say where they stand. The bases are saved only if asked; their fingerprint is,
    and a state that was trained in other bases is refused with a ValueError.

    Two schedules. On activations: ``U (M (V x))`` is added to the frozen layer, or, where ``U Sigma V`` is its weight
    up to rounding, ``U (Sigma + M) V x`` replaces it (the outputs then differ from the layer's by rounding, at the
    start too). On the weight: ``W + U (M V)``, formed once per call, or kept in evaluation mode.
    """

    kept = ("U", "V", "sigma", "fingerprint")

    values: nn.Parameter
    gate: nn.Parameter | None
    U: Tensor
    V: Tensor
    sigma: Tensor
    cols: Tensor
    offsets: Tensor
    fingerprint: Tensor

    def __init__(self, config: SVFTConfig, key: str, shape: tuple[int, int], k: int) -> None:
        super().__init__()
        self.config, self.name, self.shape, self.k = config, f"{config.seed}:{key}", shape, k
        count = entry_count(k, 0 if config.pattern == "plain" else config.off_diagonals)
        self.values = nn.Parameter(torch.empty(count))
        self.register_parameter("gate", nn.Parameter(torch.empty(1)) if config.gate else None)
        self.register_buffer("U", torch.empty(shape[0], k), persistent=config.save_basis)
        self.register_buffer("V", torch.empty(k, shape[1]), persistent=config.save_basis)
        self.register_buffer("sigma", torch.empty(k), persistent=False)
        self.register_buffer("cols", torch.empty(count, dtype=torch.long), persistent=False)
        self.register_buffer("offsets", torch.empty(k, dtype=torch.long), persistent=False)
        self.register_buffer("fingerprint", torch.empty(17))
        self.embed_scale = 1.0
        self._factors_weight: bool | None = None

    @torch.no_grad()
    def adopt(self, weight: Callable[[], Tensor]) -> None:
        """Take the bases from the weight.

        Raises:
            ValueError: the weight has no values yet.
        """
        W = weight()
        if W.is_meta:
            raise NeedsWeights(
                "SVFT takes its bases from the weight, which is on the meta device: load the model first"
            )
        rank = None if self.k == min(self.shape) else self.k
        found = spectral_bases(W, rank, self.config.svd, self.config.seed)
        self._buffers.update(zip(("U", "sigma", "V"), found, strict=True))
        self._buffers["fingerprint"] = self._take_entries().to(W.device)

    def reset_parameters(self, identity: bool = True) -> None:
        start: Callable[[Tensor], Any] = nn.init.zeros_ if identity else lambda t: nn.init.normal_(t, std=0.1)
        for parameter in self.parameters():
            start(parameter)

    def sources(self) -> list[Tensor]:
        return list(self.parameters())

    def entries(self) -> Tensor:
        """Return the entries of M (nnz,)."""
        values = at_least_float32(self.values)
        return values if self.gate is None else values * torch.sigmoid(at_least_float32(self.gate))

    def right(self, entries: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``M V`` (k, n)."""
        return sparse_product(entries, self.cols, self.offsets, self.V.to(dtype))

    def update(self, entries: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``U M V`` (m, n)."""
        return self.U.to(dtype) @ self.right(entries, dtype)

    def build(self) -> tuple[Tensor, Tensor | None]:
        """Return the entries of M, and where it will be kept and the schedule is to use it, ``U M V``."""
        entries = self.entries()
        passing = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        dense = self.config.schedule == "weight" and not passing
        return entries, self.update(entries, self.U.dtype) if dense else None

    def forward(self, x: Tensor, linear: FrozenLinear) -> Tensor:
        x = cast_for_autocast(x)
        entries, update = self.matrices()
        chain = self._may_chain(x, linear)
        if update is None and not self._on_weight(x, linear, chain):
            return self._on_activations(x, linear, entries, chain)
        if update is None:
            update = self.update(entries, x.dtype if linear.weight is None else linear.weight.dtype)
        if linear.weight is None:
            return linear(x) + nn.functional.linear(x, update.to(x.dtype))
        return nn.functional.linear(x, linear.weight + update.to(linear.weight.dtype), linear.bias)

    def lookup(self, ids: Tensor, embed: Map) -> Tensor:
        rows = embed(ids)
        change = self.U[ids].to(rows.dtype) @ self.right(self.entries(), rows.dtype)
        return rows + change * self.embed_scale

    def delta(self, weight: Tensor) -> Delta:
        entries = self.entries()
        if self.k == min(self.shape):
            return Dense(self.update(entries, weight.dtype))
        return LowRank(self.U.to(weight.dtype), self.right(entries, weight.dtype))

    def flops_per_token(self) -> int:
        """On activations, beside the frozen layer; ``2 m n`` less where the chain replaces it."""
        return 2 * self.k * sum(self.shape) + 2 * self.values.numel()

    def combine(self, adapters: Sequence[Self], weights: Sequence[float]) -> None:
        """``M = sum_i w_i M_i``, exact: the update is linear in M."""
        first = adapters[0]
        for other in adapters[1:]:
            if not torch.equal(other.cols, first.cols) or not torch.equal(other.offsets, first.offsets):
                raise ValueError("SVFT adapters of one combination need the same pattern of entries in each layer")
            check_fingerprint(other.fingerprint, first.fingerprint, "one of the combined adapters")
        self._buffers.update({name: buffer.clone() for name, buffer in first.named_buffers()})
        self._factors_weight = None
        total = torch.stack([w * a.entries() for a, w in zip(adapters, weights, strict=True)]).sum(0)
        if self.gate is not None:
            self.gate.zero_()
            total = 2 * total  # the sigmoid halves it
        self.values.copy_(total)

    def train(self, mode: bool = True) -> Self:
        self._factors_weight = None
        return super().train(mode)

    def _on_activations(self, x: Tensor, linear: FrozenLinear, entries: Tensor, chain: bool) -> Tensor:
        inner = self.V.to(x.dtype) @ x.reshape(-1, self.shape[1]).mT  # (k, T)
        changed = sparse_product(entries, self.cols, self.offsets, inner)
        if not chain:
            change = nn.functional.linear(changed.mT, self.U.to(x.dtype))
            return linear(x) + change.reshape(*x.shape[:-1], self.shape[0])
        changed = torch.addcmul(changed, self.sigma[:, None], inner)
        return nn.functional.linear(changed.mT, self.U, linear.bias).reshape(*x.shape[:-1], self.shape[0])

    def _on_weight(self, x: Tensor, linear: FrozenLinear, chain: bool) -> bool:
        if self.config.schedule != "auto":
            return self.config.schedule == "weight"
        training = torch.is_grad_enabled() and self.values.requires_grad
        tokens, known = x.numel() // self.shape[1], linear.weight is not None
        if isinstance(tokens, torch.SymInt):  # exported for any number, which must not choose
            return False
        return weight_is_cheaper(tokens, self.shape, self.k, chain=chain, known=known, training=training)

    def _may_chain(self, x: Tensor, linear: FrozenLinear) -> bool:
        """Say whether ``U Sigma V`` may stand for the frozen layer: nothing is cut off, rounded or trained there."""
        weight = linear.weight
        if weight is None or weight.requires_grad or self.k < min(self.shape):
            return False
        alike = x.dtype == weight.dtype == self.U.dtype and x.dtype in (torch.float32, torch.float64)
        return alike and self._gives(weight)

    def _gives(self, weight: Tensor) -> bool:
        """Say whether the weight is (still) ``U Sigma V``, by one product with a vector per change of mode.

        While compiling it is taken for granted: the answer would break the graph.
        """
        if self._factors_weight is None and not torch.compiler.is_compiling():
            if not have_values((weight, self.U, self.V)):
                return False
            with torch.no_grad():
                probe = torch.randn(self.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
                wanted = weight @ probe
                error = torch.linalg.vector_norm(self.U @ (self.sigma * (self.V @ probe)) - wanted)
                allowed = 100 * torch.finfo(weight.dtype).eps * torch.linalg.vector_norm(wanted)
                self._factors_weight = bool(error <= allowed)
        return self._factors_weight is not False

    def _take_entries(self) -> Tensor:
        """Find the entries for the bases as they are now, and return the fingerprint of all of it."""
        found = find_entries(self.config.pattern, self.config.off_diagonals, self.U, self.V, self.name)
        self.cols, self.offsets = (part.to(self.U.device) for part in compressed(found, self.k))
        self._factors_weight = None
        return spectral_fingerprint(self.U, self.V, found)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Load, after the check that the adapter was trained in the bases it will act in.

        Raises:
            ValueError: it was not.
        """
        if (saved := state_dict.get(f"{prefix}fingerprint")) is not None:
            self._check(saved)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.config.save_basis:
            self._take_entries()

    def __setattr__(self, name: str, value: Any) -> None:
        """Check and follow what is set from outside: transformers' own loader sets tensors one by one."""
        follow = not is_replica(self)  # a replica gets all of its model's
        if follow and name == "fingerprint":
            self._check(value)
        super().__setattr__(name, value)
        if follow and name in ("U", "V"):
            self._take_entries()

    def _check(self, saved: Tensor) -> None:
        if not self.config.save_basis:  # saved bases come with it
            check_fingerprint(saved, self.fingerprint, f"the adapter of {self.name.partition(':')[2]!r}")
