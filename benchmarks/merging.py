"""Time to merge the LoRAs of one weight, side by side with PEFT, mergekit and the code of the papers.

python benchmarks/merging.py                              # one layer of width 2048, 8 LoRAs of rank 16, beside PEFT
python benchmarks/merging.py --peers DIR                  # and beside the clones in DIR (what is missing is said)
python benchmarks/merging.py --parts layer peers dense widths tasks --json numbers.json

The parts: `layer`, low-rank deltas in core, KnOTS and full space; `peers`, entrywise methods on dense deltas; `dense`,
spectral methods on dense deltas of full rank, beside the same with torch.linalg.svd; `widths` and `tasks`, growth.
Peers run their own code on the same numbers, in turns with ours; a ratio is the peer's time over ours.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peers import PEERS
from published import ALPHA, RANK_FRACTION, SCALING, TOP
from synthetic import Layer, full_rank, loras
from timing import Call, medians, print_header, print_row
from torch import Tensor

from orthoft.delta import Delta, Dense
from orthoft.merging import merge_deltas

DENSITY = TOP / 100
CURVES: dict[str, dict[str, Any]] = {
    "task_arithmetic": {},
    "ties": {"density": DENSITY, "space": "core"},
    "tsv": {},
    "cart": {},
    "iso_c": {},
    "opcm": {},
    "wudi": {},
}
SPECTRAL = ("tsv", "iso_c", "iso_cts", "cart")
WIDTHS = (512, 1024, 2048, 4096, 8192)
TASKS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Row:
    """One of our merges, and the peers that it stands beside."""

    name: str
    ours: Callable[[Layer], Call]
    peers: Sequence[str]


@dataclass
class Run:
    """What all parts share: the settings, and the numbers for the JSON file."""

    repeats: int
    patience: float
    peers: Path | None
    numbers: list[dict[str, Any]] = field(default_factory=list)

    def medians(self, calls: Mapping[str, Call]) -> dict[str, float]:
        took = medians(calls, self.repeats, patience=self.patience)
        return {name: wall for name, (wall, _) in took.items()}


Ours = Callable[[Layer], Callable[[], Delta]]


def factored(method: str, space: str = "core", **params: Any) -> Ours:
    return lambda layer: partial(merge_deltas, layer.deltas, method=method, space=space, **params)


def cut(method: str, space: str, **params: Any) -> Callable[[Layer], Call]:
    """The same merge, and the best approximation of it of the rank of one task."""
    merge = factored(method, space, **params)
    return lambda layer: lambda: merge(layer)().truncated(layer.rank)


def entrywise(method: str, count: int | None = None, **params: Any) -> Ours:
    """On the dense deltas, of the first ``count`` tasks."""
    return lambda layer: partial(
        merge_deltas, [Dense(change) for change in layer.dense[:count]], method=method, space="full", **params
    )


LAYER = (
    Row("task_arithmetic, core", factored("task_arithmetic"), ["Core Space sum", "PEFT cat"]),
    Row("task_arithmetic, cut to rank r", cut("task_arithmetic", "core"), ["PEFT svd, thin", "PEFT svd"]),
    Row("ties, core", factored("ties", density=DENSITY), ["Core Space TIES"]),
    Row("ties, full", factored("ties", "full", density=DENSITY), ["mergekit ties"]),
    Row("ties, full, cut to rank r", cut("ties", "full", density=DENSITY), ["PEFT ties_svd, thin", "PEFT ties_svd"]),
    Row("ties, core, cut to rank r", cut("ties", "core", density=DENSITY), ["PEFT ties_svd, thin", "PEFT ties_svd"]),
    Row("ties, knots", factored("ties", "knots", density=DENSITY), ["KnOTS TIES"]),
    Row("tsv, core", factored("tsv"), ["Core Space TSV", "TSV-M"]),
    Row("cart, core", factored("cart", rank_fraction=RANK_FRACTION, scaling=SCALING), ["Core Space CART"]),
    Row("iso_c, core", factored("iso_c"), ["Core Space Iso", "Iso-C"]),
    Row("iso_cts, core", factored("iso_cts"), ["Iso-CTS"]),
    Row("opcm, core", factored("opcm", alpha=ALPHA), ["OPCM"]),
    Row("wudi, core", factored("wudi"), ["WUDI"]),
)
ENTRYWISE = (
    Row("ties", entrywise("ties", density=DENSITY, consensus="weighted_mean"), ["mergekit ties", "PEFT ties"]),
    Row("magnitude", entrywise("magnitude", density=DENSITY), ["PEFT magnitude_prune"]),
    Row("dare", entrywise("dare", drop=0.5), ["mergekit dare_linear", "PEFT dare_linear"]),
    Row("della", entrywise("della", density=0.5, epsilon=0.15), ["mergekit della"]),
    Row("breadcrumbs", entrywise("breadcrumbs", density=0.9, gamma=0.01), ["mergekit breadcrumbs"]),
    Row("sce", entrywise("sce"), ["mergekit sce"]),
    Row("model_stock", entrywise("model_stock"), ["mergekit model_stock"]),
    Row("karcher", entrywise("karcher"), ["mergekit karcher"]),
    Row("slerp", entrywise("slerp", count=2), ["mergekit slerp"]),
)


def side_by_side(title: str, rows: Sequence[Row], layer: Layer, run: Run) -> None:
    """Print one line for each of our merges and each of its peers, then what the peers are."""
    print_header(title, "merge", "orthoft s", "peer", "peer s", "ratio")
    used = list(dict.fromkeys(name for row in rows for name in row.peers))
    for row in rows:
        calls = {name: PEERS[name].call(run.peers, layer) for name in row.peers}
        took = run.medians({"": row.ours(layer), **{name: call for name, call in calls.items() if call}})
        for name in row.peers:
            mark = f"{name} [{used.index(name) + 1}]"
            if name not in took:
                print_row(row.name, f"{took['']:.3f}", mark, "", "")
                continue
            theirs = took[name] / PEERS[name].share
            run.numbers.append({"part": title, "merge": row.name, "s": took[""], "peer": name, "peer_s": theirs})
            print_row(row.name, f"{took['']:.3f}", mark, f"{theirs:.3f}", f"{theirs / took['']:.1f}")
    print()
    for i, name in enumerate(used):
        print(f"[{i + 1}] {name}: {PEERS[name].footnote(run.peers)}  ")


def dense(width: int, tasks: int, run: Run) -> None:
    """Print ours on the numerical range beside the published form, and the errors of both against it in float64."""
    deltas = full_rank(width, tasks)
    print_header(
        f"{tasks} dense deltas of full rank, width {width}", "merge", "s", "by SVD s", "ratio", "error", "error by SVD"
    )
    for method in SPECTRAL:
        by_range = {name: partial(merge_deltas, deltas, method=method, range=name) for name in ("numerical", "full")}
        took = run.medians(by_range)
        exact = merge_deltas([Dense(delta.dense().double()) for delta in deltas], method=method, range="full").dense()
        errors = [relative(merge().dense(), exact) for merge in by_range.values()]
        ours, theirs = took.values()
        run.numbers.append({"part": f"dense {width}", "merge": method, "s": ours, "peer_s": theirs, "errors": errors})
        print_row(method, f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f}", *(f"{error:.0e}" for error in errors))


def relative(value: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(value - exact) / torch.linalg.vector_norm(exact))


def curve(title: str, sizes: Sequence[int], layers: Callable[[int], Layer], run: Run) -> None:
    """Print the seconds at each size, the exponents of growth between neighbours, and the floor of the core space."""
    seconds: dict[str, list[float]] = {name: [] for name in CURVES}
    floors = []
    rates = calibration()
    for size in sizes:
        layer = layers(size)
        calls = {name: partial(merge_deltas, layer.deltas, method=name, **on) for name, on in CURVES.items()}
        for name, took in run.medians(calls).items():
            seconds[name].append(took)
        floors.append(core_floor(layer, *rates))
    print_header(f"Seconds by {title}", "", *map(str, sizes))
    for name, row in seconds.items():
        print_row(name, *(f"{took:.3f}" for took in row))
    print_row("floor of the core space", *(f"{floor:.3f}" for floor in floors))
    shares = zip(seconds["iso_c"], floors, strict=True)
    print_row("iso_c / floor", *(f"{took / floor:.1f}" for took, floor in shares))
    print(
        f"\nFloor: at {rates[0] / 1e9:.0f} GFLOP/s of a float64 product and {rates[1] / 1e9:.0f} GB/s of a copy, now."
    )
    print_growth(title, sizes, seconds)
    run.numbers.append({"part": title, "sizes": list(sizes), "seconds": seconds, "floor": floors, "rates": rates})


def print_growth(title: str, sizes: Sequence[int], seconds: Mapping[str, Sequence[float]]) -> None:
    print_header(f"Exponents of growth by {title}", "", *(f"{a} to {b}" for a, b in pairwise(sizes)))
    for name, row in seconds.items():
        pairs = zip(pairwise(sizes), pairwise(row), strict=True)
        print_row(name, *(f"{math.log(after / before) / math.log(b / a):.1f}" for (a, b), (before, after) in pairs))


def calibration() -> tuple[float, float]:
    """Return what this machine does now: operations per second of a float64 product, bytes per second of a copy."""
    a, b = torch.randn(1024, 1024, dtype=torch.float64), torch.empty(1 << 25)
    c = torch.empty_like(b)
    took = medians({"product": lambda: a @ a, "copy": lambda: c.copy_(b)}, repeats=5)
    return 2 * 1024**3 / took["product"][0], 2 * b.nbytes / took["copy"][0]


def core_floor(layer: Layer, operations: float, nbytes: float) -> float:
    """Return the seconds that the arithmetic of the core space, or its memory traffic, takes at the machine's rates.

    For bases of two (m, R) stacks by QR, the factor and its Q: ``4 m R^2 - 4/3 R^3`` each; the T cores
    ``2 R^2 r`` each; the result ``2 m R^2``. The factors are read in float32 and written as float64 bases.
    """
    m, R = layer.width, layer.rank * len(layer.deltas)
    work = 2 * (4 * m * R**2 - 4 / 3 * R**3) + 2 * R**3 + 2 * m * R**2
    traffic = 2 * m * R * (4 + 8)
    return max(work / operations, traffic / nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["layer"], choices=["layer", "peers", "dense", "widths", "tasks"])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--count", type=int, default=8, help="of the tasks")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--counts", type=int, nargs="+", default=TASKS)
    parser.add_argument("--dense-widths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--only", default="", help="part of the names of the merges to measure beside peers")
    parser.add_argument("--peers", type=Path, help="folder of clones, one of each repository's name")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--patience", type=float, default=10.0, help="calls that take more seconds run once")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = Run(args.repeats, args.patience, args.peers)
    print(f"torch {torch.__version__}, {args.threads} thread(s), float32, medians of {args.repeats}")
    what = f"{args.count} LoRAs of rank {args.rank}, width {args.width}"
    for part in args.parts:
        if part in ("layer", "peers"):
            rows, title = (LAYER, what) if part == "layer" else (ENTRYWISE, f"Entrywise, dense: {what}")
            layer = loras(args.width, args.count, args.rank)
            side_by_side(title, [row for row in rows if args.only in row.name], layer, run)
        elif part == "dense":
            for width in args.dense_widths:
                dense(width, args.count, run)
        elif part == "widths":
            curve("width", args.widths, lambda width: loras(width, args.count, args.rank), run)
        else:
            curve("number of tasks", args.counts, lambda count: loras(args.width, count, args.rank), run)
    if args.json:
        args.json.write_text(json.dumps({"settings": vars(args), "numbers": run.numbers}, default=str, indent=1))


if __name__ == "__main__":
    main()
