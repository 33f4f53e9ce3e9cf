"""Time to merge the LoRAs of one weight, side by side with PEFT's add_weighted_adapter.

python benchmarks/merging.py [--width 2048] [--tasks 8] [--rank 16] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import peft
import torch
from torch import nn

from orthoft.delta import LowRank
from orthoft.merging import merge_deltas


def peft_model(deltas: list[LowRank], width: int, rank: int) -> peft.PeftModel:
    """The same deltas as LoRAs of alpha = r on one layer."""
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(width, width, bias=False)), config, adapter_name="t0")
    layer = model.base_model.model[0]
    for t, delta in enumerate(deltas):
        if t:
            model.add_adapter(f"t{t}", config)
        layer.lora_A[f"t{t}"].weight.data = delta.A
        layer.lora_B[f"t{t}"].weight.data = delta.B
    return model


def median(call: Callable[[int], object], repeats: int) -> float:
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        call(i)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    n, r = args.width, args.rank
    deltas = [LowRank(torch.randn(n, r) / n, torch.randn(r, n)) for _ in range(args.tasks)]
    model = peft_model(deltas, n, r)
    names = [f"t{t}" for t in range(args.tasks)]

    def of_peft(kind: str, **kwargs: object) -> Callable[[int], object]:
        def call(i: int) -> object:
            name = f"{kind}{i}"
            model.add_weighted_adapter(names, [1.0] * len(names), name, combination_type=kind, **kwargs)
            return model.delete_adapter(name)

        return call

    rows = {
        "orthoft task_arithmetic, core": lambda i: merge_deltas(deltas, method="task_arithmetic"),
        "orthoft opcm, core": lambda i: merge_deltas(deltas, method="opcm"),
        "orthoft ties, core": lambda i: merge_deltas(deltas, method="ties", space="core"),
        "orthoft ties, full": lambda i: merge_deltas(deltas, method="ties", space="full"),
        "PEFT cat": of_peft("cat"),
        "PEFT svd": of_peft("svd", svd_rank=r, svd_full_matrices=False),
        "PEFT ties_svd": of_peft("ties_svd", svd_rank=r, density=0.2, svd_full_matrices=False),
    }
    threads = torch.get_num_threads()
    print(f"width {n}, {args.tasks} tasks of rank {r}, {threads} thread(s)")
    print()
    print("| merge | seconds |")
    print("|---|---|")
    for name, call in rows.items():
        print(f"| {name} | {median(call, args.repeats):.3f} |", flush=True)


if __name__ == "__main__":
    main()
