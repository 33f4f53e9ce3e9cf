"""Our own five adapters on disk: the tensors of one module become a delta of its weight."""

from __future__ import annotations

import torch
from torch import Tensor

from orthoft.bases import check_fingerprint, fingerprint, signed_svd, subspace_update
from orthoft.delta import Delta, Dense, LowRank, Rotated, SubspaceRotated
from orthoft.givens import plane_rotations, tree_blocks, tree_product
from orthoft.linalg import rotation_update, within_radius
from orthoft.merging.formats.fields import COUNT, COUNTS, FLAG, NUMBER, POWER, SEED, SIZE, TERMS, choice, needed
from orthoft.merging.formats.registry import (
    READERS,
    Config,
    Extent,
    Shapes,
    Tensors,
    block_size,
    by_pattern,
    expect_shape,
    get_reader,
    reader,
)
from orthoft.reflections import householder_factors, reflection_rows
from orthoft.sparse import (
    compressed,
    core_size,
    find_entries,
    sparse_product,
    spectral_bases,
    spectral_fingerprint,
)

__all__ = ["READERS", "block_size", "get_reader", "psoft_basis", "psoft_update"]

MAP = {"map": needed(choice("series", "cayley")), "degree": needed(TERMS)}
SVD = {"svd": choice("full", "lowrank"), "seed": SEED}
OFTV2 = MAP | {"block_size": needed(COUNT), "block_size_pattern": COUNTS, "block_share": FLAG, "radius": NUMBER}
GOFT = {"mode": needed(choice("strict", "quasi")), "block_size": needed(POWER), "scale": FLAG}
PATTERNS = choice("plain", "banded", "random", "top_k")
SVFT = SVD | {
    "pattern": needed(PATTERNS),
    "off_diagonals": needed(SIZE),
    "rank": COUNT,
    "rank_pattern": COUNTS,
    "gate": FLAG,
}


def _names(method: str, *parts: str) -> frozenset[str]:
    return frozenset(f"orthoft_{method}_adapter.{part}" for part in parts)


def _oftv2_extent(config: Config, shapes: Shapes) -> Extent:
    blocks, entries = shapes["orthoft_oftv2_adapter.skew"]
    return Extent(None, None if config.get("block_share") else blocks * block_size(entries), None)


@reader(
    "ORTHOFT_OFTV2",
    prefix="orthoft_oftv2_",
    extent=_oftv2_extent,
    fields=OFTV2,
    names=_names("oftv2", "skew"),
)
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
    return Extent(None, inputs, min(inputs, 2 * rank if "orthoft_hra_adapter.u0" in shapes else rank))


def reflected(weight: Tensor, u: Tensor) -> SubspaceRotated:
    """Return ``W H_1 ... H_r - W`` of the rows of ``u`` (r, n), by an orthonormal basis ``V`` of their span.

    ``H_1 ... H_r = I - U^T M`` acts in the span alone: there it is ``C = I - (V U^T)(M V^T)``. In float64.
    """
    basis = torch.linalg.qr(u.double().mT).Q.mT  # (min(r, n), n)
    U, M = householder_factors(u.double())
    update = -(basis @ U.mT) @ (M @ basis.mT)
    return SubspaceRotated(weight, basis.to(weight.dtype), update.to(weight.dtype))


@reader(
    "ORTHOFT_HRA",
    prefix="orthoft_hra_",
    extent=_hra_extent,
    fields={"orthonormal": FLAG},
    names=_names("hra", "u", "u0"),
)
def hra(config: Config, module: str, tensors: Tensors, weight: Tensor) -> Delta:
    """``W' = W H_1 ... H_r = W - (W U^T) M``, reflections in compact WY form. arXiv 2405.17484."""
    u, u0 = tensors["orthoft_hra_adapter.u"], tensors.get("orthoft_hra_adapter.u0")
    if (u0 is not None) != bool(config.get("orthonormal")):
        raise ValueError(f"module {module!r}: 'orthonormal' in its configuration and 'u0' in its tensors disagree")
    return reflected(weight, reflection_rows(u, u0))


def _psoft_extent(config: Config, shapes: Shapes) -> Extent:
    basis = shapes.get("orthoft_psoft_adapter.basis")
    (entries,) = shapes["orthoft_psoft_adapter.skew"]
    rank = block_size(entries)
    expect_shape(shapes, "orthoft_psoft_adapter.basis", rank, None)
    for scales in ("alpha", "beta"):
        expect_shape(shapes, f"orthoft_psoft_adapter.{scales}", rank)
    return Extent(None, None if basis is None else basis[1], rank)


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


@reader(
    "ORTHOFT_PSOFT",
    prefix="orthoft_psoft_",
    extent=_psoft_extent,
    fields=MAP | SVD,
    names=_names("psoft", "skew", "alpha", "beta", "basis", "fingerprint"),
)
def psoft(config: Config, module: str, tensors: Tensors, weight: Tensor) -> Delta:
    """``W' = W (I + V (C - I) V^T)`` in the principal subspace, ``C = diag(beta) R diag(alpha)``. arXiv 2505.11235."""
    basis = psoft_basis(config, module, tensors, weight)
    update = psoft_update(config, tensors)
    if "orthoft_psoft_adapter.alpha" in tensors or "orthoft_psoft_adapter.beta" in tensors:
        return LowRank(weight @ basis.mT @ update, basis)
    return SubspaceRotated(weight, basis, update)


def _goft_extent(config: Config, shapes: Shapes) -> Extent:
    name = "angles" if config["mode"] == "strict" else "planes"
    count, *plane = shapes[f"orthoft_goft_adapter.{name}"]
    if plane != ([] if name == "angles" else [2, 2]):
        raise ValueError("a plane has an angle or a matrix")
    expect_shape(shapes, "orthoft_goft_adapter.scale", count + 1)
    return Extent(None, count + 1, None)


@reader(
    "ORTHOFT_GOFT",
    prefix="orthoft_goft_",
    extent=_goft_extent,
    fields=GOFT,
    names=_names("goft", "angles", "planes", "scale"),
)
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
    (count,) = shapes["orthoft_svft_adapter.values"]
    size = svft_size(config, count)
    expect_shape(shapes, "orthoft_svft_adapter.U", None, size)
    expect_shape(shapes, "orthoft_svft_adapter.V", size, None)
    rank = size if _svft_truncated(config) else None
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


@reader(
    "ORTHOFT_SVFT",
    prefix="orthoft_svft_",
    extent=_svft_extent,
    fields=SVFT,
    names=_names("svft", "values", "gate", "U", "V", "fingerprint"),
)
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
