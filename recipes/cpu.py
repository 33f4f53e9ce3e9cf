"""Which 16-bit types this machine's CPU computes in by itself; the others it imitates, many times slower."""

from __future__ import annotations

import torch

HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def computes_in(dtype: torch.dtype) -> bool:
    """Say whether the CPU has instructions for a type; so it is believed where torch cannot tell."""
    if dtype not in HALVES:
        return True
    told: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    words = [there for name, there in told.items() if HALVES[dtype] in name]
    return any(words) or not words
