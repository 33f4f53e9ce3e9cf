"""Time and memory of adapters, side by side with PEFT's, as ratios to the frozen layer in the same run.

python benchmarks/adapters.py                      # one layer of width 2048, Llama blocks, a mixture, merge, float32
python benchmarks/adapters.py --width 2048 4096 --tokens 128 1024 4096 --dtype float32 bfloat16
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from functools import partial

import peft
import torch
from timing import medians, print_header, print_row, seconds
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from orthoft import GOFTConfig, HRAConfig, OFTv2Config, PSOFTConfig, SVFTConfig, to_lora

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIGS: dict[str, Callable[..., peft.PeftConfig]] = {
    "orthoft OFTv2 b=32": lambda **on: OFTv2Config(block_size=32, **on),
    "PEFT OFT b=32": lambda **on: peft.OFTConfig(oft_block_size=32, **on),
    "PEFT BOFT b=32": lambda **on: peft.BOFTConfig(boft_block_size=32, **on),
    "orthoft HRA r=8": lambda **on: HRAConfig(r=8, **on),
    "orthoft HRA r=32": lambda **on: HRAConfig(r=32, **on),
    "PEFT HRA r=8": lambda **on: peft.HRAConfig(r=8, **on),
    "orthoft GOFT": lambda **on: GOFTConfig(**on),
    "orthoft qGOFT": lambda **on: GOFTConfig(mode="quasi", **on),
    "orthoft PSOFT r=64": lambda **on: PSOFTConfig(r=64, svd="lowrank", **on),
    "PEFT PSOFT r=64": lambda **on: peft.PsoftConfig(r=64, psoft_alpha=64, ab_svd_init="psoft_init", **on),
    "orthoft SVFT plain": lambda **on: SVFTConfig(pattern="plain", **on),
    "orthoft SVFT banded d=2": lambda **on: SVFTConfig(pattern="banded", off_diagonals=2, **on),
    "PEFT LoRA r=16": lambda **on: peft.LoraConfig(r=16, **on),
}
# On fused experts: ours turn what they read, PEFT's LoRA adds to each of their first matrices.
ON_EXPERTS = {name: CONFIGS[name] for name in CONFIGS if name.startswith("orthoft") and "SVFT" not in name} | {
    "PEFT LoRA r=8": lambda **on: peft.LoraConfig(r=8, target_modules=[], target_parameters=["experts.gate_up_proj"]),
}


class OneLayer(nn.Module):
    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False, dtype=dtype, device=DEVICE).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Blocks(nn.Module):
    """Two Llama blocks on embeddings: attention, norms and activations, with the linears adapted."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            vocab_size=8,
        )
        self.model = LlamaModel(config).to(DEVICE, dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.model(inputs_embeds=x[None]).last_hidden_state
        return hidden


class Mixture(nn.Module):
    """A mixture of 16 experts, of which each token takes 4."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        config = Qwen3MoeConfig(
            hidden_size=width, moe_intermediate_size=width // 2, num_experts=16, num_experts_per_tok=4
        )
        config._experts_implementation = "eager"
        self.mlp = Qwen3MoeSparseMoeBlock(config).to(DEVICE, dtype).requires_grad_(False)
        for parameter in self.mlp.parameters():
            nn.init.normal_(parameter, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.mlp(x[None])
        return out[0] if isinstance(out, tuple) else out


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for backward, each storage once, the model's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
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


def adapted(
    make: Callable[[int, torch.dtype], nn.Module], width: int, dtype: torch.dtype, only: str
) -> dict[str, nn.Module]:
    models = {"frozen": make(width, dtype)}
    targets = {OneLayer: ["linear"], Mixture: ["experts"]}
    for name, config in (ON_EXPERTS if make is Mixture else CONFIGS).items():
        if only in name:
            torch.manual_seed(0)
            on = {"target_modules": targets.get(make, "all-linear")}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT's, on its own defaults
                models[name] = peft.get_peft_model(make(width, dtype), config(**on))
    return models


def step(model: nn.Module, x: Tensor) -> None:
    model(x).sum().backward()


def forward_backward(title: str, models: dict[str, nn.Module], x: Tensor, repeats: int) -> None:
    """Print a table of ratios to the frozen model, and of what autograd keeps."""
    calls = {name: partial(step, model, x) for name, model in models.items()}
    took = medians(calls, repeats, settle=math.inf)
    kept = saved_bytes(models["frozen"], x)
    print_header(title, "", "wall time / frozen", "CPU time / frozen", "saved / one input")
    for name, model in models.items():
        wall, cpu = (mine / floor for mine, floor in zip(took[name], took["frozen"], strict=True))
        saved = (saved_bytes(model, x) - kept) / (x.numel() * x.element_size())
        print_row(name, f"{wall:.2f}", f"{cpu:.2f}", f"{saved:.2f}")


def merge_times(width: int, repeats: int, only: str) -> None:
    models = adapted(OneLayer, width, torch.float32, only)
    print_header(f"Merge and unmerge of one {width} x {width} layer, float32", "", "merge s", "unmerge s")
    for name, model in models.items():
        if name == "frozen":
            continue
        calls = {"merge": model.merge_adapter, "unmerge": model.unmerge_adapter}
        took = medians(calls, repeats, settle=0)
        print_row(name, *(f"{wall:.2f}" for wall, _ in took.values()))


def export_times(width: int, only: str) -> None:
    """Print the seconds that a LoRA takes: exact, or cut to rank 16 (one SVD of the change)."""
    models = adapted(OneLayer, width, torch.float32, only)
    print_header(f"One {width} x {width} layer as a LoRA, float32", "", "s", "")
    for name, model in models.items():
        if not name.startswith("orthoft"):
            continue
        exact = "HRA" in name or "PSOFT" in name
        wall, _ = seconds(partial(to_lora, model, rank=None if exact else 16))
        print_row(name, f"{wall:.2f}", "exact" if exact else "rank 16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=[2048])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="part of the names to measure, e.g. orthoft")
    parser.add_argument("--parts", nargs="+", default=["layer", "blocks", "mixture", "merge", "export"])
    args = parser.parse_args()
    print(f"{DEVICE.type}, {torch.get_num_threads()} thread(s), medians of {args.repeats}")
    for part, make in (("layer", OneLayer), ("blocks", Blocks), ("mixture", Mixture)):
        for dtype in (getattr(torch, name) for name in args.dtype if part in args.parts):
            for width in args.width if part == "layer" else [512 if part == "blocks" else 1024]:
                models = adapted(make, width, dtype, args.only)
                for tokens in args.tokens if part == "layer" else [1024]:
                    title = f"Forward + backward, {part}, width {width}, {tokens} tokens, {dtype}"
                    x = torch.randn(tokens, width, dtype=dtype, device=DEVICE, requires_grad=True)
                    forward_backward(title, models, x, args.repeats)
    if "merge" in args.parts:
        merge_times(4096, min(3, args.repeats), args.only)
    if "export" in args.parts:
        export_times(2048, args.only)


if __name__ == "__main__":
    main()
