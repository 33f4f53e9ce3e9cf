"""Time and memory of one adapted layer, side by side with PEFT's, as ratios to the frozen layer in the same run.

python benchmarks/adapters.py [--width 2048] [--tokens 1024] [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import peft
import torch
from torch import Tensor, nn

from orthoft import HRAConfig, OFTv2Config

CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "orthoft OFTv2 b=32": lambda: OFTv2Config(block_size=32, target_modules=["linear"]),
    "PEFT OFT b=32": lambda: peft.OFTConfig(oft_block_size=32, target_modules=["linear"]),
    "orthoft HRA r=8": lambda: HRAConfig(r=8, target_modules=["linear"]),
    "PEFT HRA r=8": lambda: peft.HRAConfig(r=8, target_modules=["linear"]),
    "orthoft HRA r=32": lambda: HRAConfig(r=32, target_modules=["linear"]),
    "PEFT LoRA r=16": lambda: peft.LoraConfig(r=16, target_modules=["linear"]),
}


class OneLayer(nn.Module):
    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False, dtype=dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for backward, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        output = model(x)
        total = sum(kept.values())  # counted while everything is alive, so that no address is used twice
    del output
    return total


def seconds(model: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    model(x).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    print(f"width {args.width}, {args.tokens} tokens, forward + backward, {torch.get_num_threads()} thread(s)")
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        x = torch.randn(args.tokens, args.width, dtype=dtype, requires_grad=True)
        models: dict[str, nn.Module] = {"frozen layer": OneLayer(args.width, dtype)}
        for name, config in CONFIGS.items():
            models[name] = peft.get_peft_model(OneLayer(args.width, dtype), config())
        times: dict[str, list[float]] = {name: [] for name in models}
        for repeat in range(args.repeats + 1):  # interleaved, so that noise meets all alike; the first round warms up
            for name, model in models.items():
                took = seconds(model, x)
                if repeat:
                    times[name].append(took)
        floor = statistics.median(times["frozen layer"])
        print(f"\n| {dtype} | time / frozen layer | saved / one input |\n|---|---|---|")
        for name, model in models.items():
            ratio = statistics.median(times[name]) / floor
            print(f"| {name} | {ratio:.2f} | {saved_bytes(model, x) / (x.numel() * x.element_size()):.2f} |")


if __name__ == "__main__":
    main()
