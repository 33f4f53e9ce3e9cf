"""The command line: what it prints, what it exits with, and that bad input leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from cli_case import merging, outcome, recipe, refusal, save_models
from safetensors.torch import load_file, save_file

from orthoft.cli.merge import parse_param, parse_source


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


# What it answers


@pytest.mark.parametrize("kind", ["methods", "spaces", "outputs", "adapters"])
def test_choices_are_listed_from_the_registries(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    from orthoft.adapters import ADAPTERS
    from orthoft.merging import METHODS, OUTPUTS, SPACES

    registries: dict[str, Mapping[str, object]] = {
        "methods": METHODS,
        "spaces": SPACES,
        "outputs": OUTPUTS,
        "adapters": ADAPTERS,
    }
    assert outcome(kind, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == set(registries[kind])
    assert all(entry["says"] and "``" not in entry["says"] for entry in found.values())
    assert outcome(kind) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line and line[0] != " "][:-1] == list(found)
    assert max(map(len, lines)) <= 118
    for name in found:
        assert outcome(kind, name) == 0
        said = capsys.readouterr().out
        assert said.startswith(name)
        assert all(parameter in said for parameter in found[name].get("parameters", ()))
    assert outcome(kind, "nonsense") == 2
    assert f"error: unknown {kind[:-1]} 'nonsense'" in capsys.readouterr().err


def test_a_method_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome("methods", "ties") == 0
    said = capsys.readouterr().out
    assert "density=0.2, consensus=mean (or weighted_mean, sum)" in said
    assert "s = sign(sum_t y_t)" in said
    assert outcome("methods", "regmean", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told) == ["regmean"]
    assert told["regmean"]["statistics"] == "gram"
    assert told["regmean"]["arxiv"] == ["2212.09849"]
    assert told["regmean"]["parameters"] == {"reduce": 0.9, "ridge": 1e-6}


def test_inspect_tells_an_adapter_and_a_checkpoint(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome("inspect", models / "query", models / "bert", "--json") == 0
    adapter, checkpoint = json.loads(capsys.readouterr().out)
    tensors = load_file(models / "query" / "adapter_model.safetensors")
    assert (adapter["kind"], adapter["type"], adapter["targets"]) == ("adapter", "LORA", ["query"])
    assert adapter["fields"]["r"] == 2
    assert adapter["parameters"] == sum(tensor.numel() for tensor in tensors.values()) == 2 * 2 * 2 * 32
    assert adapter["norm"] == pytest.approx(torch.cat([t.flatten() for t in tensors.values()]).norm().item(), rel=1e-5)
    module = adapter["modules"]["encoder.layer.0.attention.self.query"]
    assert module["shapes"] == {"lora_A.weight": [2, 32], "lora_B.weight": [32, 2]}
    assert (checkpoint["kind"], checkpoint["type"], checkpoint["merged"]) == ("checkpoint", "bert", None)
    assert outcome("inspect", models / "query") == 0
    assert "encoder.layer.1.attention.self.query: 128 parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("runs/a", {"path": "runs/a"}),
        ("law=runs/a:0.5", {"name": "law", "path": "runs/a", "weight": 0.5}),
        ("runs/a:-1e-2", {"path": "runs/a", "weight": -0.01}),
        ("C:\\models", {"path": "C:\\models"}),
    ],
)
def test_a_source_has_a_name_and_a_weight(text: str, parsed: object) -> None:
    assert parse_source(text) == parsed


def test_a_parameter_is_a_yaml_value() -> None:
    assert [parse_param(text) for text in ("density=3e-1", "x=true", "y=sum")] == [
        ("density", 0.3),
        ("x", True),
        ("y", "sum"),
    ]


def test_merge_says_what_it_did(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = merging(models, tmp_path / "m", f"q={models / 'query'}:0.5", models / "value", method="task_arithmetic")
    assert outcome(*command) == 0
    said = capsys.readouterr()
    assert "note: q and value change disjoint sets of weights" in said.out
    assert f"{tmp_path / 'm'}: 4 weights merged by task_arithmetic" in said.out
    name = "encoder.layer.0.attention.self.query"
    lora = load_file(models / "query" / "adapter_model.safetensors")
    B, A = (lora[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "BA")
    base = load_file(models / "bert" / "model.safetensors")[f"{name}.weight"]
    merged = load_file(tmp_path / "m" / "model.safetensors")[f"{name}.weight"]
    assert torch.allclose(merged, base + 0.5 * 4 * B @ A, atol=1e-6)  # the default lora_alpha is 8: a scale of 4


def test_merge_as_a_truncated_lora(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = merging(models, tmp_path / "m", models / "query", models / "value", method="task_arithmetic")
    assert outcome(*command, "--as", "lora", "--rank", "1") == 0
    assert "truncated to rank 1: relative error 0." in capsys.readouterr().out
    assert (tmp_path / "m" / "adapter_config.json").is_file()


def test_convert_says_how_close_the_lora_is(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome("convert", models / "hra", tmp_path / "exact") == 0
    assert capsys.readouterr() == (f"{tmp_path / 'exact'}: a LoRA of 2 weights, rank 3: exact\n", "")
    assert outcome("convert", models / "oftv2", tmp_path / "near", "--to", "lora", "--rank", "4") == 0
    header, *rows, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["layer", "rank", "error"]
    errors = {name: float(error) for name, rank, error in (row.split() for row in rows) if rank == "4"}
    assert set(errors) == {f"encoder.layer.{i}.attention.self.query" for i in (0, 1)}
    assert 0.01 < min(errors.values()) < max(errors.values()) < 1
    worst = max(errors, key=errors.__getitem__)
    assert last.startswith(f"{tmp_path / 'near'}: a LoRA of 2 weights, rank 4: relative error 0.")
    assert last.endswith(f", at most {errors[worst]:.3g} in {worst}")


def test_convert_to_peft_and_back(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome("convert", models / "oftv2", tmp_path / "oft", "--to", "peft") == 0
    assert outcome("convert", tmp_path / "oft", tmp_path / "oftv2", "--to", "orthoft") == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"{tmp_path / 'oft'}: OFT of 2 weights: exact",
        f"{tmp_path / 'oftv2'}: ORTHOFT_OFTV2 of 2 weights: exact",
    ]
    before, after = (load_file(folder / "oftv2" / "adapter_model.safetensors") for folder in (models, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


# What it refuses: one line, exit code 2, nothing written


def test_convert_needs_a_rank_where_there_is_no_exact_lora(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome("convert", models / "oftv2", tmp_path / "out", "--to", "lora") == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"error: {models / 'oftv2'} holds ORTHOFT_OFTV2, which has no exact LoRA form: give the rank"
    )
    assert len(said.splitlines()) == 1
    assert not any(tmp_path.iterdir())
    assert outcome("convert", models / "hra", models / "query", "--to", "lora") == 2
    assert capsys.readouterr().err.startswith(f"error: output folder exists: {models / 'query'}")


def test_a_wrong_key_in_a_recipe(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe(models, tmp_path)
    assert outcome("run", file, "--set", "tasks.1.trainng={}") == 2
    assert capsys.readouterr().err == "error: tasks[1].trainng: unknown key, did you mean 'training'?\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run", "nowhere.yaml"], "error: no such file: {here}/nowhere.yaml"),
        (["run"], "error: Missing argument 'RECIPE' (see orthoft run --help)"),
        (["rum"], "error: No such command 'rum'"),
        (["finetune", "recipe.yaml", "--task", "c"], "error: unknown task 'c'. Choose from: a, b"),
        (
            ["run", "recipe.yaml", "--set", "merge.method=meen"],
            "error: merge: unknown merge method 'meen', did you mean ",
        ),
        (
            ["run", "recipe.yaml", "--set", "tasks.0.adapter.block_size=7"],
            "error: tasks[0].adapter: block_size 7 does not divide the 32 inputs of ",
        ),
        (["run", "recipe.yaml", "--set", "export.lora={}"], "error: export.lora: a rank is needed, the adapters of a "),
        (["inspect", "./nowhere"], "error: model: no folder {here}/nowhere"),
        (
            ["convert", "nowhere", "out", "--to", "dora"],
            "error: Invalid value for '--to': 'dora' is not one of 'lora', ",
        ),
        (["convert", "./nowhere", "out", "--to", "lora"], "error: adapter: no folder {here}/nowhere"),
        (
            ["convert", "nowhere", "out", "--to", "peft", "--rank", "3"],
            "error: --rank is of --to lora and --to gguf, peft has none",
        ),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    line: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe(models, tmp_path)
    assert refusal(capsys, *arguments).startswith(line.format(here=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def edited(models: Path, folder: Path, edit: str) -> Path:
    """Return a copy of the query adapter that is broken in one way."""
    import shutil

    bad = folder / "bad"
    shutil.copytree(models / "query", bad)
    file = bad / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    if edit == "missing":
        file.unlink()
    elif edit == "truncated":
        file.write_bytes(file.read_bytes()[:-40])
    elif edit == "nan":
        tensors[name][0, 0] = float("nan")
        save_file(tensors, file)
    else:
        save_file(tensors | {name: torch.zeros(2, 48)}, file)
    return bad


@pytest.mark.parametrize("edit", ["missing", "truncated", "nan", "another base"])
def test_a_broken_adapter_is_one_line(
    edit: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = edited(models, tmp_path, edit)
    assert "bad" in refusal(capsys, *merging(models, tmp_path / "m", bad))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_an_output_that_exists(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m"
    out.mkdir()
    (out / "mine").write_text("mine", encoding="utf-8")
    assert outcome(*merging(models, out, models / "query")) == 2
    assert capsys.readouterr().err.startswith(f"error: output folder exists: {out}")
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert outcome(*merging(models, out, models / "query"), "--overwrite") == 0
    assert (out / "model.safetensors").is_file()


def test_an_unknown_method(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(*merging(models, tmp_path / "m", models / "query", method="tiess")) == 2
    assert capsys.readouterr().err.startswith("error: unknown merge method 'tiess', did you mean 'ties'? Choose from: ")
    assert not (tmp_path / "m").exists()


def test_a_failure_exits_with_1_and_a_traceback_only_when_asked(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(path: Path) -> None:
        raise RuntimeError("the disk\nis full")

    monkeypatch.setattr("orthoft.recipes.describe.describe", broken)
    assert outcome("inspect", models / "query") == 1
    assert capsys.readouterr().err == "error: RuntimeError: the disk is full\n"
    assert outcome("--debug", "inspect", models / "query") == 1
    assert "Traceback" in capsys.readouterr().err


# Whole commands, as processes


def test_finetune_then_run_by_the_command_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, expert = recipe(models, tmp_path), tmp_path / "out" / "experts" / "b"
    assert outcome("finetune", file, "--task", "b") == 0
    assert capsys.readouterr().out.endswith(f"b: {expert}\n")
    done = subprocess.run([sys.executable, "-m", "orthoft.cli", "run", file], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"  reused {expert}\n" in done.stdout
    assert "gain kept" in done.stdout
    told: dict[str, object] = {}
    exec("\n".join(line.strip() for line in done.stdout.splitlines()[-3:]), told)  # the words that end a run
    assert type(told["model"]).__name__ == "BertModel"


def test_ctrl_c_is_one_line_and_130(models: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "orthoft.cli", "run", recipe(models, tmp_path), "--set"]
    process = subprocess.Popen(
        [*command, "defaults.training.max_steps=100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("a: 256 train")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "error: interrupted\n")
    assert not (tmp_path / "out" / "experts" / "a").exists()
