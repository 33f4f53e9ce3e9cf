"""One function per adapter format on disk: the tensors of one module become a delta of its weight.

A reader sees the weight as a matrix (outputs, inputs) in float32, whatever its layout on disk, and returns the delta in
the same orientation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthoft.bases import check_fingerprint, fingerprint, signed_svd, subspace_update
from orthoft.delta import Delta, Dense, LowRank, Rotated
from orthoft.errors import unknown
from orthoft.givens import plane_rotations, tree_blocks, tree_product
from orthoft.linalg import householder_factors, reflection_rows, rotation_update, within_radius
from orthoft.sparse import (
    compressed,
    core_size,
    find_entries,
    sparse_product,
    spectral_bases,
    spectral_fingerprint,
)

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]  # of one module, named by what stands behind the module's name
Shapes = Mapping[str, tuple[int, ...]]
Read = Callable[[Config, str, Tensors, Tensor], Delta]


@dataclass(frozen=True)
class Extent:
    """What an adapter says of its weight before anything is read; None where any number will do."""

    outputs: int | None
    inputs: int | None
    rank: int | None  # of the factors, None if the delta will have none


@dataclass(frozen=True)
class Reader:
    """A format: the common beginning of its parameter names, what it refuses, what it says of a weight, its delta."""

    peft_type: str
    prefix: str
    refusals: Callable[[Config], list[str]]
    extent: Callable[[Config, Shapes], Extent]
    read: Read


READERS: dict[str, Reader] = {}


def reader(
    peft_type: str,
    *,
    prefix: str,
    extent: Callable[[Config, Shapes], Extent],
    refusals: Callable[[Config], list[str]] = lambda config: [],
) -> Callable[[Read], Read]:
    """Register a function (config, module, its tensors, weight) -> Delta as the reader of a ``peft_type``."""

    def register(read: Read) -> Read:
        READERS[peft_type] = Reader(peft_type, prefix, refusals, extent, read)
        return read

    return register


def get_reader(config: Config) -> Reader:
    """Return the reader of an adapter, or raise a ValueError: the format is unknown, or uses what cannot be merged."""
    peft_type = config.get("peft_type")
    if peft_type not in READERS:
        raise unknown("peft_type", peft_type, READERS)
    found = READERS[peft_type]
    if refused := found.refusals(config):
        raise ValueError(f"it uses {', '.join(refused)}, which no change of its weights can represent")
    return found


def by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that is the end of the module's name, or is a regular expression for it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


_LORA_FIELDS = (
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "arrow_config",
    "monteclora_config",
    "layer_replication",
)


def _lora_refusals(config: Config) -> list[str]:
    init = str(config.get("init_lora_weights")).lower()
    # These change the base weights at the start, so that the factors alone are not the change of the base.
    changed = (
        [f"init_lora_weights={init!r}"] if init.startswith(("pissa", "olora", "corda", "lora_ga", "loftq")) else []
    )
    return [field for field in _LORA_FIELDS if config.get(field)] + changed


def _lora_extent(config: Config, shapes: Shapes) -> Extent:
    if "lora_embedding_A" in shapes:
        (rank, rows), (columns, _) = shapes["lora_embedding_A"], shapes["lora_embedding_B"]
        return Extent(rows, columns, rank)
    a, b = shapes["lora_A.weight"], shapes["lora_B.weight"]
    inputs = torch.Size(a[1:]).numel()
    magnitude = any(name.startswith("lora_magnitude_vector") for name in shapes)
    return Extent(b[0], inputs, None if magnitude else a[0])


@reader("LORA", prefix="lora_", extent=_lora_extent, refusals=_lora_refusals)
def lora(config: Config, module: str, tensors: Tensors, weight: Tensor) -> Delta:
    """``delta = s B A`` with ``s = alpha / r``, or ``alpha / sqrt(r)`` (rsLoRA); the scale goes inside ``B``.

    DoRA: ``W' = m (W + s B A) / |W + s B A|``, norms over the inputs, ``m`` one number per output, which has full rank.
    arXiv 2106.09685, 2312.03732, 2402.09353.
    """
    tensors = dict(tensors)
    embedding = "lora_embedding_A" in tensors
    A = tensors.pop("lora_embedding_A" if embedding else "lora_A.weight").flatten(1)  # (r, n)
    B = tensors.pop("lora_embedding_B" if embedding else "lora_B.weight").flatten(1)  # (m, r)
    magnitude = tensors.pop("lora_magnitude_vector", tensors.pop("lora_magnitude_vector.weight", None))
    if tensors or (embedding and magnitude is not None):
        raise ValueError(
            f"module {module!r} has {', '.join(tensors) or 'DoRA on an embedding'}, which cannot be merged"
        )
    rank = by_pattern(config.get("rank_pattern"), module, config["r"])
    if rank != A.shape[0]:
        raise ValueError(f"module {module!r} has rank {rank} by its configuration and {A.shape[0]} by its tensors")
    alpha = by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    delta = LowRank(A.mT * scale, B.mT) if embedding else LowRank(B * scale, A)
    if magnitude is None:
        return delta
    directed = weight + delta.dense()
    norms = torch.linalg.vector_norm(directed, dim=1, keepdim=True)
    return Dense(directed * (magnitude.reshape(-1, 1) / norms) - weight)


def block_size(entries: int) -> int:
    """Return the b of a skew b x b matrix with ``b (b - 1) / 2`` entries."""
    return (1 + math.isqrt(1 + 8 * entries)) // 2


def _oftv2_extent(config: Config, shapes: Shapes) -> Extent:
    blocks, entries = shapes["orthoft_oftv2_adapter.skew"]
    return Extent(None, None if config.get("block_share") else blocks * block_size(entries), None)


@reader("ORTHOFT_OFTV2", prefix="orthoft_oftv2_", extent=_oftv2_extent)
def oftv2(config: Config, module: str, tensors: Tensors, weight: Tensor) -> Delta:
    """``W' = W Q^T`` with the block rotation ``Q`` of the skew entries (g, b (b - 1) / 2). arXiv 2506.19847."""
    skew = tensors["orthoft_oftv2_adapter.skew"]
    size = by_pattern(config.get("block_size_pattern"), module, config["block_size"])
    entries = size * (size - 1) // 2
    if skew.shape[1] != entries:
        raise ValueError(
            f"module {module!r} has blocks of {size} by its configuration, which have {entries} entries, "
            f"and {skew.shape[1]} entries by its tensors"
        )
    skew = within_radius(skew, config.get("radius"), weight.shape[1] // size)
    update = rotation_update(skew, size, config["map"], config["degree"])  # (g, b, b)
    return Rotated(weight, update.mT)


def _hra_extent(config: Config, shapes: Shapes) -> Extent:
    rank, inputs = shapes["orthoft_hra_adapter.u"]
    return Extent(None, inputs, 2 * rank if "orthoft_hra_adapter.u0" in shapes else rank)


@reader("ORTHOFT_HRA", prefix="orthoft_hra_", extent=_hra_extent)
def hra(config: Config, module: str, tensors: Tensors, weight: Tensor) -> Delta:
    """``W' = W H_1 ... H_r = W - (W U^T) M``, reflections in compact WY form. arXiv 2405.17484."""
    u, u0 = tensors["orthoft_hra_adapter.u"], tensors.get("orthoft_hra_adapter.u0")
    if (u0 is not None) != bool(config.get("orthonormal")):
        raise ValueError(f"module {module!r}: 'orthonormal' in its configuration and 'u0' in its tensors disagree")
    U, M = householder_factors(reflection_rows(u, u0))
    return LowRank(-(weight @ U.mT), M)


def _psoft_extent(config: Config, shapes: Shapes) -> Extent:
    basis = shapes.get("orthoft_psoft_adapter.basis")
    (entries,) = shapes["orthoft_psoft_adapter.skew"]
    return Extent(None, None if basis is None else basis[1], block_size(entries))


def psoft_basis(config: Config, module: str, tensors: Tensors, weight: Tensor) -> Tensor:
    """Return the saved basis (r, n) of a PSOFT adapter, or the one of the weight if it has the saved fingerprint."""
    saved = tensors.get("orthoft_psoft_adapter.basis")
    if saved is not None:
        return saved
    r = block_size(len(tensors["orthoft_psoft_adapter.skew"]))
    _, _, basis = signed_svd(weight, r, config["svd"], config["seed"])
    check_fingerprint(tensors["orthoft_psoft_adapter.fingerprint"], fingerprint(basis), f"the adapter of {module!r}")
    return basis


def psoft_update(config: Config, tensors: Tensors) -> Tensor:
    """Return ``C - I`` (r, r) of a PSOFT adapter."""
    entries = tensors["orthoft_psoft_adapter.skew"]
    alpha, beta = (tensors.get(f"orthoft_psoft_adapter.{name}") for name in ("alpha", "beta"))
    return subspace_update(entries, block_size(len(entries)), config["map"], config["degree"], alpha, beta)


@reader("ORTHOFT_PSOFT", prefix="orthoft_psoft_", extent=_psoft_extent)
def psoft(config: Config, module: str, tensors: Tensors, weight: Tensor) -> Delta:
    """``W' = W (I + V (C - I) V^T)`` in the principal subspace, ``C = diag(beta) R diag(alpha)``. arXiv 2505.11235."""
    basis = psoft_basis(config, module, tensors, weight)
    return LowRank(weight @ basis.mT @ psoft_update(config, tensors), basis)


def _goft_extent(config: Config, shapes: Shapes) -> Extent:
    name = "angles" if config["mode"] == "strict" else "planes"
    return Extent(None, shapes[f"orthoft_goft_adapter.{name}"][0] + 1, None)


@reader("ORTHOFT_GOFT", prefix="orthoft_goft_", extent=_goft_extent)
def goft(config: Config, module: str, tensors: Tensors, weight: Tensor) -> Delta:
    """``W' = W Q^T``, ``Q`` a tree of plane rotations or of free 2 x 2 matrices, then scales. arXiv 2404.04316."""
    if config["mode"] == "strict":
        planes = plane_rotations(tensors["orthoft_goft_adapter.angles"])
    else:
        planes = tensors["orthoft_goft_adapter.planes"] - torch.eye(2)
    scale = tensors.get("orthoft_goft_adapter.scale")
    if (scale is not None) != bool(config.get("scale")):
        raise ValueError(f"module {module!r}: 'scale' in its configuration and in its tensors disagree")
    blocks = tree_blocks(planes, config["block_size"], scale)
    return Dense(tree_product(weight, blocks.mT, leaders_first=False) - weight)


def _svft_truncated(config: Config) -> bool:
    return config.get("rank") is not None or bool(config.get("rank_pattern"))


def svft_size(config: Config, count: int) -> int:
    """Return the number k of singular vectors behind ``count`` values of an SVFT adapter."""
    return core_size(count, 0 if config["pattern"] == "plain" else config["off_diagonals"])


def _svft_extent(config: Config, shapes: Shapes) -> Extent:
    U, V = shapes.get("orthoft_svft_adapter.U"), shapes.get("orthoft_svft_adapter.V")
    rank = svft_size(config, shapes["orthoft_svft_adapter.values"][0]) if _svft_truncated(config) else None
    return Extent(None if U is None else U[0], None if V is None else V[1], rank)


def svft_bases(config: Config, module: str, tensors: Tensors, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U`` (m, k), ``V`` (k, n), saved or of the weight if they have the saved fingerprint, and the entries."""
    U, V = tensors.get("orthoft_svft_adapter.U"), tensors.get("orthoft_svft_adapter.V")
    k = svft_size(config, len(tensors["orthoft_svft_adapter.values"]))
    saved = U is not None and V is not None
    if U is None or V is None:
        rank = None if k == min(weight.shape) else k
        U, _, V = spectral_bases(weight, rank, config["svd"], config["seed"])
    entries = find_entries(config["pattern"], config["off_diagonals"], U, V, f"{config['seed']}:{module}")
    if not saved:
        known = tensors["orthoft_svft_adapter.fingerprint"]
        check_fingerprint(known, spectral_fingerprint(U, V, entries), f"the adapter of {module!r}")
    return U, V, entries


@reader("ORTHOFT_SVFT", prefix="orthoft_svft_", extent=_svft_extent)
def svft(config: Config, module: str, tensors: Tensors, weight: Tensor) -> Delta:
    """``delta = U M V``, M sparse, with its values times ``sigmoid(gate)`` if there is a gate. arXiv 2405.19597."""
    values, gate = tensors["orthoft_svft_adapter.values"], tensors.get("orthoft_svft_adapter.gate")
    if (gate is not None) != bool(config.get("gate")):
        raise ValueError(f"module {module!r}: 'gate' in its configuration and in its tensors disagree")
    U, V, entries = svft_bases(config, module, tensors, weight)
    if len(values) != len(entries):
        raise ValueError(
            f"module {module!r} has {len(entries)} entries by its configuration, and {len(values)} by its tensors"
        )
    values = values if gate is None else values * torch.sigmoid(gate)
    right = sparse_product(values, *compressed(entries, len(V)), V)  # (k, n)
    return LowRank(U, right) if _svft_truncated(config) else Dense(U @ right)
