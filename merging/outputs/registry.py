"""What an output is, and where outputs are found by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from orthoft.delta import Delta
from orthoft.errors import unknown
from orthoft.merging.files.writer import Shard
from orthoft.merging.plan import MergePlan
from orthoft.merging.reports.report import MergeReport, WeightReport

DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

DeltaOf = Callable[[str], Delta]
DeltaOn = Callable[[str, Tensor], Delta]  # of a weight's name, and the weight as a matrix, in its own dtype


@dataclass(frozen=True)
class Options:
    """What the user chose of an output."""

    base: str
    dtype: str | None = None
    rank: int | None = None
    max_shard_size: int | str = "5GB"

    def torch_dtype(self) -> torch.dtype | None:
        """Return the chosen dtype, or raise a ValueError for one that cannot be written."""
        if self.dtype is None:
            return None
        if self.dtype not in DTYPE_NAMES:
            raise unknown("dtype", self.dtype, DTYPE_NAMES)
        return DTYPE_NAMES[self.dtype]


class Output(ABC):
    """A format of the result. Made before the output folder is: what does not fit is refused then.

    ``names`` are the merged weights it asks for, in order. An output may consist of ``shards``: files that are written
    one by one, in several processes, and are not written again by a merge that goes on after it was killed. One without
    shards is written at once by `write`, from merged deltas that wait on disk, as `keep` makes them.
    """

    names: list[str]
    shards: Sequence[Shard] = ()

    def __init__(self, plan: MergePlan, options: Options) -> None:
        self.plan, self.options, self.dtype = plan, options, options.torch_dtype()

    def keep(self, delta: Delta, entry: WeightReport) -> Delta:
        """Return what the output holds of a merged delta, and say in its report what it leaves out."""
        return delta

    def write_shard(self, shard: Shard, file: Path, delta_on: DeltaOn) -> str:
        """Write one of the shards, asking once for the merged delta of each merged weight in it.

        Returns the `content_hash` of the file.
        """
        raise NotImplementedError

    @abstractmethod
    def write(self, folder: Path, delta_of: DeltaOf, report: MergeReport) -> None:
        """Write all files but the shards, asking once for the merged delta of each of the ``names`` if there are none.

        ``report`` lists what was merged, and the output adds what it does not carry.
        """

    def rounded_to(self, name: str) -> torch.dtype | None:
        """Return the dtype in which it stores base + delta of a merged weight, None if it holds no such sum."""
        return None

    @property
    def waiting(self) -> list[str]:
        """The weights whose deltas wait on disk, for the scale of the whole model or to be written at once."""
        if self.plan.finish is not None:
            return list(self.plan.merged)
        return [] if self.shards else self.names

    def nbytes(self) -> int:
        """Return about how many bytes the output takes."""
        return sum(shard.nbytes for shard in self.shards) or sum(map(self.weight_bytes, self.names))

    def disk_bytes(self) -> int:
        """Return about how many bytes the merge takes on the disk in all: deltas wait there in float32."""
        return self.nbytes() + torch.float32.itemsize * sum(map(self.entries, self.waiting))

    def weight_bytes(self, name: str) -> int:
        """Return about how many bytes the output takes for a merged weight; none for one that it leaves out."""
        return (self.dtype or torch.float32).itemsize * self.entries(name) if name in self.names else 0

    def entries(self, name: str) -> int:
        """Return about how many numbers `keep` leaves of a merged delta."""
        (m, n), rank = self.plan.merged[name].matrix, self.plan.merged[name].rank
        return m * n if rank is None else rank * (m + n)


OUTPUTS: dict[str, type[Output]] = {}


def output(name: str) -> Callable[[type[Output]], type[Output]]:
    """Register a class as the output of this name."""

    def register(kind: type[Output]) -> type[Output]:
        OUTPUTS[name] = kind
        return kind

    return register


def get_output(name: str) -> type[Output]:
    """Return an output by name, or raise a ValueError that lists them."""
    if name not in OUTPUTS:
        raise unknown("output", name, OUTPUTS)
    return OUTPUTS[name]


def rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a merged tensor in the dtype it is written in, or raise a ValueError if it holds NaN or Inf there."""
    result = tensor.to(dtype)
    if not torch.isfinite(result).all():
        raise ValueError(f"merged weight {name!r} contains NaN or Inf as {str(dtype).removeprefix('torch.')}")
    return result
