"""PEFT's own OFT, HRA and PSOFT on disk, with the signs and polynomials of its layers (PEFT 0.18 to 0.21)."""

from __future__ import annotations

import torch
from torch import Tensor

from orthoft.delta import Delta, LowRank, Rotated, SubspaceRotated
from orthoft.linalg import cayley_update, orthonormal_rows, skew, within_radius
from orthoft.merging.formats.fields import COUNT, FLAG, NUMBER, SEED, TERMS, choice, count, needed
from orthoft.merging.formats.ours import reflected
from orthoft.merging.formats.registry import Config, Extent, Shapes, Tensors, block_size, expect_shape, reader


def neumann_degree(terms: int) -> int:
    """Return the degree of PEFT's Cayley-Neumann polynomial: 0 and 1 for t = 1 and 2 terms, 3 for 3, else t - 1."""
    return 3 if terms == 3 else max(terms - 1, 0)


def neumann_update(S: Tensor, terms: int) -> Tensor:
    """Return ``R - I`` of PEFT's Cayley-Neumann polynomial ``R = I + 2S + ... + 2S^(D-1) + S^D``, batched.

    With 2 terms it is ``I + 2S``, with fewer ``I``. Even degrees D, such as the 4 of the default of 5 terms, are
    orthogonal only to ``2 ||S||^D``.
    """
    degree = neumann_degree(terms)
    if degree < 2:
        return 2 * degree * S
    power, total = S, 2 * S
    for _ in range(degree - 2):
        power = power @ S
        total = total + 2 * power
    return total + power @ S


def oft_update(config: Config, entries: Tensor) -> Tensor:
    """Return the blocks of ``R - I`` (g, b, b) that PEFT's OFT applies as ``x' = x R``; COFT's projection included.

    The exact branch is ``(I - S)(I + S)^-1``, the inverse of what the series approximates.
    """
    entries = within_radius(entries, config.get("eps") if config.get("coft") else None, len(entries))
    S = skew(entries, block_size(entries.shape[1]))
    if config.get("use_cayley_neumann", False):
        return neumann_update(S, config.get("num_cayley_neumann_terms", 5))
    return cayley_update(-S)


def psoft_update(config: Config, tensors: Tensors) -> Tensor:
    """Return ``diag(b) R diag(a) - I`` (r, r) of PEFT's PSOFT. Series and exact map have one sign here."""
    matrix: Tensor = tensors["psoft_R.weight"]
    r = config["r"]
    if config.get("psoft_orth", True):
        S = psoft_generator(config, matrix)
        neumann = config.get("use_cayley_neumann", False)
        update = neumann_update(S, config.get("num_cayley_neumann_terms", 5)) if neumann else cayley_update(S)
        matrix = update + torch.eye(r, dtype=update.dtype)
    if "psoft_R.vector_b" in tensors:
        matrix = tensors["psoft_R.vector_b"][:, None] * matrix
    if "psoft_R.vector_a" in tensors:
        matrix = matrix * tensors["psoft_R.vector_a"]
    return matrix - torch.eye(r, dtype=matrix.dtype)


def psoft_generator(config: Config, entries: Tensor) -> Tensor:
    """Return the skew matrix (r, r) of PEFT's PSOFT, shrunk to ``cayley_neumann_eps`` where that is in use."""
    S = skew(entries, config["r"])
    eps = config.get("cayley_neumann_eps") if config.get("use_cayley_neumann", False) else None
    norm = torch.linalg.matrix_norm(S)
    return S * (eps / norm) if eps is not None and norm > eps else S


def psoft_svd(config: Config, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U`` (m, r), ``s`` (r,), ``Vh`` (r, n) of a weight as PEFT's PSOFT finds them when it loads.

    They are not in its file, and their signs are those that the linear algebra of this machine happens to give.
    """
    weight, r = weight.float(), config["r"]
    if config.get("psoft_svd", "full") == "full":
        U, s, Vh = torch.linalg.svd(weight, full_matrices=False)
        return U[:, :r], s[:r], Vh[:r]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.get("random_seed", 0))
        U, s, V = torch.svd_lowrank(weight, q=r, niter=config.get("psoft_svd_lowrank_niter", 10))
    return U, s, V.mT


def _oft_refusals(config: Config) -> list[str]:
    return [] if "oft_block_size" in config else ["the OFT format of PEFT before 0.14 (no oft_block_size)"]


def _oft_extent(config: Config, shapes: Shapes) -> Extent:
    [(blocks, entries)] = shapes.values()
    return Extent(None, None if config.get("block_share") else blocks * block_size(entries), None)


OFT = {
    "coft": FLAG,
    "eps": NUMBER,
    "block_share": FLAG,
    "use_cayley_neumann": FLAG,
    "num_cayley_neumann_terms": count(1000, least=0),
    "fan_in_fan_out": FLAG,
}


@reader("OFT", prefix="oft_", extent=_oft_extent, refusals=_oft_refusals, fields=OFT)
def oft(config: Config, module: str, tensors: Tensors, weight: Tensor) -> Delta:
    """``W' = W R^T`` of a linear layer or a flattened convolution, ``W' = W R`` of an embedding. arXiv 2506.19847."""
    [(name, entries)] = tensors.items()
    update = oft_update(config, entries)
    return Rotated(weight, update if name.startswith("oft_embedding_R") else update.mT)


def _hra_extent(config: Config, shapes: Shapes) -> Extent:
    inputs, rank = shapes["hra_u"]
    return Extent(None, inputs, min(inputs, rank))


@reader("HRA", prefix="hra_", extent=_hra_extent, fields={"apply_GS": FLAG}, names=frozenset(["hra_u"]))
def hra(config: Config, module: str, tensors: Tensors, weight: Tensor) -> Delta:
    """``W' = W H_1 ... H_r``, or ``W (I - 2 U U^T)`` with Gram-Schmidt, which is the same of orthonormal columns."""
    rows = tensors["hra_u"].mT
    return reflected(weight, orthonormal_rows(rows) if config.get("apply_GS") else rows)


def _psoft_extent(config: Config, shapes: Shapes) -> Extent:
    for scales in ("vector_a", "vector_b"):
        expect_shape(shapes, f"psoft_R.{scales}", config["r"])
    return Extent(None, None, config["r"])


PSOFT = {
    "r": needed(COUNT),
    "psoft_orth": FLAG,
    "use_cayley_neumann": FLAG,
    "num_cayley_neumann_terms": count(1000, least=0),
    "cayley_neumann_eps": NUMBER,
    "psoft_svd": choice("full", "lowrank"),
    "psoft_svd_lowrank_niter": TERMS,
    "random_seed": SEED,
    "ab_svd_init": choice("psoft_init", "pissa_init"),
}
PSOFT_NAMES = frozenset(["psoft_R.weight", "psoft_R.vector_a", "psoft_R.vector_b"])


@reader("PSOFT", prefix="psoft_", extent=_psoft_extent, fields=PSOFT, names=PSOFT_NAMES)
def psoft(config: Config, module: str, tensors: Tensors, weight: Tensor) -> Delta:
    """``W' = W + U S (C - I) V^T``, or with ``sqrt(S)`` on either side (pissa_init). arXiv 2505.11235."""
    r, entries = config["r"], tensors["psoft_R.weight"]
    expected = (r * (r - 1) // 2,) if config.get("psoft_orth", True) else (r, r)
    if tuple(entries.shape) != expected or r > min(weight.shape):
        raise ValueError(f"module {module!r} has rank {r} by its configuration, and entries {tuple(entries.shape)}")
    U, s, Vh = psoft_svd(config, weight)
    symmetric = config.get("ab_svd_init") == "pissa_init"
    if not symmetric and len(tensors) == 1 and config.get("psoft_orth", True) and config.get("psoft_svd") != "lowrank":
        return SubspaceRotated(weight, Vh, psoft_update(config, tensors))
    left, right = (s**0.5, s**0.5) if symmetric else (s, torch.ones_like(s))
    return LowRank(U * left @ psoft_update(config, tensors).to(s.dtype), right[:, None] * Vh)
