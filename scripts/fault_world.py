"""A tiny world to merge in, and the command line as processes that can be killed; what they leave is compared."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import orthoft.merging.reports.page  # loaded once, so that what is forked need not wait for it
import orthoft.recipes.merge_job  # noqa: F401
from orthoft.cli import main as command_line

CASES = {
    "checkpoint": ["--method", "ties"],
    "opcm": ["--method", "opcm"],
    "lora": ["--method", "mean", "--as", "lora", "--rank", "3"],
    "delta": ["--method", "task_arithmetic", "--as", "delta"],
}
LAYERS, ROWS, COLUMNS = 8, 160, 128
SHARD = "170KB"  # two weights
PATIENCE = 120.0  # seconds that a merge of a second may take on a busy machine
STRIKES = 20  # attempts to kill a merge before it is done


@dataclass(frozen=True)
class World:
    """A sharded base and two LoRAs in a folder; ``fresh`` starts an interpreter for each run instead of forking one."""

    root: Path
    fresh: bool = False

    def words(self, case: str, out: Path) -> list[str]:
        sources = [text for name in "ab" for text in ("--source", str(self.root / name))]
        return [
            *("merge", "--base", str(self.root / "base"), *sources, "--output", str(out)),
            *("--max-shard-size", SHARD, *CASES[case]),
        ]

    def start(self, case: str, out: Path) -> int:
        """Start a merge and return its process."""
        if self.fresh:
            return start_fresh(self.words(case, out), {})
        return start_forked(self.words(case, out))

    def merge(self, case: str, out: Path) -> str:
        """Merge to the end and return what went wrong, or nothing."""
        return failure(*ended(self.start(case, out)))

    def killed(self, case: str, out: Path, draw: random.Random, window: float) -> bool:
        """Start a merge, kill it at some point of its work, and say whether it was in time."""
        process = self.start(case, out)
        seen = wait_for(partial(out), process)
        time.sleep(draw.uniform(0, window) if seen else 0)
        os.kill(process, signal.SIGKILL)
        log_of(process).unlink(missing_ok=True)
        return os.WIFSIGNALED(os.waitpid(process, 0)[1])

    def interrupted(self, case: str, out: Path, draw: random.Random, window: float) -> bool:
        """Kill merges until one leaves something to go on from."""
        for _ in range(STRIKES):
            if self.killed(case, out, draw, window) and partial(out).is_dir() and not out.exists():
                return True
            shutil.rmtree(out, ignore_errors=True)
        return False


def build(root: Path) -> World:
    """Write a sharded base of 16 weights and two LoRAs of all of them."""
    random_ = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random_)  # noqa: E731
    names = [f"model.layers.{i}.{part}" for i in range(LAYERS) for part in ("q_proj", "v_proj")]
    (root / "base").mkdir(parents=True)
    shard_of = {f"{name}.weight": f"model-{i // 4 + 1:05}-of-{len(names) // 4:05}" for i, name in enumerate(names)}
    index = {name: f"{stem}.safetensors" for name, stem in shard_of.items()}
    for file in set(index.values()):
        save_file({name: draw(ROWS, COLUMNS) for name in index if index[name] == file}, root / "base" / file)
    (root / "base" / "config.json").write_text('{"model_type": "llama"}')
    (root / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    for source in "ab":
        factors = {f"base_model.model.{name}.lora_A.weight": draw(8, COLUMNS) for name in names}
        factors |= {f"base_model.model.{name}.lora_B.weight": draw(ROWS, 8) for name in names}
        (root / source).mkdir()
        save_file(factors, root / source / "adapter_model.safetensors")
        (root / source / "adapter_config.json").write_text(json.dumps(config))
    return World(root)


# Processes: what they say goes to a file that is theirs


def start_forked(arguments: Sequence[str], first: Callable[[], None] | None = None) -> int:
    """Run the command line in a copy of this process, which calls ``first`` before."""
    sys.stdout.flush()
    if process := os.fork():
        return process
    try:
        said = os.open(log_of(os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        torch.set_num_threads(1)  # the threads of the parent are not there
        if first is not None:
            first()
        command_line(list(arguments))
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(int(end.code or 0))
    finally:
        os._exit(70)


def start_fresh(arguments: list[str], environment: dict[str, str]) -> int:
    """Run the command line in a new interpreter."""
    said = Path(tempfile.gettempdir(), f"orthoft-faults-{os.getpid()}.new")
    actions = [
        (os.POSIX_SPAWN_OPEN, 1, said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    command = [sys.executable, "-m", "orthoft.cli", *arguments]
    process = os.posix_spawn(sys.executable, command, os.environ | environment, file_actions=actions)
    while not said.exists():
        time.sleep(0.001)
    said.rename(log_of(process))
    return process


def log_of(process: int) -> Path:
    return Path(tempfile.gettempdir(), f"orthoft-faults-{process}.log")


def wait_for(path: Path, process: int) -> bool:
    """Wait until a path is there; say no if the process ends before."""
    until = time.monotonic() + PATIENCE
    while not path.exists() and time.monotonic() < until:
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(0.0005)
    return True


def ended(process: int) -> tuple[int, list[str]]:
    """Wait for a process; return its exit code, or 137 for one that hangs, and the lines that it said."""
    until = time.monotonic() + PATIENCE
    while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > until:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    log = log_of(process)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return code, lines


def failure(code: int, lines: list[str]) -> str:
    return "" if code == 0 else f"exit code {code}: {' / '.join(lines[-3:])}"


# What is compared


def partial(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def contents(folder: Path) -> dict[str, Any]:
    """Return the bytes of all files, and of the report what does not differ from run to run."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    files.pop("report.html", None)
    report = json.loads(files.pop("report.json").read_text(encoding="utf-8"))
    for name in ("seconds", "peak_bytes", "output"):
        report.pop(name)
    for weight in report["merged"]:
        weight.pop("seconds")
    return {name: path.read_bytes() for name, path in files.items()} | {"report.json": report}


def compared(out: Path, want: dict[str, Any]) -> list[str]:
    """Return in what an output, and what lies beside it, differs from that of an undisturbed run."""
    if not out.is_dir():
        return [f"there is no {out.name}"]
    got = contents(out)
    wrong = [f"{name} differs" for name in sorted(want.keys() | got.keys()) if got.get(name) != want.get(name)]
    beside = sorted({path.name for path in out.parent.iterdir()} - {out.name})
    return wrong + ([f"left behind: {', '.join(beside)}"] if beside else [])


@contextmanager
def place(root: Path) -> Iterator[Path]:
    """Give the path of an output in a folder of its own, which is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        yield Path(folder, "out")
