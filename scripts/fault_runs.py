"""A tiny recipe, and `orthoft run` as processes that can be killed at any point; what they leave is compared."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from fault_world import ended, failure, log_of, start_forked, start_fresh

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from tiny import label_task, save_bert

SPLITS = {"train": 32, "tuning": 16, "test": 32}
VARIES = ("seconds", "times", "peak_bytes")  # from run to run, at any depth of a JSON file
FINISHED = "holds a finished run"  # said to who starts a run again that was killed when all was done


@dataclass(frozen=True)
class Runs:
    """Recipes of two tasks in a folder, the second with tasks kept apart and a merge that wants statistics.

    ``fresh`` starts an interpreter for each run instead of forking one.
    """

    recipe: Path
    apart: Path
    fresh: bool = False

    def start(self, out: Path) -> int:
        """Start a run and return its process."""
        words = ["run", str(self.recipe), "--set", f"output={out}"]
        return start_fresh(words, {}) if self.fresh else start_forked(words)

    def run(self, out: Path) -> str:
        """Run to the end and return what went wrong, or nothing."""
        wrong = failure(*ended(self.start(out)))
        return "" if FINISHED in wrong else wrong

    def killed(self, out: Path, draw: random.Random, window: float) -> bool:
        """Start a run, kill it at some point, and say whether it was in time."""
        process = self.start(out)
        time.sleep(draw.uniform(0, window))
        os.kill(process, signal.SIGKILL)
        log_of(process).unlink(missing_ok=True)
        return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def build_runs(root: Path, fresh: bool) -> Runs:
    """Write a tiny BERT, two tasks, and recipes that train both with checkpoints, merge twice and refit heads."""
    import orthoft.recipes.pipeline  # noqa: F401  # only now, as merges are quicker to fork without it
    from orthoft.recipes.prepare import quiet

    with quiet():
        save_bert(root / "bert")
    data = [label_task(root / name, offset, seed=offset) for offset, name in enumerate("ab")]
    words = {
        "name": "faults",
        "base": str(root / "bert"),
        "output": str(root / "out"),
        "defaults": {
            "kind": "classification",
            "max_length": 16,
            "adapter": {"type": "lora", "r": 2, "target_modules": ["query", "value"]},
            "training": {"max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "save_steps": 2},
        },
        "tasks": [{"name": name, "data": files | {"limit": SPLITS}} for name, files in zip("ab", data, strict=True)],
        "merge": {"method": "ties", "refit_heads": True},
        "export": {"lora": {"rank": 3}},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(words), encoding="utf-8")
    apart = {"train_to_merge": {"method": "contrastive", "rows": 16}, "merge": {"method": "regmean"}}
    (root / "apart.yaml").write_text(yaml.safe_dump(words | apart), encoding="utf-8")
    gc.freeze()  # every training collects, and would look through all that is imported
    return Runs(root / "recipe.yaml", root / "apart.yaml", fresh)


def found(out: Path) -> dict[str, Any]:
    """Return all folders and files of a run and of what lies beside it, without what differs from run to run."""
    return {str(path.relative_to(out.parent)): _told(path, str(out)) for path in out.parent.rglob("*")}


def differences(got: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """Return in what a run differs from the undisturbed one."""
    lost, left = want.keys() - got.keys(), got.keys() - want.keys()
    changed = [name for name in want.keys() & got.keys() if got[name] != want[name]]
    words = {"missing": lost, "left behind": left, "changed": changed}
    return [f"{word}: {', '.join(sorted(names))}" for word, names in words.items() if names]


def _told(path: Path, out: str) -> Any:
    if path.is_dir() or path.name in ("report.html", "search.html") or path.suffix == ".journal":
        return None
    content = path.read_bytes().replace(out.encode(), b"OUT")
    if path.suffix == ".json":
        return _steady(json.loads(content))
    return re.sub(rb", in \d+ s ", b"", content) if path.name == "README.md" else content


def _steady(told: Any) -> Any:
    if isinstance(told, dict):
        return {key: _steady(value) for key, value in told.items() if key not in VARIES}
    return [_steady(each) for each in told] if isinstance(told, list) else told
