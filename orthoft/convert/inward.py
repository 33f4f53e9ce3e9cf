"""PEFT's own OFT, HRA and PSOFT as adapters of ours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthoft.bases import subspace_update
from orthoft.convert.conversion import Conversion, LayerReport, Opened, converted, keys, relative
from orthoft.convert.outward import oft_kind
from orthoft.delta import LowRank
from orthoft.linalg import RotationMap, of_map, orthonormal_rows, rotation_update, skew, within_radius
from orthoft.merging.formats.ours import block_size
from orthoft.merging.formats.peft import neumann_degree, neumann_update, psoft_generator, psoft_svd


def from_peft(
    adapter: str | Path,
    out: str | Path | None = None,
    *,
    base: str | Path | None = None,
    tolerance: float = 1e-6,
    overwrite: bool = False,
) -> Conversion:
    """Return PEFT's own OFT, HRA or PSOFT adapter as ours, and write it to the folder ``out``.

    Exact but for polynomials that are none of ours (OFT's default of 5 terms has degree 4): they become the exact
    Cayley map of the nearest rotation, if its relative error is within ``tolerance`` in every layer.

    Args:
        adapter: folder or place on the Hub of an adapter that PEFT 0.18 or newer wrote.
        out: folder to write, refused if it exists, without ``overwrite``; None to write nothing.
        base: folder or place on the Hub of the base model; the one the adapter's configuration names if None.
        tolerance: largest relative error per layer of what is not exact.

    Raises:
        FileNotFoundError, FileExistsError: the adapter or its base is missing, ``out`` exists.
        ValueError: ours cannot hold it, which the message says of a field; the adapter is not of this base; or ``out``
            holds what is read, or is a part of it.
    """
    return converted(READERS, "adapter of PEFT", adapter, out, base, tolerance, overwrite)


def oft(opened: Opened, tolerance: float) -> Conversion:
    """OFT as OFTv2: the exact map of the negated entries, the series of the same degree, or the nearest rotation."""
    config, source = opened.source.config, opened.source
    found = {name: next(iter(source.tensors(name).values())) for name in source.inputs_first}
    sizes = {source.module(name): block_size(entries.shape[1]) for name, entries in found.items()}
    blocks = {opened.inputs(name) // sizes[source.module(name)] for name in found}
    how = our_map(config, max(sizes.values()))
    tensors: dict[str, Tensor] = {}
    layers = []
    for name, entries in found.items():
        module, embedding = source.module(name), oft_kind(opened, name) == "embedding"
        free = within_radius(entries, config.get("eps") if config.get("coft") else None, len(entries))
        exact = not config.get("use_cayley_neumann", False)
        moved, norm, error = how.entries(-free if exact else free, sizes[module])
        layers.append(LayerReport(module, norm, error))
        tensors |= keys(module, {"orthoft_oftv2_adapter.skew": -moved if embedding else moved})
    size = Counter(sizes.values()).most_common(1)[0][0]
    radius, notes = _radius(config, blocks, how)
    fields: dict[str, Any] = {
        "peft_type": "ORTHOFT_OFTV2",
        "block_size": size,
        "block_size_pattern": {re.escape(module): own for module, own in sizes.items() if own != size},
        "block_share": bool(config.get("block_share")),
        "map": how.map,
        "degree": how.degree,
        "radius": radius,
        "dropout": config.get("module_dropout", 0.0),
    }
    conversion = Conversion(fields | opened.shared_config("ortho_only"), tensors, layers, notes)
    conversion.require(tolerance, how.reason)
    return conversion


def hra(opened: Opened, tolerance: float) -> Conversion:
    """HRA as HRA: the same vectors as rows; with Gram-Schmidt the orthonormal ones, whose reflections commute."""
    config, source = opened.source.config, opened.source
    tensors: dict[str, Tensor] = {}
    layers = []
    for name in source.inputs_first:
        rows, error = source.tensors(name)["hra_u"].mT.float(), 0.0
        if config.get("apply_GS"):
            rows, error = _gram_schmidt(rows)
        tensors |= keys(source.module(name), {"orthoft_hra_adapter.u": rows})
        layers.append(LayerReport(source.module(name), rows.shape[1] ** 0.5, error))
    fields = {"peft_type": "ORTHOFT_HRA", "r": config["r"], "orthonormal": False, "init_weights": config["r"] % 2 == 0}
    notes = ["apply_GS: written as plain reflections, further training does not keep them orthonormal"]
    shared = opened.shared_config("ortho_only")
    conversion = Conversion(fields | shared, tensors, layers, notes if config.get("apply_GS") else [])
    conversion.require(tolerance, "apply_GS: of nearly dependent vectors, Gram-Schmidt in PEFT makes rounding noise")
    return conversion


def psoft(opened: Opened, tolerance: float) -> Conversion:
    """PSOFT as PSOFT, with the basis that PEFT finds on this machine; ``sqrt(S)`` on either side go into the scales."""
    config, source = opened.source.config, opened.source
    if not config.get("psoft_orth", True):
        raise ValueError("psoft_orth=False: a free matrix in the subspace is no rotation: convert to a LoRA")
    r, symmetric = config["r"], config.get("ab_svd_init") == "pissa_init"
    how = our_map(config, r)
    relax = bool(config.get("psoft_mag_a", True) or config.get("psoft_mag_b", True) or symmetric)
    tensors: dict[str, Tensor] = {}
    layers = []
    for name in source.inputs_first:
        found, weight = source.tensors(name), opened.weight(name)
        _, s, Vh = psoft_svd(config, weight)
        rows, cols = torch.triu_indices(r, r, 1)
        [moved], _, _ = how.entries(psoft_generator(config, found["psoft_R.weight"])[rows, cols][None], r)
        alpha, beta = (found.get(f"psoft_R.vector_{side}", torch.ones(r)) for side in "ab")
        alpha, beta = (alpha * s**0.5, beta / s**0.5) if symmetric else (alpha, beta)
        own = {"skew": moved, "basis": Vh} | ({"alpha": alpha, "beta": beta} if relax else {})
        tensors |= keys(source.module(name), {f"orthoft_psoft_adapter.{part}": own[part] for part in own})
        layers.append(_psoft_report(opened, name, weight, how, own))
    fields: dict[str, Any] = {
        "peft_type": "ORTHOFT_PSOFT",
        "r": r,
        "relax": relax,
        "map": how.map,
        "degree": how.degree,
        "svd": config.get("psoft_svd", "full"),
        "seed": config.get("random_seed", 0),
        "save_basis": True,
    }
    notes = ["PEFT's file lacks the singular vectors: those that it finds on this machine are taken"]
    conversion = Conversion(fields | opened.shared_config("ortho_only"), tensors, layers, notes)
    conversion.require(tolerance, how.reason)
    return conversion


def _psoft_report(opened: Opened, name: str, weight: Tensor, how: OurMap, own: Mapping[str, Tensor]) -> LayerReport:
    update = subspace_update(own["skew"], len(own["basis"]), how.map, how.degree, own.get("alpha"), own.get("beta"))
    ours = weight.double() @ own["basis"].double().mT @ update.double() @ own["basis"].double()
    theirs = opened.source.adapted(name, weight).dense().double()
    return LayerReport(opened.source.module(name), *relative(ours - theirs, weight + theirs))


def _gram_schmidt(rows: Tensor) -> tuple[Tensor, float]:
    """Return orthonormal rows (r, n), and how far ``I - 2 U^T U`` is from what PEFT's own float32 loop makes."""
    step: list[Tensor] = []
    for row in rows:
        for done in step:
            row = row - (done @ row) * done
        step.append(row / row.norm())
    theirs, ours = torch.stack(step).double(), orthonormal_rows(rows.double())
    difference = LowRank(torch.cat([ours, -theirs]).mT, torch.cat([ours, theirs])).norm()
    return ours.float(), 2 * float(difference) / rows.shape[1] ** 0.5


READERS: dict[str, Callable[[Opened, float], Conversion]] = {"OFT": oft, "HRA": hra, "PSOFT": psoft}


@dataclass(frozen=True)
class OurMap:
    """How a rotation of PEFT becomes one of ours: our map of the scaled entries, or of the nearest rotation's."""

    map: RotationMap
    degree: int
    terms: int | None  # of PEFT's polynomial, None for its exact map
    nearest: bool

    @property
    def reason(self) -> str:
        if self.terms is None:
            return "the singular vectors of this weight are not those of PEFT"
        degree = neumann_degree(self.terms)
        return f"num_cayley_neumann_terms={self.terms} is a polynomial of degree {degree}, which is none of ours here"

    def entries(self, entries: Tensor, size: int) -> tuple[Tensor, float, float]:
        """Return our skew entries (g, ...) for PEFT's, the norm of the rotation, and the relative error."""
        if self.terms is None:
            return entries, 1.0, 0.0
        same = (2.0 if self.degree == 1 else 1.0) * entries
        if not self.nearest and torch.equal(of_map(same, self.map, self.degree), same):
            return same, 1.0, 0.0
        wanted = torch.eye(size, dtype=torch.float64) + neumann_update(skew(entries.double(), size), self.terms)
        rows, cols = torch.triu_indices(size, size, 1)
        found = _generator_of_nearest(wanted)[:, rows, cols].to(entries.dtype) if self.nearest else same
        got = torch.eye(size, dtype=torch.float64) + rotation_update(found.double(), size, self.map, self.degree)
        return found, *relative(got - wanted, wanted)


def our_map(config: Mapping[str, Any], largest: int) -> OurMap:
    """Return how the rotations of a PEFT adapter, with blocks up to ``largest``, become ours.

    Odd degrees keep their polynomial, but in large blocks, where ours always take the exact map.
    """
    from orthoft.adapters.oftv2 import LARGE_BLOCK

    if not config.get("use_cayley_neumann", False):
        return OurMap("cayley", 5, None, nearest=False)
    terms = config.get("num_cayley_neumann_terms", 5)
    degree = neumann_degree(terms)
    if degree % 2 and largest < LARGE_BLOCK:
        return OurMap("series", degree, terms, nearest=False)
    return OurMap("cayley", 5, terms, nearest=True)


def _generator_of_nearest(matrix: Tensor) -> Tensor:
    """Return the skew S (..., b, b) whose Cayley map is the rotation nearest to a matrix, by its polar factor."""
    U, _, Vh = torch.linalg.svd(matrix)
    rotation = U @ Vh
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    S: Tensor = torch.linalg.solve(rotation + eye, rotation - eye)
    return (S - S.mT) / 2


def _radius(config: Mapping[str, Any], blocks: set[int], how: OurMap) -> tuple[float | None, list[str]]:
    """Return our radius for COFT's eps, which bounds one shared block as it bounds many, or None and a note."""
    if not config.get("coft"):
        return None, []
    if how.nearest or (config.get("block_share") and len(blocks) > 1):
        return None, ["coft: the entries lie within eps, further training is free"]
    radius = config.get("eps", 6e-5) * (max(blocks) ** 0.5 if config.get("block_share") else 1.0)
    return radius * (2.0 if how.degree == 1 else 1.0), []
