"""The merged model as the base is stored."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from torch import Tensor

from orthoft.delta import Delta
from orthoft.linalg import at_least_float32
from orthoft.merging.files.safetensors_file import SafetensorsFile
from orthoft.merging.files.streaming import IN_FLIGHT, Piece, pieces_of, stream
from orthoft.merging.files.tensors import as_matrix
from orthoft.merging.files.writer import Shard, carry_over, parse_size, sharded, write_index
from orthoft.merging.outputs.registry import DeltaOf, DeltaOn, Options, Output, output, rounded
from orthoft.merging.plan import MergePlan
from orthoft.merging.reports.report import MergeReport
from orthoft.merging.sources.adapter import MERGEABLE
from orthoft.merging.threads import torch_threads

SLICE = 1 << 19  # entries that are added and rounded at once: 2 MB in float32, which stays in the cache

FLOAT32 = 4  # bytes: two of the largest weight in half precision are in flight, one in single precision


@output("checkpoint")
class CheckpointOutput(Output):
    """The merged model as the base is stored: shards, index, config, tokenizer and the rest carried over."""

    def __init__(self, plan: MergePlan, options: Options) -> None:
        super().__init__(plan, options)
        if options.rank is not None:
            raise ValueError(f"rank is of output='lora', a checkpoint has none: got rank={options.rank}")
        self.names = list(plan.merged)
        stored = {name: (self._dtype(name), plan.base.shape(name)) for name in plan.base}
        self.shards = sharded(stored, parse_size(options.max_shard_size))

    def write(self, folder: Path, delta_of: DeltaOf, report: MergeReport) -> None:
        carry_over(self.plan.base.folder, folder, self.dtype)
        write_index(folder, self.shards)

    def write_shard(self, shard: Shard, file: Path, delta_on: DeltaOn) -> str:
        base, merged = self.plan.base, self.plan.merged
        stored = {name: (dtype, shape) for name, dtype, shape in shard.tensors}
        pieces = [piece for name in stored for piece in pieces_of(base, name, whole=name in merged)]

        def work(piece: Piece, buffer: Tensor) -> Tensor:
            dtype, name = base.dtype(piece.name), piece.name
            if name in merged:
                return self._merged(name, buffer.view(dtype).reshape(base.shape(name)), delta_on)
            return buffer if dtype == stored[name][0] else rounded(buffer.view(dtype), stored[name][0], name)

        with SafetensorsFile(file, stored) as out:

            def write(piece: Piece, result: Tensor) -> None:
                if piece.start == 0:
                    out.begin(piece.name, *stored[piece.name])
                out.append(result)

            with torch_threads(1):
                largest = max((prod(stored[piece.name][1]) for piece in pieces if piece.name in merged), default=0)
            stream(pieces, work, write, max(IN_FLIGHT, FLOAT32 * largest))
        return out.digest

    def rounded_to(self, name: str) -> torch.dtype:
        return self._dtype(name)

    def weight_bytes(self, name: str) -> int:
        return self._dtype(name).itemsize * prod(self.plan.base.shape(name))

    def _dtype(self, name: str) -> torch.dtype:
        stored = self.plan.base.dtype(name)
        return self.dtype if self.dtype is not None and stored in MERGEABLE else stored

    def _merged(self, name: str, tensor: Tensor, delta_on: DeltaOn) -> Tensor:
        """Return base + delta, in the base's own memory where the dtype stays."""
        dtype, stored = self._dtype(name), as_matrix(tensor)
        delta = delta_on(name, stored)
        out = stored if dtype == stored.dtype else torch.empty(stored.shape, dtype=dtype)
        return add_rounded(stored, delta, out, name)


def add_rounded(stored: Tensor, delta: Delta, out: Tensor, name: str) -> Tensor:
    """Put ``stored + delta`` (m, n), computed in float32 or more and rounded once, into ``out``, which is returned.

    ``out`` may be ``stored``. The float32 sum is itself rounded: where that makes it the exact middle of two numbers of
    half precision, 2^-17 of all entries on random weights, the farther of two equally good neighbours may be taken.

    Raises:
        ValueError: the result holds NaN or Inf.
    """
    factors, precise = delta.factors(), at_least_float32(stored[:0]).dtype
    parts = [delta.dense()] if factors is None else [factor.to(precise) for factor in factors]
    largest = torch.finfo(out.dtype).max
    step = max(1, SLICE // max(stored.shape[1], 1))
    for start in range(0, len(stored), step):
        rows = slice(start, start + step)
        total = at_least_float32(stored[rows])  # (rows, n)
        total = total + parts[0][rows] if factors is None else torch.addmm(total, parts[0][rows], parts[1])
        out[rows] = total
        if not all(abs(end) <= largest for end in map(float, total.aminmax())):  # one pass, where isfinite takes four
            rounded(out[rows], out.dtype, name)
    return out
