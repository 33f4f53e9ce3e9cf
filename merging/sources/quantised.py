"""Quantised weights in a folder: codes of a few bits, and the scales that make numbers of them."""

from __future__ import annotations

import re

import torch

from orthoft.merging.files.tensors import TensorFolder, same_tensor
from orthoft.merging.sources.names import Naming

MERGEABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # not the codes of quantised weights
CODES = (torch.float8_e4m3fn, torch.float8_e5m2)  # codes by themselves, as integers are not: they count and index too
# What stands in the place of a weight or beside it: GPTQ and AWQ, bitsandbytes, compressed-tensors, fp8, mxfp4.
PARTS = re.compile(
    r"(?P<module>.+?)(\.weight)?[._](?:(?P<codes>qweight|packed|blocks)|qzeros|g_idx|SCB|weight_format|"
    r"(nested_)?(absmax|quant_map)|quant_state\..+|(input_|output_|global_)?scale|scales|scale_inv|scale_2|"
    r"zero_point|shape)"
)


def quantised(folder: TensorFolder) -> dict[str, str]:
    """Return {tensor: module} of the codes of quantised weights, and of the scales and tables that belong to them.

    Scales alone say nothing, as other tensors have such names: it is their codes that tell.
    """
    found = {name: match for name in folder if (match := PARTS.fullmatch(name))}
    parts = {name: match["module"] for name, match in found.items()}
    modules, coded = set(parts.values()), set()
    for name in [name for name in folder if folder.dtype(name) not in MERGEABLE]:
        module = parts.get(name, name.removesuffix(".weight"))
        told = found[name]["codes"] if name in found else name.endswith(".weight") or module in modules
        if told or folder.dtype(name) in CODES:
            parts[name] = module
            coded.add(module)
    return {name: module for name, module in parts.items() if module in coded}


def check_quantised(tensors: TensorFolder, base: TensorFolder, naming: Naming) -> None:
    """Raise a ValueError where a source and its base do not hold the same codes of a quantised weight, if any."""
    mine, theirs = quantised(tensors), quantised(base)
    for own, module in mine.items():
        names = [naming.to_base(name) for name in (own, f"{module}.weight", module)]
        known = next((name for name in names if name is not None and name in base), None)
        if known is not None and known not in theirs:
            raise ValueError(f"{_stored(tensors, own)}, which the base has not: dequantise the source first")
        if known is not None and not same_tensor(tensors, own, base, known):
            raise ValueError(f"{_stored(tensors, own)} and differs from the base's: dequantise both first")
    for known, module in theirs.items():
        names = [naming.to_source(name) for name in (known, f"{module}.weight", module)]
        if names[0] not in mine and any(name in tensors for name in names):
            raise ValueError(f"the base's {_stored(base, known)}, which the source has not: dequantise the base first")


def check_unquantised(name: str, base: TensorFolder) -> None:
    """Raise a ValueError if the base holds codes instead of a weight of this name, to which nothing can be added."""
    if name in base:
        codes = [name] if base.dtype(name) not in MERGEABLE else []
    else:
        named = (f"{name.removesuffix('weight')}qweight", f"{name}_packed", f"{name}_blocks")
        codes = [part for part in named if part in base]
    if codes:
        raise ValueError(f"the base's {codes[0]!r} is stored as {base.dtype(codes[0])}: dequantise the base first")


def _stored(folder: TensorFolder, name: str) -> str:
    """Return what to say of a quantised tensor."""
    return f"{name!r} ({folder.dtype(name)}) belongs to a quantised weight"
