"""What the benchmarks share: interleaved timing and rows of Markdown tables."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(call: Call) -> tuple[float, float]:
    """Return the wall-clock and the processor time of one call."""
    start, spent = now(), time.process_time()
    call()
    return now() - start, time.process_time() - spent


def medians(
    calls: Mapping[str, Call], repeats: int, *, settle: float = 1.0, patience: float = math.inf
) -> dict[str, tuple[float, float]]:
    """Return the median wall-clock and processor time of each call; they take turns, so that noise meets all alike.

    A first round warms up. Calls that take less than ``settle`` seconds run once untimed before each timed run, which
    leaves memory and caches as they need them, not the call before; those that take more than ``patience`` run once.
    """
    times = {name: [seconds(call)] for name, call in calls.items()}
    for _ in range(repeats):
        for name, call in calls.items():
            first = times[name][0][0]
            if first > patience:
                continue
            if first < settle:
                call()
            times[name].append(seconds(call))
    return {name: middle(took[1:] or took) for name, took in times.items()}


def middle(took: list[tuple[float, float]]) -> tuple[float, float]:
    wall, cpu = (statistics.median(column) for column in zip(*took, strict=True))
    return wall, cpu


def print_row(*cells: object) -> None:
    print("|", " | ".join(str(cell) for cell in cells), "|", flush=True)


def print_header(title: str, *names: str) -> None:
    print(f"\n{title}\n")
    print_row(*names)
    print("|" + "---|" * len(names))
