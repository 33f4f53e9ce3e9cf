"""Train to merge as one line of a recipe: the run, its files, its resume, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import label_task, save_bert, write_rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from orthoft.recipes import RecipeError, load, run
from orthoft.recipes.pipeline import Run
from orthoft.recipes.prepare import check
from orthoft.recipes.subspaces import mean_of_others
from orthoft.recipes.train_to_merge import _groups, chosen_before, save_subspaces

METHODS = [("osrm", "lora"), ("contrastive", "lora"), ("orthogonal", "lora"), ("principal", "psoft")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_bert(folder / "bert")
    for seed, name in enumerate("ab"):
        label_task(folder / name, 2 * seed, seed=seed)
    return folder


def words(models: Path, out: Path, method: str = "contrastive", kind: str = "lora", r: int = 4) -> dict[str, Any]:
    tasks = [
        {"name": name, "data": {s: str(models / name / f"{s}.jsonl") for s in ("train", "tuning", "test")}}
        for name in "ab"
    ]
    return {
        "name": "apart",
        "base": str(models / "bert"),
        "output": str(out),
        "defaults": {
            "kind": "classification",
            "max_length": 16,
            "adapter": {"type": kind, "r": r, "target_modules": ["query", "intermediate.dense"]},
            "training": {"max_steps": 3, "per_device_train_batch_size": 16, "learning_rate": 1e-2},
        },
        "tasks": tasks,
        "train_to_merge": {"method": method, "rows": 20},
        "merge": {"method": "task_arithmetic"},
    }


@pytest.mark.parametrize(("method", "kind"), METHODS)
def test_each_way_is_a_line_of_a_recipe(method: str, kind: str, models: Path, tmp_path: Path) -> None:
    results = run(words(models, tmp_path / "out", method, kind))
    tensor = "lora_A.weight" if kind == "lora" else "orthoft_psoft_adapter.basis"
    for name in "ab":
        chosen = load_file(tmp_path / "out" / "subspaces" / f"{name}.safetensors")
        saved = load_file(tmp_path / "out" / "experts" / name / "adapter_model.safetensors")
        assert len(chosen) == 4
        for weight, rows in chosen.items():
            assert rows.equal(saved[f"base_model.model.{weight.removesuffix('.weight')}.{tensor}"])
    assert results["times"]["subspaces"] > 0
    assert "merge" in results["scores"]
    if kind == "lora":
        half = sum(part.numel() for key, part in saved.items() if "lora_B" in key)
        assert results["experts"]["b"]["parameters"] == half


@pytest.mark.parametrize("room", [1, 32**2 + 64**2, 3 * 32**2])
def test_layers_that_do_not_fit_into_memory_at_once_are_seen_in_parts(room: int, models: Path, tmp_path: Path) -> None:
    recipe = words(models, tmp_path / "out")
    recipe["defaults"]["adapter"]["target_modules"] = ["query", "output.dense"]
    recipe["train_to_merge"] |= {"penalty": 1e4, "frozen": False}
    recipe["train_to_merge"]["general"] = write_rows(tmp_path / "text.jsonl", [{"text": "w1 w2 w7"}, {"text": "w5 w4"}])
    for folder, held in ((tmp_path / "whole", None), (tmp_path / "parts", room)):
        save_subspaces(load(recipe), models / "bert", folder, held)
    for file in ("a", "b.others"):
        whole, parts = (load_file(tmp_path / out / f"{file}.safetensors") for out in ("whole", "parts"))
        assert len(whole) == 6
        assert whole.keys() == parts.keys()
        assert all(whole[name].equal(parts[name]) for name in whole)


def test_a_part_holds_no_more_than_there_is_room_for() -> None:
    weights = {name: torch.empty(5, n) for name, n in zip("abcde", (2, 2, 3, 4, 1), strict=True)}
    assert _groups(weights, 8) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert _groups(weights, 17) == [["a", "b", "c"], ["d", "e"]]
    assert _groups(weights, 1000) == [list(weights)]


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that is made inside."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.entries = max(self.entries, made.numel())
        return made


def test_the_mean_of_others_takes_the_room_of_one() -> None:
    covariances = [torch.full((6, 6), float(value)) for value in range(5)]
    with Largest() as largest:
        mean = mean_of_others(covariances, 4, covariances[0])
    assert largest.entries == 36
    assert mean.equal(torch.full((6, 6), 6 / 5, dtype=torch.float64))


def test_a_run_of_one_task_sees_the_inputs_of_all(models: Path, tmp_path: Path) -> None:
    run(words(models, tmp_path / "one"), until="finetune", tasks=["a"])
    assert not (tmp_path / "one" / "experts" / "b").exists()
    lines = list[str]()
    run(words(models, tmp_path / "one"), until="finetune", say=lines.append)
    assert not any("keeping" in line for line in lines)  # they are there
    run(words(models, tmp_path / "all"), until="finetune")
    for name in "ab":
        first, second = (
            load_file(tmp_path / out / "experts" / name / "adapter_model.safetensors") for out in ("one", "all")
        )
        assert all(first[key].equal(second[key]) for key in second)


def test_subspaces_that_are_not_all_there_are_chosen_again(models: Path, tmp_path: Path) -> None:
    recipe, folder = load(words(models, tmp_path / "out")), tmp_path / "subspaces"
    save_subspaces(recipe, models / "bert", folder)
    assert chosen_before(recipe, models / "bert", folder)
    assert not chosen_before(load(words(models, tmp_path / "out", "osrm")), models / "bert", folder)
    (folder / "b.safetensors").unlink()
    assert not chosen_before(recipe, models / "bert", folder)
    save_subspaces(recipe, models / "bert", folder)
    assert chosen_before(recipe, models / "bert", folder)


def test_subspaces_that_were_broken_off_are_chosen_again(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = load(words(models, tmp_path / "out")), tmp_path / "subspaces"
    save_subspaces(recipe, models / "bert", folder)

    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("orthoft.recipes.train_to_merge.save_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_subspaces(recipe, models / "bert", folder)
    assert not chosen_before(recipe, models / "bert", folder)


def test_other_processes_are_told_to_wait(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, lines = words(models, tmp_path / "out"), list[str]()
    recipe["defaults"]["training"]["ddp_timeout"] = 7200
    under_way = Run(load(recipe), models / "bert", tmp_path / "out", lines.append)
    under_way.experts.read(under_way.recipe.tasks)
    state = SimpleNamespace(num_processes=2, is_main_process=True, wait_for_everyone=lambda: None)
    monkeypatch.setattr("orthoft.recipes.experts.PartialState", lambda: state)
    monkeypatch.setattr("orthoft.recipes.experts.save_subspaces", lambda *args: None)
    (tmp_path / "out").mkdir()
    under_way.experts.choose_subspaces()
    assert lines[1] == "  the other processes wait, 7200 s at most: training.ddp_timeout allows more"


@pytest.mark.parametrize(
    ("variables", "training"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {}),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}),
        ({}, {"deepspeed": {"zero_optimization": {"stage": 2}}}),
    ],
)
def test_a_penalty_is_refused_where_weights_or_gradients_are_in_parts(
    variables: dict[str, str], training: dict[str, Any], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("orthoft.recipes.prepare.training_arguments", lambda *args: None)  # it would look for DeepSpeed
    recipe = words(models, tmp_path / "out")
    recipe["defaults"]["training"] |= training
    check(load(recipe))
    recipe["train_to_merge"] |= {"penalty": 1.0, "frozen": False}
    with pytest.raises(
        RecipeError, match=r"^train_to_merge\.penalty: it needs whole weights and gradients, which FSDP"
    ):
        check(load(recipe))


def test_other_data_of_another_task_train_again(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "b", tmp_path / "b")
    recipe, lines = words(models, tmp_path / "out"), list[str]()
    recipe["tasks"][1]["data"] = {s: str(tmp_path / "b" / f"{s}.jsonl") for s in ("train", "tuning", "test")}
    run(recipe, until="finetune")
    run(recipe, until="finetune", say=lines.append)
    assert sum("reused" in line for line in lines) == 2
    assert not any("keeping" in line for line in lines)
    label_task(tmp_path / "b", 5, seed=9)
    lines.clear()
    run(recipe, until="finetune", say=lines.append)
    assert not any("reused" in line for line in lines)
    assert "keeping the tasks apart: contrastive" in lines


def test_general_text_moves_the_subspaces(models: Path, tmp_path: Path) -> None:
    text = write_rows(tmp_path / "text.jsonl", [{"text": f"w{i} w{i + 1} w7"} for i in range(8)])
    plain, general = words(models, tmp_path / "plain"), words(models, tmp_path / "general")
    general["train_to_merge"]["general"] = text
    for recipe in (plain, general):
        run(recipe, until="finetune", tasks=["a"])
    first, second = (load_file(tmp_path / out / "subspaces" / "a.safetensors") for out in ("plain", "general"))
    assert all(not first[name].allclose(second[name]) for name in first)


def test_a_penalty_alone_and_with_a_start(models: Path, tmp_path: Path) -> None:
    plain, away, start = (words(models, tmp_path / name) for name in ("plain", "away", "start"))
    del plain["train_to_merge"]
    away["train_to_merge"] = {"penalty": 1e4, "rows": 20}
    start["train_to_merge"] |= {"penalty": 1e4, "frozen": False}
    for recipe in (plain, away, start):
        recipe["defaults"]["training"]["max_steps"] = 20
    runs = [run(recipe, until="finetune", tasks=["a"]) for recipe in (plain, away, start)]
    assert len({results["experts"]["a"]["parameters"] for results in runs}) == 1
    roots = load_file(tmp_path / "away" / "subspaces" / "a.others.safetensors")
    changes = [change_of(tmp_path / name / "experts" / "a", roots) for name in ("plain", "away", "start")]
    assert max(changes[1:]) < changes[0] / 2


def change_of(expert: Path, roots: dict[str, Tensor]) -> float:
    """Return the mean square of an expert's change of its layers' outputs on other tasks' inputs."""
    saved, total = load_file(expert / "adapter_model.safetensors"), 0.0
    for name, root in roots.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        total += float((saved[f"{key}.lora_B.weight"] @ (saved[f"{key}.lora_A.weight"] @ root)).square().sum())
    return total


@pytest.mark.parametrize(
    ("kind", "choice", "message"),
    [
        ("lora", {"rows": 20}, "train_to_merge needs a method, a penalty, or both"),
        ("psoft", {"method": "principal", "penalty": 1.0}, "train_to_merge: penalty and frozen: false are for"),
        ("hra", {"method": "osrm"}, "train_to_merge needs adapters all of type lora or all psoft, got hra"),
        ("psoft", {"method": "osrm"}, "train_to_merge: rotations need subspaces without overlap"),
        ("lora", {"method": "osmr"}, "train_to_merge.method: expected 'osrm', 'contrastive', "),
        ("lora", {"method": "contrastive", "ridge": 0.0}, "train_to_merge.ridge: "),
        ("lora", {"method": "osrm", "row": 5}, "train_to_merge.row: unknown key, did you mean 'rows'?"),
    ],
)
def test_what_a_recipe_may_not_say(
    kind: str, choice: dict[str, Any], message: str, models: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as error:
        load(words(models, tmp_path / "out", kind=kind) | {"train_to_merge": choice})
    assert str(error.value).startswith(message)
    assert len(str(error.value).splitlines()) == 1


def test_general_text_that_is_not_there(models: Path, tmp_path: Path) -> None:
    recipe = words(models, tmp_path / "out")
    recipe["train_to_merge"]["general"] = str(tmp_path / "text.jsonl")
    with pytest.raises(FileNotFoundError, match=r"train_to_merge\.general: no such file: "):
        load(recipe)


def test_ranks_that_do_not_fit_are_one_line(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="17 \\+ 17 orthogonal directions do not fit 32 inputs: choose smaller ranks"):
        run(words(models, tmp_path / "out", "orthogonal", r=17))
