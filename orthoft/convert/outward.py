"""Our adapters as PEFT's own OFT, HRA and PSOFT."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthoft.convert.conversion import Conversion, LayerReport, Opened, converted, keys, relative
from orthoft.linalg import of_map, skew, within_radius
from orthoft.merging.formats.ours import block_size, psoft_basis, psoft_update
from orthoft.merging.formats.peft import psoft_svd
from orthoft.reflections import reflection_rows


def to_peft(
    adapter: str | Path,
    out: str | Path | None = None,
    *,
    base: str | Path | None = None,
    tolerance: float = 1e-6,
    overwrite: bool = False,
) -> Conversion:
    """Return an OFTv2, HRA or PSOFT adapter of ours as PEFT's own, and write it to the folder ``out``.

    The result loads without orthoft and computes the same. OFTv2 of any degree and HRA are exact. A PSOFT file of PEFT
    does not hold the singular vectors: it is right wherever PEFT finds them with the signs they have on this machine.

    Args:
        adapter: folder or place on the Hub of an adapter.
        out: folder to write, refused if it exists, without ``overwrite``; None to write nothing.
        base: folder or place on the Hub of the base model; the one the adapter's configuration names if None.
        tolerance: largest relative error per layer of what is not exact.

    Raises:
        FileNotFoundError, FileExistsError: the adapter or its base is missing, ``out`` exists.
        ValueError: PEFT's format cannot hold it, which the message says of a field; the adapter is not of this base; or
            ``out`` holds what is read, or is a part of it.
    """
    return converted(WRITERS, "adapter for PEFT's own formats", adapter, out, base, tolerance, overwrite)


def oft(opened: Opened, tolerance: float) -> Conversion:
    """OFTv2 as OFT: the exact map of the negated entries, or the series by its number of terms.

    PEFT has one block size: blocks of several sizes are put together to blocks of their common multiple.
    """
    config, source = opened.source.config, opened.source
    skews = {name: source.tensors(name)["orthoft_oftv2_adapter.skew"] for name in source.inputs_first}
    common = math.lcm(*(block_size(entries.shape[1]) for entries in skews.values()))
    exact = config["map"] == "cayley"
    sign = -1.0 if exact else _halved(config)
    tensors: dict[str, Tensor] = {}
    for name, entries in skews.items():
        kind, inputs = oft_kind(opened, name), opened.inputs(name)
        if inputs % common:
            raise ValueError(
                f"block_size_pattern: PEFT's OFT has one block size, and the common multiple {common} of these does "
                f"not divide the {inputs} inputs of {name!r}: convert to a LoRA"
            )
        free = within_radius(entries, config.get("radius"), inputs // block_size(entries.shape[1]))
        moved = sign * _in_larger_blocks(
            of_map(free, config["map"], config["degree"]), common, bool(config.get("block_share"))
        )
        suffix, moved = ("oft_embedding_R", -moved) if kind == "embedding" else ("oft_R", moved)
        tensors |= keys(source.module(name), {f"{suffix}.weight": moved})
    fields: dict[str, Any] = {
        "peft_type": "OFT",
        "r": 0,
        "oft_block_size": common,
        "use_cayley_neumann": not exact,
        "num_cayley_neumann_terms": neumann_terms(config["degree"]),
        "block_share": bool(config.get("block_share")),
        "module_dropout": config.get("dropout", 0.0),
        "coft": False,
    }
    notes = ["radius: the entries lie within it, further training in PEFT is free"] if config.get("radius") else []
    return Conversion(fields | opened.shared_config("oft_only"), tensors, _exact(opened), notes)


def hra(opened: Opened, tolerance: float) -> Conversion:
    """HRA as HRA: the same vectors as columns; orthonormal ones with their frozen copies in front.

    PEFT has one number of reflections: fewer are filled up with pairs of equal ones, which cancel.
    """
    config, source = opened.source.config, opened.source
    rows: dict[str, Tensor] = {}
    for name in source.inputs_first:
        _hra_kind(opened, name)
        found = source.tensors(name)
        rows[name] = reflection_rows(found["orthoft_hra_adapter.u"], found.get("orthoft_hra_adapter.u0"))
    count = max(len(u) for u in rows.values())
    tensors: dict[str, Tensor] = {}
    for name, u in rows.items():
        if (count - len(u)) % 2:
            raise ValueError(
                f"rank_pattern: PEFT's HRA has one number of reflections, and {len(u)} of {name!r} cannot stand for "
                f"{count}, of the other parity: convert to a LoRA"
            )
        filled = torch.cat([u, u[:1].expand(count - len(u), -1)])
        tensors |= keys(source.module(name), {"hra_u": filled.mT.float()})
    fields = {"peft_type": "HRA", "r": count, "apply_GS": False}
    notes = ["orthonormal: further training in PEFT does not keep it"] if config.get("orthonormal") else []
    return Conversion(fields | opened.shared_config("hra_only"), tensors, _exact(opened), notes)


def psoft(opened: Opened, tolerance: float) -> Conversion:
    """PSOFT as PSOFT: ``D S D`` for ``S``, where ``D`` turns our singular vectors into those that PEFT finds here.

    PEFT has one r: a smaller subspace is filled up with dimensions that do not turn.
    """
    config, source = opened.source.config, opened.source
    bases = {
        name: psoft_basis(config, source.module(name), source.tensors(name), opened.weight(name))
        for name in source.inputs_first
    }
    r = max(len(basis) for basis in bases.values())
    tensors: dict[str, Tensor] = {}
    layers = []
    for name, basis in bases.items():
        if opened.kind(name) != "linear":
            raise ValueError(f"{name!r} ({opened.kind(name)}) is no linear layer, as PEFT's PSOFT needs: use a LoRA")
        weight, found = opened.weight(name), source.tensors(name)
        if r > min(weight.shape):
            raise ValueError(f"rank_pattern: PEFT's PSOFT has one r, and {r} does not fit {name!r}: convert to a LoRA")
        U, s, Vh = (part.double() for part in psoft_svd({"r": len(basis)}, weight))
        signs = torch.sign((Vh * basis).sum(dim=1))
        update, weight, basis = psoft_update(config, found).double(), weight.double(), basis.double()
        ours = weight @ basis.mT @ update @ basis
        theirs = (U * s) @ (signs[:, None] * update * signs) @ Vh
        layers.append(LayerReport(source.module(name), *relative(theirs - ours, weight + ours)))
        tensors |= keys(source.module(name), _filled_up(found, signs.float(), r, config))
    notes = ["PEFT finds the singular vectors again when it loads: their signs may differ on another machine"]
    conversion = Conversion(
        {
            "peft_type": "PSOFT",
            "r": r,
            "psoft_alpha": r,
            "psoft_mag_a": bool(config["relax"]),
            "psoft_mag_b": bool(config["relax"]),
            "use_cayley_neumann": config["map"] == "series",
            "num_cayley_neumann_terms": neumann_terms(config["degree"]),
            **opened.shared_config("PSOFT", bias=False),
        },
        tensors,
        layers,
        notes,
    )
    conversion.require(tolerance, "PEFT finds other singular vectors than the basis that this adapter was trained in")
    return conversion


WRITERS: dict[str, Callable[[Opened, float], Conversion]] = {
    "ORTHOFT_OFTV2": oft,
    "ORTHOFT_HRA": hra,
    "ORTHOFT_PSOFT": psoft,
}


def oft_kind(opened: Opened, name: str) -> str:
    """Return the kind of a layer of PEFT's OFT.

    Raises:
        ValueError: PEFT's OFT has no such layer, or computes it otherwise in its forward pass than when it merges.
    """
    kind, shape = opened.kind(name), opened.base.shape(name)
    if kind == "conv1d":
        raise ValueError(f"{name!r} is a Conv1D, which PEFT's OFT does not take: convert to a LoRA")
    if kind == "convolution" and (len(shape) != 4 or shape[2:] != (1, 1)):
        raise ValueError(
            f"{name!r} is a convolution of kernel {'x'.join(map(str, shape[2:]))}, whose forward pass in PEFT's OFT is "
            "not that of the weight it merges: only 1x1 is converted, use a LoRA"
        )
    return kind


def _hra_kind(opened: Opened, name: str) -> None:
    kind, shape = opened.kind(name), opened.base.shape(name)
    square = len(shape) == 4 and shape[2] == shape[3]
    if kind in ("conv1d", "embedding") or (kind == "convolution" and not square):
        raise ValueError(
            f"{name!r} ({kind}) is no linear layer and no square convolution, as PEFT's HRA needs: use a LoRA"
        )


def _exact(opened: Opened) -> list[LayerReport]:
    return [LayerReport(opened.source.module(name), 1.0, 0.0) for name in opened.source.inputs_first]


def _in_larger_blocks(entries: Tensor, size: int, share: bool) -> Tensor:
    """Return skew entries (g, ...) of blocks of ``size``, each of them holding several of the old blocks."""
    old = block_size(entries.shape[1])
    if (factor := size // old) == 1:
        return entries
    S = skew(entries, old)
    S = (S.expand(factor, -1, -1) if share else S).reshape(-1, factor, old, old)
    larger = S.new_zeros(len(S), factor, old, factor, old)
    index = torch.arange(factor)
    larger[:, index, :, index, :] = S.transpose(0, 1)
    rows, cols = torch.triu_indices(size, size, 1)
    return larger.reshape(len(S), size, size)[:, rows, cols]


def _filled_up(found: Mapping[str, Tensor], signs: Tensor, r: int, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return PEFT's parameters of ``diag(beta) R diag(alpha)`` in r dimensions, with other signs of the old ones."""
    small = len(signs)
    S = found["orthoft_psoft_adapter.skew"].new_zeros(r, r)
    S[:small, :small] = (
        signs[:, None]
        * skew(of_map(found["orthoft_psoft_adapter.skew"], config["map"], config["degree"]), small)
        * signs
    )
    rows, cols = torch.triu_indices(r, r, 1)
    tensors = {"psoft_R.weight": (_halved(config) if config["map"] == "series" else 1.0) * S[rows, cols]}
    for theirs, ours in (("vector_a", "alpha"), ("vector_b", "beta")) if config["relax"] else ():
        scales = found[f"orthoft_psoft_adapter.{ours}"]
        tensors[f"psoft_R.{theirs}"] = torch.cat([scales, scales.new_ones(r - small)])
    return tensors


def neumann_terms(degree: int) -> int:
    """Return PEFT's number of terms whose polynomial has this odd degree (2 terms are ``I + 2S``, so halve ``S``)."""
    return degree + 1


def _halved(config: Mapping[str, Any]) -> float:
    return 0.5 if config["degree"] == 1 else 1.0
