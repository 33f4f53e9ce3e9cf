"""Every recipe that ships runs to its end: its own words, on a tiny model and tiny data, a few steps long."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import WORDS, save_bert, save_llama, write_rows

from orthoft.recipes import run
from orthoft.recipes.load import read_yaml

CONFIGS = sorted((Path(__file__).parents[1] / "recipes" / "configs").glob("*.yaml"))
BASES: dict[str, Callable[[Path], None]] = {"classification": save_bert, "causal-lm": save_llama}
CHAT = (
    "{% for m in messages %}{{ ('w23 ' if m.role == 'assistant' else '') + m.content + ' [EOS]\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w23' }}{% endif %}"
)


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows that are sentences with a class, texts and chats at once."""
    draw = random.Random(seed)

    def row() -> dict[str, Any]:
        words = draw.choices(WORDS, k=12)
        chat = [{"role": "user", "content": words[0]}, {"role": "assistant", "content": words[1]}]
        return {"text": " ".join(words), "label": "low" if WORDS.index(words[0]) < 12 else "high", "messages": chat}

    return [row() for _ in range(count)]


def shortened(words: dict[str, Any], base: Path, root: Path) -> list[str]:
    """Return overrides that put a shipped recipe on a tiny base and tiny data, and let it train two steps."""
    files = {split: write_rows(root / f"{split}.jsonl", rows(24, seed)) for seed, split in enumerate(("train", "test"))}
    files["tuning"] = files["test"]
    places = [f"tasks.{i}" for i in range(len(words["tasks"]))]
    changes = [f"base={base}", f"output={root / 'out'}", "defaults.training.max_steps=2"]
    changes += [f"{place}.data.{split}={file}" for place in places for split, file in files.items()]
    tasks = zip(places, words["tasks"], strict=True)
    changes += [f"{place}.adapter.block_size=8" for place, task in tasks if "block_size" in task.get("adapter", {})]
    if words["defaults"]["kind"] == "causal-lm":
        changes += ["defaults.block_size=24", "defaults.new_tokens=2"]
    return changes


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_a_shipped_recipe_runs_to_its_end(config: Path, tmp_path: Path) -> None:
    words = read_yaml(config)
    BASES[words["defaults"]["kind"]](tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    results = run(config, shortened(words, tmp_path / "base", tmp_path))
    names = [task["name"] for task in words["tasks"]]
    merged = ["merge", "merge-refit"] if words["merge"].get("refit_heads") else ["merge"]
    assert [*results["scores"]] == ["base", *names, *merged]
    assert all(results["scores"][row].keys() == {*names} for row in ("base", *merged))
    assert results["merge"]["method"] == words["merge"]["method"]
    assert results["recipe"]["name"] == config.stem
    assert len(results["samples"]) == (len(names) if words["defaults"]["kind"] == "causal-lm" else 0)
