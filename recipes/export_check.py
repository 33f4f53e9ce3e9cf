"""Whether an export holds what the merge reports: disk against delta."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from orthoft.merging.files.tensors import TensorFolder


def export_check(base: Path, merged: Path, norms: Mapping[str, float]) -> float:
    """Return the largest ``| ||W' - W|| - ||D|| | / ||W'||`` over the merged weights: disk against delta.

    Storing ``W' = W + D`` rounds it by at most half the machine epsilon of its dtype, so neither norm of the change
    may differ by more than that from the norm of ``D`` that the merge reports (and that one is good to float32).

    Raises:
        RuntimeError: a weight differs by more.
    """
    before, after = TensorFolder(base), TensorFolder(merged)
    worst = 0.0
    for name, norm in norms.items():
        stored = after[name]
        change = torch.linalg.vector_norm(stored.double() - before[name].double()).item()
        size = torch.linalg.vector_norm(stored.double()).item()
        difference = abs(change - norm)
        if difference > torch.finfo(stored.dtype).eps * size + 1e-4 * norm:
            raise RuntimeError(f"{name} in {merged} changed by {change:.6g}, the merged delta has norm {norm:.6g}")
        worst = max(worst, difference / size if size else 0.0)
    return worst
