"""Time and memory to write a merged bfloat16 checkpoint, beside `cp` and `sync` of the same bytes on the same disk.

python benchmarks/export.py [--gigabytes 1] [--width 2048] [--tasks 1] [--rank 16]
    [--repeats 3] [--pause 15] [--folder D]

Both are measured behind a pause. A virtual machine may give memory that is free for some seconds back to its host, and
pays for each page that it takes again: a merge, which starts a process first, would meet that, and a `cp` right behind
another would not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ONCE = r"""
import json, re, sys, time
import orthoft.merging.reports.diagnostics, tqdm.auto
from orthoft.merging import merge
def peak():  # of this process alone; ru_maxrss begins with that of the parent
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
before = peak()
start = time.perf_counter()
merge(*json.loads(sys.argv[1]), method="task_arithmetic", diagnostics=False, progress=False)
seconds = time.perf_counter() - start
print(json.dumps([seconds, before, peak()]))
"""


def save_model(folder: Path, width: int, layers: int, vocabulary: int) -> None:
    """An embedding, and linear layers of which half will be adapted."""
    folder.mkdir()
    random = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=random) / width**0.5).bfloat16()

    tensors = {"model.embed.weight": weight(vocabulary, width)}
    for i in range(layers):
        tensors |= {f"model.{i}.{name}.weight": weight(width, width) for name in ("q", "v", "up", "down")}
        tensors[f"model.{i}.norm.weight"] = weight(width)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


def save_lora(folder: Path, width: int, layers: int, rank: int, seed: int) -> None:
    """A LoRA on all linear layers."""
    folder.mkdir()
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(layers):
        for name in ("q", "v", "up", "down"):
            module = f"base_model.model.model.{i}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, width, generator=random) / width**0.5
            tensors[f"{module}.lora_B.weight"] = 0.02 * torch.randn(width, rank, generator=random)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q", "v", "up", "down"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def copy(root: Path, pause: float) -> float:
    """Seconds to copy the base's file and to bring it to the disk."""
    target = root / "copied.safetensors"
    time.sleep(pause)
    start = time.perf_counter()
    subprocess.run(["cp", root / "base" / "model.safetensors", target], check=True)
    subprocess.run(["sync", target], check=True)
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def export(root: Path, sources: list[str], pause: float) -> tuple[float, float, float]:
    """Seconds of a merge in a process of its own, without its imports; resident MB after these, and at the peak."""
    time.sleep(pause)
    words = json.dumps([str(root / "base"), sources, str(root / "merged")])
    done = subprocess.run([sys.executable, "-c", ONCE, words], check=True, capture_output=True, text=True)
    seconds, before, peak = json.loads(done.stdout)
    shutil.rmtree(root / "merged")
    return seconds, before * 1024 / 1e6, peak * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tasks", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pause", type=float, default=15.0, help="seconds before each measurement")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder unless given")
    args = parser.parse_args()
    vocabulary = 16 * args.width
    layers = max(1, round((args.gigabytes * 1e9 / 2 - vocabulary * args.width) / (4 * args.width**2)))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder)
        save_model(root / "base", args.width, layers, vocabulary)
        for t in range(args.tasks):
            save_lora(root / f"task{t}", args.width, layers, args.rank, t)
        sources = [str(root / f"task{t}") for t in range(args.tasks)]
        copy(root, 0.0)  # which brings the base into the page cache, for both alike
        rounds = [(copy(root, args.pause), *export(root, sources, args.pause)) for _ in range(args.repeats)]
        nbytes = (root / "base" / "model.safetensors").stat().st_size
    copied, ours, before, peak = (statistics.median(column) for column in zip(*rounds, strict=True))
    largest = 4 * vocabulary * args.width / 1e6
    print(f"{nbytes / 1e9:.2f} GB of bfloat16, width {args.width}, {args.tasks} LoRAs of rank {args.rank}")
    print(
        f"{torch.get_num_threads()} thread(s), medians of {args.repeats}; read and written: {2 * nbytes / 1e9:.2f} GB"
    )
    print()
    print("| | seconds |")
    print("|---|---|")
    print(f"| cp and sync | {copied:.2f} |")
    print(f"| merge | {ours:.2f} |")
    print(f"| ratio | {ours / copied:.2f} |")
    print()
    print(
        f"resident: {before:.0f} MB after imports, {peak:.0f} MB at the peak; "
        f"the largest weight has {largest:.0f} MB in float32"
    )


if __name__ == "__main__":
    main()
