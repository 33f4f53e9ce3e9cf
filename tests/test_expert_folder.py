"""What lies in the folder of an expert, for those who get it alone: its card and its head, after any command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from cli_case import outcome
from kind_cases import texts_by_stranger
from safetensors.torch import load_file
from tiny import label_task, save_bert, save_llama, text_task
from transformers import AutoModel, AutoTokenizer

from orthoft.convert import push_to_hub
from orthoft.recipes import load, run
from orthoft.recipes.harness import harness_words
from orthoft.recipes.schema import Harness
from orthoft.recipes.shipped import json_schema

Words = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_bert(folder / "bert")
    save_llama(folder / "llama")
    return folder


def labels(models: Path, folder: Path) -> Words:
    return {
        "name": "tiny",
        "base": str(models / "bert"),
        "output": str(folder / "out"),
        "defaults": {
            "kind": "classification",
            "max_length": 16,
            "head": "trained",
            "adapter": {"type": "hra", "r": 4, "target_modules": "all-linear", "exclude_modules": ["pooler.dense"]},
            "training": {"max_steps": 2, "per_device_train_batch_size": 16, "learning_rate": 1e-2},
        },
        "tasks": [
            {"name": name, "data": label_task(folder / name, i, seed=i)} | ({} if i else {"head": "frozen"})
            for i, name in enumerate("ab")
        ],
        "merge": {"method": "mean"},
    }


def texts(models: Path, folder: Path) -> Words:
    return {
        "name": "tongues",
        "base": str(models / "llama"),
        "output": str(folder / "out"),
        "tasks": [
            {
                "name": "up",
                "kind": "causal-lm",
                "block_size": 16,
                "adapter": {"type": "hra", "r": 4, "target_modules": "all-linear"},
                "training": {"max_steps": 2, "per_device_train_batch_size": 8},
                "data": text_task(folder / "up", 1, seed=0),
            }
        ],
        "merge": {"method": "mean"},
    }


def shortened(file: str, rows: int) -> None:
    lines = Path(file).read_text(encoding="utf-8").splitlines(keepends=True)
    Path(file).write_text("".join(lines[:rows]), encoding="utf-8")


def card(words: Words, task: str) -> str:
    return Path(words["output"], "experts", task, "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("recipe", "task"), [(labels, "a"), (labels, "b"), (texts, "up")])
def test_an_expert_has_our_card_and_its_head_before_it_is_scored(
    recipe: Any, task: str, models: Path, tmp_path: Path
) -> None:
    words, out = recipe(models, tmp_path), tmp_path / "out"
    run(words, until="finetune", tasks=[task])
    told = card(words, task)
    assert f"# HRA adapter for {task}" in told
    assert "base_model:" not in told  # a folder here, which the Hub refuses
    assert "Measured" not in told
    assert ("## Head" in told) == (recipe is labels)
    heads = out / "experts" / task / "heads"
    assert heads.exists() == (recipe is labels)
    for file in heads.glob("*"):
        assert file.read_bytes() == (out / "heads" / file.name).read_bytes()


def test_a_run_that_ended_before_the_card_gets_it_later(models: Path, tmp_path: Path) -> None:
    words, lines = labels(models, tmp_path), list[str]()
    run(words, until="finetune", tasks=["a"])
    expert = tmp_path / "out" / "experts" / "a"
    (expert / "README.md").write_text("# Model Card for Model ID", encoding="utf-8")
    (expert / "heads" / "a.safetensors").unlink()
    run(words, until="finetune", tasks=["a"], say=lines.append)
    assert f"  reused {expert}" in lines
    assert "# HRA adapter for a" in card(words, "a")
    assert (expert / "heads" / "a.safetensors").is_file()


class KilledError(Exception):
    """Stands for a kill -9 in the middle."""


def test_checkpoints_of_a_finished_expert_go(models: Path, tmp_path: Path) -> None:
    """A run may be killed when the expert is there and its checkpoints still are."""
    words = labels(models, tmp_path)
    run(words, until="finetune", tasks=["a"])
    left = tmp_path / "out" / "experts" / ".a.trainer" / "checkpoint-2"
    left.mkdir(parents=True)
    (left / "trained.safetensors").write_bytes(b"")
    run(words, until="finetune", tasks=["a"])
    assert not left.parent.exists()


@pytest.mark.parametrize("lost", ["a.safetensors", "a.json", "README.md"])
def test_a_reused_expert_stays_whole_when_the_run_is_killed(
    lost: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = labels(models, tmp_path)
    run(words, until="finetune", tasks=["a"])
    expert = tmp_path / "out" / "experts" / "a"
    before = {file: file.read_bytes() for file in expert.rglob("*") if file.is_file()}
    opened = Path.open

    def killed(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        stream = opened(path, mode, *args, **kwargs)
        if "w" in mode and expert in path.parents and lost in path.name:
            stream.close()
            raise KilledError
        return stream

    monkeypatch.setattr(Path, "open", killed)
    with pytest.raises(KilledError):
        run(words, until="finetune", tasks=["a"])
    assert {file: file.read_bytes() for file in before} == before
    held = [path for path in expert.rglob("*") if path.is_file() and path not in before]
    assert [path.name for path in held] == [f".{lost}.partial"]
    assert not any(path.name in name for name in push_to_hub(expert, "x", dry_run=True).files for path in held)
    monkeypatch.undo()
    run(words, until="finetune", tasks=["a"])
    assert {file: file.read_bytes() for file in expert.rglob("*") if file.is_file()} == before


def test_a_stranger_gets_the_scores_of_the_card_from_the_folder_alone(models: Path, tmp_path: Path) -> None:
    words = labels(models, tmp_path)
    for task in words["tasks"]:
        shortened(task["data"]["test"], 16)  # which a stranger reads one by one
    results = run(words)
    for task in "ab":
        expert = tmp_path / "out" / "experts" / task
        told, rows = card(words, task), load_rows(words, task)
        assert f"`heads/{task}.safetensors`" in told
        assert {f"heads/{task}.safetensors", f"heads/{task}.json"} <= push_to_hub(
            expert, "x", dry_run=True
        ).files.keys()
        whole = tmp_path / f"whole-{task}"
        model: Any = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(models / "bert"), str(expert))
        model.merge_and_unload().save_pretrained(whole)
        AutoTokenizer.from_pretrained(models / "bert").save_pretrained(whole)
        scores = texts_by_stranger(whole, expert / "heads" / f"{task}.safetensors", rows, {})
        assert scores["accuracy"] == pytest.approx(results["scores"][task][task]["accuracy"])
        assert f"{results['scores'][task][task]['accuracy']:.4g}" in told
    merged = (tmp_path / "out" / "merged" / "README.md").read_text(encoding="utf-8")
    assert "`merge` is scored on a, b by the experts' own linear heads, which are not in this folder" in merged
    assert "probe.weight" in load_file(tmp_path / "out" / "experts" / "b" / "heads" / "b.safetensors")


def load_rows(words: Words, task: str) -> list[Words]:
    from orthoft.recipes.data import read_file

    (found,) = [one for one in load(words).tasks if one.name == task]
    return list(read_file(Path(str(found.data.test))))


def test_finetune_on_a_finished_run_does_what_its_help_says(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, lines, results = texts(models, tmp_path), list[str](), tmp_path / "out" / "results.json"
    run(words)
    with pytest.raises(FileExistsError, match="holds a finished run"):
        run(words, until="finetune")
    assert results.is_file()
    run(words, until="finetune", keep_experts=True, say=lines.append)
    assert sum("reused" in line for line in lines) == 1
    assert not results.exists()
    assert not (tmp_path / "out" / "merged").exists()
    assert outcome("finetune", "--help") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "One that is finished, or of another recipe, needs --keep-experts" in told
    assert "both remove its merge and its results" in told


def test_the_harness_reads_the_export_whole_and_says_so(models: Path, tmp_path: Path) -> None:
    words = texts(models, tmp_path) | {"dtype": "bfloat16", "quantization": {"load_in_4bit": True}}
    told = harness_words(load(words), Harness(tasks=["x"]), tmp_path)
    assert told["model_args"] == {"pretrained": str(tmp_path), "dtype": "bfloat16"}
    said = " ".join(json_schema("recipe")["$defs"]["Harness"]["description"].split())
    assert "never quantised, whatever the recipe's ``quantization``" in said
