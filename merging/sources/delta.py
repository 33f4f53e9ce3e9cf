"""A merged delta on disk: one more task of any merge, or the state from which OPCM goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from orthoft.delta import Delta, Dense, LowRank
from orthoft.merging.files.header import shortened
from orthoft.merging.files.tensors import TensorFolder, matrix_shape, read_json
from orthoft.merging.sources.checkpoint import Source
from orthoft.merging.sources.quantised import check_unquantised
from orthoft.merging.sources.rows import finite

CONFIG = "delta_config.json"
VERSION = 1


@dataclass(frozen=True)
class State:
    """How a delta came to be: it is ``scale * S`` with the stored sum ``S``, of tasks with these norms."""

    method: str
    params: Mapping[str, Any]
    scale: float
    task_norms: tuple[float, ...]


class DeltaSource(Source):
    """A folder of ``output="delta"``: ``delta.safetensors``, factors or dense matrices, and ``delta_config.json``."""

    kind = "delta"

    def __init__(self, name: str, folder: Path, base: TensorFolder) -> None:
        super().__init__(name, folder)
        self.config = read_json(folder / CONFIG)
        self.state = _state(self.config, folder / CONFIG)
        self._scale = self.state.scale
        self._tensors = TensorFolder(folder, "delta")
        names = dict.fromkeys(key.rpartition(".")[0] for key in self._tensors)
        self.ranks = {name: self._rank(name, base) for name in names}
        self.not_carried = []

    def needs_weight(self, name: str) -> bool:
        return False

    def delta(self, name: str, weight: Tensor) -> Delta:
        if self.ranks[name] is None:
            return Dense(self._scale * self._read(f"{name}.dense"))
        return LowRank(self._scale * self._read(f"{name}.B"), self._read(f"{name}.A"))

    def as_sum(self) -> DeltaSource:
        """Let the deltas be the stored sums ``S``, without their scale, from now on."""
        self._scale = 1.0
        return self

    def _read(self, key: str) -> Tensor:
        return finite(self._tensors[key], f"source {self.name!r}: tensor {key!r}")

    def _rank(self, name: str, base: TensorFolder) -> int | None:
        """Return the rank of the factors, or None of a dense matrix, after comparing shapes with the base's."""
        check_unquantised(name, base)
        dense, factors = f"{name}.dense" in self._tensors, [f"{name}.{factor}" for factor in "BA"]
        if name not in base or not (dense or all(key in self._tensors for key in factors)):
            raise ValueError(f"the delta of another base: {self._tensors.folder} has {name!r}, {base.folder} has not")
        parts = [self._tensors.shape(key) for key in ([f"{name}.dense"] if dense else factors)]
        m, n = matrix_shape(base.shape(name))
        rank = parts[0][-1] if parts[0] else 0
        if parts != ([(m, n)] if dense else [(m, rank), (rank, n)]):
            raise ValueError(
                f"the delta of another base: {name!r} has parts of shapes {', '.join(map(str, parts))}, "
                f"the base's has shape {base.shape(name)}"
            )
        return None if dense else rank


def continued(
    method: str, params: Mapping[str, Any], weights: Tensor, sources: Sequence[Source]
) -> tuple[tuple[float, ...], list[str]]:
    """Let OPCM go on from a first source that is the result of OPCM; return its tasks' norms, and notes.

    Then ``x_1 = S_T``, the unscaled sum, and the mean of the norms runs over the tasks in it and those that are added:
    one more task costs the same however many there were before. Without such a source there are no norms.

    Raises:
        ValueError: such a source is not the first, or has a weight.
    """
    states = [s for s in sources if isinstance(s, DeltaSource) and s.state.method == method == "opcm"]
    if not states:
        return (), []
    first = states[0]
    if first is not sources[0] or len(states) > 1:
        raise ValueError(
            f"source {states[-1].name!r} is the result of an OPCM merge, which can only be gone on from as the first "
            "source: put it first, or write it as a checkpoint to add it as one task"
        )
    if weights[0] != 1:
        raise ValueError(
            f"source {first.name!r} is the result of an OPCM merge and goes on with weight 1, got {float(weights[0])}"
        )
    notes = [f"goes on from {len(first.state.task_norms)} tasks in {first.name}"]
    if dict(params) != dict(first.state.params):
        notes.append(f"{first.name} was merged with {dict(first.state.params)}, and goes on with {dict(params)}")
    first.as_sum()
    return first.state.task_norms, notes


def _state(config: Mapping[str, Any], file: Path) -> State:
    if config.get("version") != VERSION:
        raise ValueError(f"{file} has version {config.get('version')!r}, this orthoft reads version {VERSION}")
    scale, norms, params = config.get("scale"), config.get("task_norms"), config.get("params") or {}
    if not _is_number(scale) or not scale or not isinstance(norms, list) or not all(map(_is_number, norms)):
        raise ValueError(
            f"{file} lacks 'scale' (a number, not 0) or 'task_norms' (a list of numbers): save the delta again"
        )
    if not isinstance(params, Mapping):
        raise ValueError(f"{file} has the 'params' {shortened(params)}, which are no object: save the delta again")
    return State(str(config.get("method")), params, float(scale), tuple(map(float, norms)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
