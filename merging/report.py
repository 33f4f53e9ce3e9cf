"""What a merge did, in numbers."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class WeightReport:
    """One merged weight: where it was merged, and Frobenius norms of what came in and what went out."""

    name: str
    shape: tuple[int, ...]
    space: str
    rank: int | None  # of the merged factors, None if the merged delta is dense
    task_norms: dict[str, float]  # by source, only of those that change this weight, before their weights
    norm: float = 0.0
    truncation_error: float = 0.0  # norm of what a chosen rank left out, relative to `norm`


@dataclass
class MergeReport:
    """What a merge read, did and wrote.

    ``scale`` is the global factor of methods that have one. ``not_carried`` lists, by source, what the output does not
    hold; ``notes`` say what is worth knowing about this combination.
    """

    base: str
    sources: dict[str, str]  # name: kind
    output: str
    output_kind: str
    method: str
    params: dict[str, Any]
    weights: list[float]
    dtype: str | None
    seed: int
    scale: float = 1.0
    merged: list[WeightReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_carried: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def norm(self) -> float:
        """The Frobenius norm of the whole merged delta."""
        return math.hypot(*(weight.norm for weight in self.merged))

    @property
    def truncation_error(self) -> float:
        """The norm of all that a chosen rank left out, relative to `norm`."""
        lost = math.hypot(*(weight.truncation_error * weight.norm for weight in self.merged))
        return lost / self.norm if self.norm > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, the totals included."""
        return {**asdict(self), "norm": self.norm, "truncation_error": self.truncation_error}

    def save(self, file: str | Path) -> None:
        """Write the report as JSON."""
        Path(file).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
