"""What a merge will cost, weight by weight, from shapes and a quick measurement of this machine: `--dry-run`."""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthoft.merging.files.streaming import IN_FLIGHT
from orthoft.merging.files.tensors import TensorFolder
from orthoft.merging.methods import Method
from orthoft.merging.outputs import Options, Output
from orthoft.merging.outputs.checkpoint import CheckpointOutput
from orthoft.merging.plan import MergePlan, WeightPlan
from orthoft.merging.sources.checkpoint import Source
from orthoft.merging.weightwise import SLICE

SPECTRAL, ENTRYWISE = (64, 160), (160, 512)  # sizes of the matrices on which a method is tried
SETTING_UP = 0.15  # seconds, to open the files, and to write and sync what is small
HEADERS = ("weight", "shape", "sources", "space", "rank", "reads", "writes", "GFLOP", "seconds", "memory")
STEMS = {"checkpoint": "model", "delta": "delta"}  # of the files of a source of this kind
WORDS = 4  # columns, from the left, that hold words


@dataclass(frozen=True)
class Job:
    """One weight to merge.

    Args:
        shape: (m, n).
        ranks: of the factors of each task that changes it, None without.
        tasks: of the whole merge: the others count as zeros.
        rank: of the result's factors, None if it will be dense.
        itemsize: bytes of an entry of the base, as stored.
        rowwise: the method goes through slices of rows in the full space.
        output: "checkpoint" adds to the weight, anything else keeps the factors.
        written: bytes that the output takes for it.
        itemsizes: bytes of an entry of each task that changes it, as stored.
        held: by the method, see `orthoft.merging.methods.Method`.
    """

    name: str
    shape: tuple[int, int]
    ranks: tuple[int | None, ...]
    tasks: int
    space: str
    rank: int | None
    itemsize: int
    rowwise: bool
    output: str
    written: int
    itemsizes: tuple[float, ...]
    held: tuple[int, int]


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second, and how long the method takes on small matrices (T, size, size)."""

    matmul: float  # float32 operations
    svd: float  # float64 operations of thin SVDs
    copy: float  # bytes
    method: Mapping[int, float]  # seconds by size, a smaller and a larger one

    def merge_seconds(self, p: int, q: int) -> float:
        """Return the time of the method on (T, p, q), which grows with p q, or with p q min(p, q) if it has SVDs."""
        (small, of_small), (large, of_large) = sorted(self.method.items())
        power = min(1.0, max(0.0, math.log(of_large / of_small) / math.log(large / small) - 2))
        return of_large * (p * q / large**2) * math.pow(min(p, q) / large, power)


@dataclass(frozen=True)
class Estimate:
    """The cost of one weight; ``memory`` is what is alive at the worst moment, beside what the process has anyway."""

    bytes_read: int
    bytes_written: int
    flops: float
    seconds: float
    memory: int


def calibrate(method: Method, params: Mapping[str, Any], weights: Tensor) -> Rates:
    """Measure this machine, and the method on small random matrices; about a fifth of a second."""
    random = torch.Generator().manual_seed(0)
    square, tall = torch.randn(512, 512, generator=random), torch.randn(1024, 64, generator=random).double()
    block = torch.zeros(1 << 23)  # too large for memory that the allocator keeps: new pages are part of the cost
    sizes = ENTRYWISE if method.rowwise else SPECTRAL
    return Rates(
        matmul=2 * 512**3 / _seconds(lambda: square @ square),
        svd=_svd_flops(1024, 64) / _seconds(lambda: torch.linalg.svd(tall, full_matrices=False)),
        copy=2 * block.nbytes / _seconds(lambda: block.clone()),
        method={size: _tried(method, params, weights, size, random) for size in sizes},
    )


def estimate(job: Job, rates: Rates) -> Estimate:
    """Return the cost of one weight."""
    (m, n), R = job.shape, sum(rank or 0 for rank in job.ranks)
    dense = sum(rank is None for rank in job.ranks)
    entries = m * n
    sizes = zip(job.itemsizes, job.ranks, strict=True)
    read = entries * job.itemsize + round(sum(s * (entries if r is None else r * (m + n)) for s, r in sizes))
    products, decompositions, p, q = _work(job, R)
    seconds = products / rates.matmul + decompositions / rates.svd + rates.merge_seconds(p, q)
    seconds += (6 * read + 8 * job.written + 4 * entries * (8 + 2 * dense)) / rates.copy
    return Estimate(read, job.written, products + decompositions, seconds, _memory(job, R, dense))


def estimates(plan: MergePlan, output: Output | None = None, rates: Rates | None = None) -> dict[str, Estimate]:
    """Return the cost of each weight of a plan, nothing for one that the output does not ask for.

    ``output`` is a checkpoint in the base's dtype unless given, here and in `total`.
    """
    params, _ = plan.wish.bound()
    measured, output = rates or calibrate(plan.wish.method, params, plan.wish.weights), output or _checkpoint(plan)
    asked = {*output.names, *output.waiting}
    itemsizes = {source.name: _itemsize(source) for source in plan.sources}
    return {
        name: estimate(_job(plan, item, output, itemsizes), measured) if name in asked else Estimate(0, 0, 0.0, 0.0, 0)
        for name, item in plan.merged.items()
    }


def plan_table(plan: MergePlan, costs: Mapping[str, Estimate], whole: Estimate) -> str:
    """Return what a merge would do as text: a line for each weight, the totals that `total` gives, and the notes."""
    lines = plan_rows(plan, costs, whole)
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADERS))]
    text = [
        "  ".join(
            cell.ljust(w) if i < WORDS else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([*(line.rstrip() for line in text), *(f"note: {note}" for note in plan.notes)])


def plan_rows(plan: MergePlan, costs: Mapping[str, Estimate], whole: Estimate) -> list[Sequence[str]]:
    """Return the cells of `plan_table`, the names of its columns first."""
    lines: list[Sequence[str]] = [HEADERS]
    for name, cost in costs.items():
        item = plan.merged[name]
        rank = "-" if item.rank is None else str(item.rank)
        shape = " x ".join(map(str, item.shape))
        lines.append((name, shape, ", ".join(item.sources), item.space.name, rank, *_cells(cost)))
    lines.append(("total", f"{len(costs)} weights", "", "", "", *_cells(whole)))
    return lines


def total(plan: MergePlan, costs: Mapping[str, Estimate], output: Output | None = None) -> Estimate:
    """Return the cost of the merge: sums, what is copied besides, and the peak of the whole process.

    The base of a checkpoint passes through in pieces, for anything else its merged weights alone are read; the files of
    the sources are mapped, and count until the system needs the space.
    """
    output = output or _checkpoint(plan)
    sizes = {name: math.prod(plan.base.shape(name)) * plan.base.dtype(name).itemsize for name in plan.base}
    untouched = sum(size for name, size in sizes.items() if name not in costs) if output.shards else 0
    read = sum(cost.bytes_read for cost in costs.values()) + untouched
    of_base = untouched + sum(sizes[name] for name, cost in costs.items() if cost.bytes_read)
    passing = (min(of_base, IN_FLIGHT) if output.shards else 0) + read - of_base
    return Estimate(
        read,
        output.nbytes(),
        sum(cost.flops for cost in costs.values()),
        SETTING_UP + sum(cost.seconds for cost in costs.values()),
        resident_bytes() + passing + max((cost.memory for cost in costs.values()), default=0),
    )


def resident_bytes() -> int:
    """Return the memory that this process holds now, 0 where the system does not tell."""
    statistics = Path("/proc/self/statm")
    return int(statistics.read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE if statistics.is_file() else 0


def _work(job: Job, R: int) -> tuple[float, float, int, int]:
    """Return the operations of products and of decompositions, and the size of the coordinates."""
    m, n = job.shape
    whole = 2.0 * m * n * R if job.output == "checkpoint" else 0.0
    if job.space == "core":
        p, q = min(m, R), min(n, R)
        return whole + 4.0 * min(m, n) * R * R, _svd_flops(m, R) + _svd_flops(n, R), p, q
    if job.space == "knots":
        p = min(m, R)
        return whole + 2.0 * p * n * R, _svd_flops(m, R) + 9.0 * p**3, p, n
    if job.space == "rotation":
        return 6.0 * job.tasks * m * n * n, 26.0 * job.tasks * n**3, m, n
    return 2.0 * m * n * R, 0.0, m, n


def _memory(job: Job, R: int, dense: int) -> int:
    """Return the bytes alive at the worst moment: while the tasks merge, or while base and delta are added."""
    (m, n), T = job.shape, job.tasks
    entries, (each, besides) = m * n, job.held
    factors = 4 * R * (m + n)
    held = entries * (job.itemsize + 4)  # the weight as stored and in float32
    if job.space == "core":
        merging = factors + 8 * 3 * R * (m + n) + 8 * R * R * (2 * T + 4)
    elif job.space == "knots":
        merging = factors + 8 * 2 * R * m + 4 * 3 * T * min(m, R) * n
    elif job.space == "rotation":
        merging = factors + 8 * n * n * (T + 4) + 4 * entries * (2 * T + 2)
    elif job.rowwise:
        merging = factors + 4 * entries * (dense + 4) + 4 * 6 * T * min(entries, SLICE)
    else:
        merging = factors + 4 * entries * (each * T + besides)
    adding = entries * (2 * job.itemsize + 3 * 4 + 1) if job.output == "checkpoint" else 2 * factors
    return max(held + merging, factors + adding)


def _checkpoint(plan: MergePlan) -> Output:
    return CheckpointOutput(plan, Options(str(plan.base.folder)))


def _job(plan: MergePlan, item: WeightPlan, output: Output, itemsizes: Mapping[str, float]) -> Job:
    touching = [source for source in plan.sources if item.name in source.ranks]
    return Job(
        item.name,
        item.matrix,
        tuple(source.ranks[item.name] for source in touching),
        len(plan.sources),
        item.space.name,
        item.rank,
        plan.base.dtype(item.name).itemsize,
        item.choice.method.rowwise,
        "checkpoint" if output.shards else "factors",
        output.weight_bytes(item.name),
        tuple(itemsizes[source.name] for source in touching),
        item.choice.method.held,
    )


def _itemsize(source: Source) -> float:
    """Return how many bytes an entry of a source's tensors takes in its files, on average."""
    tensors = TensorFolder(source.folder, STEMS.get(source.kind, "adapter_model"))
    entries = sum(math.prod(tensors.shape(name)) for name in tensors)
    return sum(tensors.place(name)[2] for name in tensors) / max(entries, 1)


def _cells(cost: Estimate) -> tuple[str, ...]:
    return (
        _size(cost.bytes_read),
        _size(cost.bytes_written),
        f"{cost.flops / 1e9:.2f}",
        f"{cost.seconds:.3f}",
        _size(cost.memory),
    )


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def _svd_flops(m: int, n: int) -> float:
    tall, wide = max(m, n), min(m, n)
    return 6.0 * tall * wide**2 + 20.0 * wide**3


def _tried(method: Method, params: Mapping[str, Any], weights: Tensor, size: int, random: torch.Generator) -> float:
    x = torch.randn(len(weights), size, size, generator=random)
    extras: dict[str, Any] = {"generator": random, "base": torch.ones(size, size)}
    given = {name: extra for name, extra in extras.items() if method.needs(name)}
    return _seconds(lambda: method.merge(x, weights, **params, **given))


def _seconds(work: Callable[[], object]) -> float:
    """Return the best time of a few runs, of a single one if that is long: others may use the machine too."""
    best, begin, runs = math.inf, time.perf_counter(), 0
    while runs < 1 or (runs < 3 and best < 0.04) or time.perf_counter() - begin < 0.01:
        runs += 1
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return max(best, 1e-9)
