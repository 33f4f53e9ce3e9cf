"""What tests of the command line have in common: tiny models on disk, a recipe of them, and the exit code of a call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import label_task, save_bert

from orthoft.cli import main
from orthoft.recipes import load


def save_models(folder: Path) -> None:
    """Save a tiny BERT, two LoRAs of it with different targets, and an adapter of each of two of our own types."""
    import peft
    from transformers import AutoModel

    import orthoft

    save_bert(folder / "bert")
    label_task(folder / "a", 0, seed=0)
    label_task(folder / "b", 6, seed=1)
    configs = {
        "query": peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False),
        "value": peft.LoraConfig(r=2, target_modules=["value"], init_lora_weights=False),
        "hra": orthoft.HRAConfig(r=3, target_modules=["query"], init_weights=False),
        "oftv2": orthoft.OFTv2Config(block_size=8, target_modules=["query"], init_weights=False),
    }
    for name, config in configs.items():
        torch.manual_seed(1)
        model = AutoModel.from_pretrained(folder / "bert")
        peft.get_peft_model(model, config).save_pretrained(folder / name)


def recipe(models: Path, folder: Path) -> Path:
    """Write a recipe of two tasks and a few steps to ``folder``."""

    def task(name: str, adapter: dict[str, object]) -> dict[str, object]:
        splits = ("train", "tuning", "test")
        return {"name": name, "adapter": adapter, "data": {s: str(models / name / f"{s}.jsonl") for s in splits}}

    words = {
        "name": "tiny",
        "base": str(models / "bert"),
        "output": str(folder / "out"),
        "defaults": {
            "kind": "classification",
            "adapter": {"target_modules": "all-linear", "exclude_modules": ["pooler.dense"]},
            "training": {"max_steps": 4, "learning_rate": 1e-2},
        },
        "tasks": [task("a", {"type": "oftv2", "block_size": 8}), task("b", {"type": "hra", "r": 4})],
        "merge": {"method": "mean"},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(words), encoding="utf-8")
    return file


def words_of(models: Path, output: Path, *overrides: str) -> dict[str, Any]:
    """Return the words of the recipe in a folder, those that it gives, with another output."""
    told = load(models / "recipe.yaml", [f"output={output}", *overrides])
    words: dict[str, Any] = told.model_dump(mode="json", exclude_unset=True)
    return words


def outcome(*arguments: str | Path) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Return the one line that answers a call of the command line with bad input, which prints nothing else."""
    assert outcome(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert len(said.err.splitlines()) == 1
    return said.err


def merging(models: Path, out: Path, *sources: str | Path, method: str = "mean") -> list[str]:
    named = [text for source in sources for text in ("--source", str(source))]
    return ["merge", "--base", str(models / "bert"), *named, "--method", method, "--output", str(out)]
