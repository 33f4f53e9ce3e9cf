"""lm-evaluation-harness on an export: its command line, its numbers, and what happens without it."""

from __future__ import annotations

import shlex
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny import save_llama, text_task, write_rows

from orthoft.recipes import RecipeError, load, run
from orthoft.recipes.harness import run_harness
from orthoft.recipes.schema import Harness, Recipe

RESULTS = {"arc": {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": "N/A"}, "quiz": {"exact_match,strict": 1}}


def recipe(folder: Path, **changed: Any) -> Recipe:
    data = {split: write_rows(folder / f"{split}.jsonl", [{"text": "x"}]) for split in ("train", "test")}
    task = {"name": "a", "kind": "causal-lm", "adapter": {"type": "hra"}, "data": data}
    words = {"name": "x", "base": "org/model", "output": "out", "dtype": "float32", "tasks": [task]}
    return load(words | {"merge": {"method": "mean"}, "evaluate": {"harness": {"tasks": ["arc"]}}} | changed)


def wanted(**words: Any) -> Harness:
    return Harness.model_validate({"tasks": ["arc", "quiz"]} | words)


def pretend(monkeypatch: pytest.MonkeyPatch, evaluate: Any) -> None:
    """Put a module in the place of lm_eval."""
    for name, content in (("lm_eval", {"simple_evaluate": evaluate}), ("lm_eval.tasks", {"TaskManager": dict})):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def test_the_numbers_of_the_harness_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    lines: list[str] = []

    def evaluate(**words: Any) -> dict[str, Any]:
        asked.update(words)
        return {"results": RESULTS}

    pretend(monkeypatch, evaluate)
    harness = wanted(limit=5, num_fewshot=0, include_path=str(tmp_path), apply_chat_template=True)
    told = run_harness(recipe(tmp_path), harness, tmp_path / "merged", lines.append)
    assert told["scores"] == {"arc": {"acc,none": 0.25}, "quiz": {"exact_match,strict": 1.0}}
    assert asked.pop("task_manager") == {"include_path": str(tmp_path)}
    assert asked.pop("device") in told["command"]
    assert asked == {
        "model": "hf",
        "model_args": {"pretrained": str(tmp_path / "merged"), "dtype": "float32"},
        "tasks": ["arc", "quiz"],
        "limit": 5,
        "num_fewshot": 0,
        "batch_size": 32,
        "apply_chat_template": True,
        "log_samples": False,
    }
    assert lines == [
        f"lm-evaluation-harness: {told['command']}",
        "  arc: acc,none 0.25",
        "  quiz: exact_match,strict 1",
    ]


def test_the_command_line_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orthoft.recipes.harness.find_spec", lambda name: None)
    folder = tmp_path / "my merged"
    told = run_harness(recipe(tmp_path), wanted(limit=5, batch_size="auto"), folder, lambda line: None)
    line = shlex.split(told["command"])
    assert line[:5] == ["lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32"]
    assert line[5] == "--device"
    assert line[7:] == ["--tasks", "arc,quiz", "--limit", "5", "--batch_size", "auto"]


def test_without_the_harness_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orthoft.recipes.harness.find_spec", lambda name: None)
    lines: list[str] = []
    told = run_harness(recipe(tmp_path), wanted(), tmp_path, lines.append)
    assert told["error"] == "it is not installed: pip install 'orthoft[harness]'"
    assert lines == [f"lm-evaluation-harness: {told['command']}", f"  not run, {told['error']}"]


def test_a_harness_that_fails_takes_no_results_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(**words: Any) -> dict[str, Any]:
        raise ConnectionError("the hub\nis away")

    pretend(monkeypatch, evaluate)
    told = run_harness(recipe(tmp_path), wanted(), tmp_path, lambda line: None)
    assert told["error"] == "ConnectionError: the hub is away"
    assert "scores" not in told


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"merge": None}, "evaluate.harness runs on the merged export: there is no merge"),
        ({"evaluate": {"harness": {"tasks": []}}}, "evaluate.harness.tasks: "),
        (
            {"evaluate": {"harness": {"tasks": ["arc"], "limits": 3}}},
            "evaluate.harness.limits: unknown key, did you mean",
        ),
    ],
)
def test_words_that_are_refused(changed: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(tmp_path, **changed)
    assert str(error.value).startswith(line)


def test_a_run_asks_the_harness_about_its_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path / "base")
    pretend(monkeypatch, lambda **words: {"results": {"arc": {"path": len(words["model_args"]["pretrained"])}}})
    task = {"name": "a", "kind": "causal-lm", "block_size": 16, "data": text_task(tmp_path / "a", 1, seed=0)}
    task |= {"adapter": {"type": "hra", "r": 4, "target_modules": ["q_proj"]}, "training": {"max_steps": 1}}
    words = {"name": "x", "base": str(tmp_path / "base"), "output": str(tmp_path / "out"), "tasks": [task]}
    results = run(words | {"merge": {"method": "mean"}, "evaluate": {"harness": {"tasks": ["arc"]}}})
    assert results["harness"]["scores"] == {"arc": {"path": len(str(tmp_path / "out" / "merged"))}}
