"""A recipe from words to results: what is refused and how, and the whole story on tiny models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import label_task, save_bert, save_llama, text_task, write_rows
from transformers import TrainingArguments

import orthoft
from orthoft.merging import plan
from orthoft.recipes import RecipeError, load, run
from orthoft.recipes.expert import fingerprint
from orthoft.recipes.export_check import export_check
from orthoft.recipes.finetune import OrthoTrainer
from orthoft.recipes.head import Head, fit_probe, pooled
from orthoft.recipes.kept_scores import KeptScores
from orthoft.recipes.kinds import kind_of
from orthoft.recipes.kinds.probed import Classifier
from orthoft.recipes.models import adapter_config, load_model
from orthoft.recipes.rehearse import adapter_ranks
from orthoft.recipes.shipped import copy
from orthoft.recipes.table import gain_kept, gains, table
from orthoft.recipes.task_schema import Adapter

Words = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_bert(folder / "bert")
    save_llama(folder / "llama")
    label_task(folder / "a", 0, seed=0)
    label_task(folder / "b", 2, seed=1)
    text_task(folder / "up", 1, seed=0)
    text_task(folder / "skip", 5, seed=1)
    return folder


def files(folder: Path) -> dict[str, str]:
    return {split: str(folder / f"{split}.jsonl") for split in ("train", "tuning", "test")}


def classification(models: Path, out: Path, **training: Any) -> Words:
    return {
        "name": "tiny",
        "base": str(models / "bert"),
        "output": str(out),
        "defaults": {
            "kind": "classification",
            "max_length": 16,
            "adapter": {"target_modules": "all-linear", "exclude_modules": ["pooler.dense"]},
            "training": {"max_steps": 150, "per_device_train_batch_size": 16, "learning_rate": 3e-3} | training,
        },
        "tasks": [
            {"name": "a", "adapter": {"type": "oftv2", "block_size": 8}, "data": files(models / "a")},
            {
                "name": "b",
                "adapter": {"type": "hra", "r": 4},
                "training": {"learning_rate": 1e-2},
                "data": files(models / "b"),
            },
        ],
        "evaluate": {"cross": True},
        "merge": {"method": "opcm", "params": {"alpha": 0.5}},
    }


@pytest.fixture(scope="module")
def told(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Words, Path, list[str]]:
    """One whole run: its results, its folder, and what it said."""
    out, lines = tmp_path_factory.mktemp("runs") / "tiny", list[str]()
    return run(classification(models, out), say=lines.append), out, lines


# What is refused, before anything is written


def change(place: str, value: Any) -> Callable[[Words], None]:
    def edit(words: Words) -> None:
        *parts, last = place.split(".")
        node: Any = words
        for part in parts:
            node = node[int(part)] if isinstance(node, list) else node[part]
        node[last] = value

    return edit


MISTAKES = [
    ("tasks.1.trainng", {}, "tasks[1].trainng: unknown key, did you mean 'training'?"),
    ("outptu", "x", "outptu: unknown key, did you mean 'output'?"),
    (
        "defaults.training.max_stepz",
        3,
        "defaults.training.max_stepz: unknown key, did you mean 'max_steps'?",
    ),
    ("tasks.0.training", {"zzzzzz": 1}, "tasks[0].training.zzzzzz: unknown key, it is none of the "),
    ("tasks.0.training", {"max_steps": "many"}, "tasks[0].training.max_steps: expected a valid integer, got 'many'"),
    ("tasks.0.max_length", "long", "tasks[0].max_length: expected a valid integer, got 'long'"),
    ("tasks.0.max_length", True, "tasks[0].max_length: expected a valid integer, got True"),
    (
        "tasks.0.kind",
        "clasification",
        "tasks[0]: unknown kind 'clasification', did you mean 'classification'? Choose from: classification, causal-lm",
    ),
    (
        "tasks.0.block_size",
        8,
        "tasks[0].block_size: unknown key, known are name, kind, adapter, expert, data, training, ",
    ),
    ("merge.weights", [1.0], "merge.weights has 1 numbers for 2 tasks"),
    ("merge.weights", ["a", 1.0], "merge.weights[0]: expected a valid number, got 'a'"),
    ("tasks.1.name", "a", "two tasks have the name 'a'"),
    ("tasks.1.name", "base", "a task cannot be called 'base', which is a row of the table"),
    ("defaults", 3, "defaults: expected a mapping, got 3"),
    ("output", "$NO_SUCH_VARIABLE/x", "output: the environment variable $NO_SUCH_VARIABLE is not set"),
    ("export", {"dtype": "float8"}, "export.dtype: expected 'float32', 'bfloat16' or 'float16', got 'float8'"),
]


@pytest.mark.parametrize(("place", "value", "line"), MISTAKES, ids=[line for *_, line in MISTAKES])
def test_a_mistake_in_the_words_is_one_line(place: str, value: Any, line: str, models: Path, tmp_path: Path) -> None:
    words = classification(models, tmp_path / "out")
    change(place, value)(words)
    with pytest.raises(RecipeError) as error:
        load(words)
    assert str(error.value).startswith(line)
    assert len(str(error.value).splitlines()) == 1


def test_several_mistakes_are_several_lines(models: Path, tmp_path: Path) -> None:
    words = classification(models, tmp_path / "out")
    del words["base"]
    change("tasks.0.nmae", "x")(words)
    change("seed", 1.5)(words)
    with pytest.raises(RecipeError) as error:
        load(words)
    assert str(error.value).splitlines() == [
        "base: missing",
        "seed: expected a valid integer, got 1.5",
        "tasks[0].nmae: unknown key, did you mean 'name'?",
    ]


def test_missing_files_say_where_it_looked(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = classification(models, tmp_path / "out")
    words["base"] = "./nowhere"
    words["tasks"][1]["data"]["test"] = "data/test.jsonl"
    with pytest.raises(FileNotFoundError) as error:
        load(words)
    assert str(error.value).splitlines() == [
        f"base: no such folder: {tmp_path / 'nowhere'}",
        f"tasks[1].data.test: no such file: {tmp_path / 'data/test.jsonl'}",
    ]
    with pytest.raises(FileNotFoundError) as error:
        load(classification(models, tmp_path / "out") | {"base": str(models / "a")})
    assert str(error.value) == f"base: no config.json in {models / 'a'}, so it is no model"


REGISTRIES = [
    ("tasks.0.adapter.type", "oftv3", "tasks[0].adapter: unknown adapter type 'oftv3', did you mean 'oftv2'?"),
    (
        "tasks.0.adapter.blocksize",
        3,
        "tasks[0].adapter: unknown field of adapter 'oftv2' 'blocksize', did you mean 'block_size'?",
    ),
    ("tasks.1.adapter.type", "ia3", "tasks[1].adapter: unknown field of adapter 'ia3' 'r'"),
    ("tasks.0.adapter", {"type": "loha"}, "tasks[0].adapter: type 'loha' cannot be merged, only "),
    ("tasks.0.training", {"optim": "adamww"}, "tasks[0].training: adamww is not a valid OptimizerNames"),
    ("merge.method", "tiess", "merge: unknown merge method 'tiess', did you mean 'ties'?"),
    ("merge.space", "ful", "merge: unknown space 'ful', did you mean 'full'?"),
    ("merge.params", {"alhpa": 1}, "merge: unknown parameter of method 'opcm' 'alhpa', did you mean 'alpha'?"),
    (
        "tasks.0.adapter.block_size",
        7,
        "tasks[0].adapter: block_size 7 does not divide the 32 inputs of 'encoder.layer.0.attention.self.query': ",
    ),
    ("tasks.1.adapter.target_modules", ["qury"], "tasks[1].adapter: No modules were targeted for adaptation"),
    ("tasks.1.adapter.r", 5, "tasks[1].adapter: r must be even to start at the identity"),
    ("tasks.1.adapter.r", 34, "tasks[1].adapter: r = 34 reflections do not fit the 32 inputs of "),
    (
        "tasks.0.adapter",
        {"type": "lora", "init_lora_weights": "pissa"},
        "tasks[0].adapter: it uses init_lora_weights='pissa', which no change of its weights can represent",
    ),
    (
        "merge.space",
        "core",
        "merge: encoder.layer.0.attention.self.query: space 'core' needs low-rank factors, which not all sources have",
    ),
    (
        "export",
        {"lora": {}},
        "export.lora: a rank is needed, the adapters of a have no low-rank factors: set export.lora.rank",
    ),
]


@pytest.mark.parametrize(("place", "value", "line"), REGISTRIES, ids=[line for *_, line in REGISTRIES])
def test_what_the_libraries_refuse_is_told_before_any_work(
    place: str, value: Any, line: str, models: Path, tmp_path: Path
) -> None:
    words = classification(models, tmp_path / "out")
    change(place, value)(words)
    with pytest.raises(RecipeError) as error:
        run(words)
    assert str(error.value).startswith(line)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_words_are_checked_without_torch(models: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(classification(models, tmp_path / "out")), encoding="utf-8")
    code = (
        "import sys; from orthoft.recipes import load; "
        f"load({str(recipe)!r}); print(*{{'torch', 'transformers', 'peft'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("command", ["run", "finetune", "search", "statistics"])
def test_a_command_tells_a_mistake_without_torch(command: str, models: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(classification(models, tmp_path / "out") | {"sede": 1}), encoding="utf-8")
    code = (
        "import atexit, sys; from orthoft.cli import main; "
        "atexit.register(lambda: print(*{'torch', 'transformers', 'peft'} & set(sys.modules))); "
        f"main([{command!r}, {str(recipe)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (2, "")
    assert done.stderr.strip() == "error: sede: unknown key, did you mean 'seed'?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nname: y\n", ":2:1: 'name' is given twice"),
        ("tasks: [\n", ":2:1: expected the node content, but found '<stream end>'"),
        ("- a\n", ": expected a mapping of keys, got list"),
    ],
)
def test_a_text_that_is_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        load(file)
    assert str(error.value) == f"{file}{message}"


# Overrides, defaults, variables


def test_overrides_reach_into_lists_and_read_numbers(models: Path, tmp_path: Path) -> None:
    words = classification(models, tmp_path / "out")
    recipe = load(words, ["tasks.1.training.learning_rate=3e-4", "merge.weights=[1, 0.5]", "tasks.0.name=first"])
    assert recipe.tasks[1].training["learning_rate"] == 3e-4
    assert recipe.tasks[1].training["max_steps"] == 150  # from the defaults
    assert recipe.tasks[0].training["learning_rate"] == 3e-3
    assert recipe.tasks[0].name == "first"
    assert recipe.merge is not None
    assert recipe.merge.all_weights(2) == [1, 0.5]
    assert words["tasks"][1]["training"] == {"learning_rate": 1e-2}  # what was handed over is not changed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks.2.name=x", "--set tasks.2.name=x: '2' is not one of 0 to 1"),
        ("name.x=1", "--set name.x=1: there is 'tiny' where 'x' should be a key"),
        ("name", "--set takes place=value as in tasks.0.training.max_steps=5, got 'name'"),
    ],
)
def test_an_override_that_leads_nowhere(override: str, message: str, models: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load(classification(models, tmp_path / "out"), [override])
    assert str(error.value) == message


def test_variables_are_replaced_in_paths(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", str(models))
    monkeypatch.setenv("HOME", str(tmp_path))
    words = classification(models, tmp_path / "out") | {"base": "$MODELS/bert", "output": "~/out"}
    recipe = load(words)
    assert (recipe.base, recipe.output) == (str(models / "bert"), str(tmp_path / "out"))


def test_one_weight_stands_for_all_tasks(models: Path, tmp_path: Path) -> None:
    recipe = load(classification(models, tmp_path / "out"), ["merge.weights=0.3"])
    assert recipe.merge is not None
    assert recipe.merge.all_weights(2) == [0.3, 0.3]


def test_our_name_wins_and_pefts_can_be_forced() -> None:
    ours = adapter_config(Adapter(type="hra", r=4), "classification")
    theirs = adapter_config(Adapter(type="peft.hra", r=4), "causal-lm")
    assert (ours.peft_type, theirs.peft_type) == ("ORTHOFT_HRA", "HRA")
    assert (ours.task_type, theirs.task_type) == (None, "CAUSAL_LM")


# The parts


def test_the_probe_solves_what_is_linear_and_folds_the_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator) * torch.tensor([1.0, 10, 0.1, 1, 1, 1]) + 5
    y = (x[:, 1] - 5 > 0).long()
    head = fit_probe((x[:300], y[:300]), (x[300:], y[300:]), ["no", "yes"], {})
    assert (head.logits(x[300:]).argmax(-1) == y[300:]).float().mean() > 0.97
    again = fit_probe((x[:300], y[:300]), (x[300:], y[300:]), ["no", "yes"], {})
    assert torch.equal(head.weight, again.weight)


def test_pooling_leaves_padding_out() -> None:
    hidden = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected = torch.stack([hidden[0, :2].mean(0), hidden[1].mean(0)])
    assert torch.allclose(pooled(hidden, mask), expected, atol=1e-6)


def test_gain_kept_has_the_same_sign_for_scores_and_losses() -> None:
    assert gain_kept(0.5, 0.7, 0.6, higher_is_better=True) == pytest.approx(0.5)
    assert gain_kept(3.0, 2.0, 2.5, higher_is_better=False) == pytest.approx(0.5)
    assert gain_kept(3.0, 2.0, 3.5, higher_is_better=False) == pytest.approx(-0.5)
    assert gain_kept(0.5, 0.4, 0.6, higher_is_better=True) is None
    assert gain_kept(2.0, 2.0, 1.0, higher_is_better=False) is None


def test_the_table_shows_gains_and_gaps() -> None:
    rows = {"base": (0.5, 0.6), "x": (0.7, None), "y": (None, 0.55), "merge": (0.6, 0.6)}
    scores = {
        name: {task: {"accuracy": v} for task, v in zip("xy", values, strict=True) if v is not None}
        for name, values in rows.items()
    }
    assert gains(scores, {"x": "accuracy", "y": "accuracy"}) == {
        "x": pytest.approx(0.5),
        "y": None,
        "mean": pytest.approx(0.5),
    }
    assert table(scores, {"x": "accuracy", "y": "accuracy"}).splitlines() == [
        "accuracy %     x     y  mean",
        "----------------------------",
        "base        50.0  60.0  55.0",
        "x           70.0     -     -",
        "y              -  55.0     -",
        "merge       60.0  60.0  60.0",
        "gain kept    50%     -   50%",
    ]


def test_gains_of_several_metrics_are_not_added_up() -> None:
    metrics = {"x": "accuracy", "y": "loss", "z": "accuracy"}
    rows = {"base": (0.5, 3.0, 0.5), "x": (0.7,) * 3, "y": (0, 2.0, 0), "z": (0.6,) * 3, "merge": (0.65, 2.8, 0.5)}
    scores = {
        name: {task: {metrics[task]: value} for task, value in zip("xyz", values, strict=True)}
        for name, values in rows.items()
    }
    kept = gains(scores, metrics)
    assert [kept[task] for task in "xyz"] == [pytest.approx(0.75), pytest.approx(0.2), pytest.approx(0)]
    assert kept["mean"] == pytest.approx((2 * 0.15 / 0.3 + 0.2) / 3)
    worse = scores | {"x": scores["base"], "z": scores["base"]}
    assert gains(worse, metrics)["mean"] == pytest.approx(0.2)


def test_the_penalty_of_the_adapters_is_in_the_loss(models: Path, tmp_path: Path) -> None:
    def expert(weight: float) -> Classifier:
        torch.manual_seed(0)
        adapter = Adapter(type="hra", r=4, target_modules=["query"], orthogonality_weight=weight)
        encoder = load_model("classification", models / "bert", None).eval()
        head = Head(torch.randn(2, 32), torch.zeros(2), ["low", "high"], {}, 0.0)
        task = load(classification(models, tmp_path / "out")).tasks[0]
        model = peft.get_peft_model(encoder, adapter_config(adapter, "classification"))
        return Classifier(kind_of(task, models / "bert"), model, head)

    def loss(model: Classifier) -> float:
        trainer = OrthoTrainer(model, TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True))
        ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1])}
        value: torch.Tensor = trainer.compute_loss(trainer.model.eval(), batch)
        return value.item()

    added = loss(expert(0.5)) - loss(expert(0.0))
    penalty = orthoft.penalty(expert(0.5))
    assert penalty is not None
    assert penalty.item() > 2 * 0.5 * 4 - 1e-4  # in each of two layers, four ones off the diagonal: u starts in pairs
    assert added == pytest.approx(penalty.item(), rel=1e-4)


# The whole story


def test_every_expert_beats_the_base_and_the_merge_keeps_some_of_it(told: tuple[Words, Path, list[str]]) -> None:
    results, _, _ = told
    for task in ("a", "b"):
        base, expert = (results["scores"][row][task] for row in ("base", task))
        assert expert["accuracy"] > base["accuracy"] + 0.1
        assert expert["loss"] < base["loss"]
    assert results["gain_kept"]["merge"]["mean"] > 0.2
    assert set(results["scores"]["a"]) == {"a", "b"}


def test_the_results_are_written_and_told(told: tuple[Words, Path, list[str]]) -> None:
    results, out, lines = told
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == results
    assert {path.name for path in out.iterdir()} == {"experts", "heads", "merged", "recipe.yaml", "results.json"}
    assert {path.name for path in (out / "experts").iterdir()} == {"a", "b"}
    assert f'    model = AutoModel.from_pretrained("{out / "merged"}")' in lines[-1].splitlines()
    assert any("gain kept" in line for line in lines)
    assert load(out / "recipe.yaml").model_dump(mode="json") == results["recipe"]
    assert results["export_check"] < 1e-6


STRANGER = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer
out, task, data = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
model = AutoModel.from_pretrained(out / "merged").eval()
tokenizer = AutoTokenizer.from_pretrained(out / "merged")
head = load_file(out / "heads" / f"{task}.safetensors")
words = json.loads((out / "heads" / f"{task}.json").read_text())
rows = [json.loads(line) for line in open(data)]
texts = [row["text"] for row in rows]
batch = tokenizer(texts, padding=True, truncation=True, max_length=words["features"]["max_length"], return_tensors="pt")
with torch.no_grad():
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
mask = batch["attention_mask"][..., None]
logits = (hidden * mask).sum(1) / mask.sum(1) @ head["weight"].T + head["bias"]
named = [words["classes"][i] for i in logits.argmax(-1)]
assert "orthoft" not in sys.modules and "peft" not in sys.modules
print(sum(n == r["label"] for n, r in zip(named, rows)) / len(rows))
"""


def test_a_stranger_gets_the_same_score_from_the_export(told: tuple[Words, Path, list[str]], models: Path) -> None:
    results, out, _ = told
    command = [sys.executable, "-c", STRANGER, str(out), "a", str(models / "a" / "test.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(results["scores"]["merge"]["a"]["accuracy"])


def test_the_rehearsal_knows_what_the_merge_finds_on_disk(told: tuple[Words, Path, list[str]], models: Path) -> None:
    _, out, _ = told
    for task in load(classification(models, out)).tasks:
        (source,) = plan(models / "bert", [out / "experts" / task.name], method="mean").sources
        found = {name.removesuffix(".weight"): rank for name, rank in source.ranks.items()}
        assert adapter_ranks(task, models / "bert", to_merge=True) == found
        assert set(found.values()) == {None if task.name == "a" else 4}


def test_a_finished_run_is_not_touched(told: tuple[Words, Path, list[str]], models: Path) -> None:
    _, out, _ = told
    before = (out / "results.json").stat().st_mtime_ns
    with pytest.raises(
        FileExistsError, match="holds a finished run: `orthoft run` with --keep-experts merges anew, --overwrite"
    ):
        run(classification(models, out))
    assert (out / "results.json").stat().st_mtime_ns == before


def test_a_folder_of_something_else_is_never_overwritten(models: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear reader", encoding="utf-8")
    with pytest.raises(FileExistsError, match="is not a run of a recipe"):
        run(classification(models, tmp_path), overwrite=True)
    assert (tmp_path / "thesis.tex").read_text(encoding="utf-8") == "dear reader"


def test_a_run_goes_on_where_it_stopped(models: Path, tmp_path: Path) -> None:
    out, lines = tmp_path / "out", list[str]()
    words = classification(models, out, max_steps=3)
    done = run(words, until="finetune", tasks=["a"])
    assert list(done["experts"]) == ["a"]
    assert not (out / "experts" / "b").exists()
    written = (out / "experts" / "a" / "adapter_model.safetensors").stat().st_mtime_ns
    results = run(words | {"merge": {"method": "mean"}}, say=lines.append)  # another merge of the same training
    assert f"  reused {out / 'experts' / 'a'}" in lines
    assert (out / "experts" / "a" / "adapter_model.safetensors").stat().st_mtime_ns == written
    assert set(results["scores"]) == {"base", "a", "b", "merge"}
    again = run(words, overwrite=True)
    assert (out / "experts" / "a" / "adapter_model.safetensors").stat().st_mtime_ns > written
    assert again["scores"]["a"] == results["scores"]["a"]  # the same seed, the same expert


def test_a_finished_run_merges_anew_and_trains_what_changed(models: Path, tmp_path: Path) -> None:
    out, lines = tmp_path / "out", list[str]()
    words = classification(models, out, max_steps=2)
    first = run(words)
    (out / "merged" / "stale.txt").touch()
    words["merge"] = {"method": "mean"}
    words["tasks"][1]["training"] = {"max_steps": 3}
    again = run(words, keep_experts=True, say=lines.append)
    assert [line for line in lines if "reused" in line] == [f"  reused {out / 'experts' / 'a'}"]
    assert (first["experts"]["b"]["steps"], again["experts"]["b"]["steps"]) == (2, 3)
    assert again["merge"]["method"] == "mean"
    assert not (out / "merged" / "stale.txt").exists()
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == again
    with pytest.raises(ValueError, match="give one of them"):
        run(words, keep_experts=True, overwrite=True)


def test_a_chosen_expert_is_trained_again_and_the_others_stay(models: Path, tmp_path: Path) -> None:
    out, lines = tmp_path / "out", list[str]()
    words = classification(models, out, max_steps=2)
    run(words)
    for folder in ("statistics", "search"):
        (out / folder).mkdir()
    for file in ("statistics/a-gram.safetensors", "statistics/b-gram.safetensors", "search/search.journal"):
        (out / file).touch()
    written = {name: (out / "experts" / name / "adapter_model.safetensors").stat().st_mtime_ns for name in ("a", "b")}
    run(words, until="finetune", tasks=["a"], overwrite=True, say=lines.append)
    again = {name: (out / "experts" / name / "adapter_model.safetensors").stat().st_mtime_ns for name in ("a", "b")}
    assert again["a"] > written["a"]
    assert again["b"] == written["b"]
    assert not any("reused" in line for line in lines)
    assert {file.name for file in (out / "heads").iterdir()} == {
        f"{name}.{kind}" for name in ("a", "b") for kind in ("safetensors", "json")
    }
    assert {file.name for file in (out / "statistics").iterdir()} == {"b-gram.safetensors"}
    assert (out / "search" / "search.journal").is_file()
    assert not (out / "results.json").exists()  # of an expert that is no more
    lines.clear()
    run(words, say=lines.append)
    assert sum("reused" in line for line in lines) == 2


def test_a_changed_task_of_an_unfinished_run_leaves_the_other_experts(models: Path, tmp_path: Path) -> None:
    words, lines = classification(models, tmp_path / "out", max_steps=2), list[str]()
    run(words, until="finetune")
    words["tasks"][0]["training"] = {"max_steps": 3}
    with pytest.raises(FileExistsError, match="another recipe: --keep-experts trains only what changed, --overwrite"):
        run(words, until="finetune")
    told = run(words, until="finetune", keep_experts=True, say=lines.append)
    assert [line for line in lines if "reused" in line] == [f"  reused {tmp_path / 'out' / 'experts' / 'b'}"]
    assert told["experts"]["a"]["steps"] == 3


# Scores of a run that was broken off


class Broken(RuntimeError):
    """What stops a run midway."""


def broken_off_at(count: int, words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a recipe up to a model that it loads to score it, at which it breaks."""
    left = count

    def load(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Broken
        return load_model(*args)

    with monkeypatch.context() as patch:
        patch.setattr("orthoft.recipes.evaluation.load_model", load)
        with pytest.raises(Broken):
            run(words, keep_experts=True)


def test_scores_outlive_a_run_that_is_broken_off(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = language(models, tmp_path / "out")
    words["defaults"]["training"]["max_steps"] = 2
    whole, lines = run(words), list[str]()
    broken_off_at(2, words, monkeypatch)
    assert (tmp_path / "out" / "results.json").exists()  # nothing was made: what was to be replaced is there again
    broken_off_at(2, words, monkeypatch)  # base and the first expert are known: it comes to the merged LoRA
    assert not (tmp_path / "out" / "results.json").exists()
    again = run(words, say=lines.append)
    assert [line for line in lines if "taken up" in line] == [
        f"  {row}: scores taken up" for row in ("base", "up", "skip")
    ]
    assert again["scores"] == whole["scores"]
    assert again["samples"] == whole["samples"]
    assert not (tmp_path / "out" / "scores.json").exists()


def test_scores_of_a_changed_expert_are_not_taken_up(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, lines = language(models, tmp_path / "out"), list[str]()
    words["defaults"]["training"]["max_steps"] = 2
    whole = run(words)
    broken_off_at(3, words, monkeypatch)
    assert len(json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))) == 4
    words["tasks"][0]["training"] = {"max_steps": 3}
    results = run(words, keep_experts=True, say=lines.append)
    assert not any("taken up" in line for line in lines)
    assert results["scores"]["up"] != whole["scores"]["up"]


def test_scores_are_kept_by_all_that_they_depend_on(tmp_path: Path) -> None:
    kept, told = KeptScores(tmp_path / "scores.json", [32]), {"scores": {"loss": 0.1}, "sample": None}
    kept.add(told, "up", "mark", "data")
    assert KeptScores(tmp_path / "scores.json", [32]).find("up", "mark", "data") == told
    assert kept.find("up", "another", "data") is None
    assert KeptScores(tmp_path / "scores.json", [16]).find("up", "mark", "data") is None
    kept.forget()
    assert kept.find("up", "mark", "data") is None


@pytest.mark.parametrize("killed", [False, True])
def test_an_expert_whose_training_was_begun_anew_is_not_the_old_one(
    killed: bool, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head changes first: it is not that of the expert before, which comes back with its own, if at all."""
    out = tmp_path / "out"
    words = classification(models, out, max_steps=2)
    scores = run(words)["scores"]
    (out / "statistics").mkdir()
    for name in ("a-gram", "a-b-gram", "b-gram"):  # one of a task that is called a-b
        (out / "statistics" / f"{name}.safetensors").touch()
    changed = classification(models, out, max_steps=2)
    changed["tasks"][0]["max_length"] = 3

    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr("orthoft.recipes.experts.train", stopped)
        if killed:  # nobody gives back what was set aside
            stopping.setattr("orthoft.recipes.output._give_back", lambda *args: None)
        with pytest.raises(KeyboardInterrupt):
            run(changed, keep_experts=True)
    lines = list[str]()
    assert run(words, keep_experts=True, say=lines.append)["scores"] == scores
    kept = "b" if killed else "ab"
    assert [line for line in lines if "reused" in line] == [f"  reused {out / 'experts' / name}" for name in kept]
    left = {"a-b-gram", "b-gram"} if killed else {"a-gram", "a-b-gram", "b-gram"}
    assert {file.stem for file in (out / "statistics").iterdir()} == left


def test_another_base_under_the_same_name_trains_the_experts_again(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "bert", tmp_path / "bert")
    words = classification(models, tmp_path / "out", max_steps=2) | {"base": str(tmp_path / "bert")}
    recipe = load(words)
    before = [fingerprint(recipe, task, tmp_path / "bert") for task in recipe.tasks]
    assert before == [fingerprint(recipe, task, tmp_path / "bert") for task in recipe.tasks]
    file = tmp_path / "bert" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    after = [fingerprint(recipe, task, tmp_path / "bert") for task in recipe.tasks]
    assert not set(before) & set(after)


def test_an_unfinished_run_of_another_recipe_is_refused(models: Path, tmp_path: Path) -> None:
    run(classification(models, tmp_path / "out", max_steps=2), until="finetune", tasks=["a"])
    with pytest.raises(FileExistsError, match="holds a run of another recipe"):
        run(classification(models, tmp_path / "out", max_steps=3))


def test_changed_data_train_the_expert_again(models: Path, tmp_path: Path) -> None:
    words, lines = classification(models, tmp_path / "out", max_steps=2), list[str]()
    words["tasks"] = words["tasks"][:1]
    words["tasks"][0]["data"] = label_task(tmp_path / "mine", 0, seed=3)
    run(words, until="finetune")
    label_task(tmp_path / "mine", 0, seed=4)
    run(words, until="finetune", say=lines.append)
    assert not any("reused" in line for line in lines)


def test_an_export_that_is_not_base_plus_delta_is_noticed(told: tuple[Words, Path, list[str]], models: Path) -> None:
    results, out, _ = told
    norms = {weight["name"]: weight["norm"] for weight in results["merge"]["merged"]}
    assert export_check(models / "bert", out / "merged", norms) == results["export_check"]
    name = next(iter(norms))
    with pytest.raises(RuntimeError, match="changed by"):
        export_check(models / "bert", out / "merged", norms | {name: norms[name] * 1.01 + 0.01})


def language(models: Path, out: Path) -> Words:
    return {
        "name": "tongues",
        "base": str(models / "llama"),
        "output": str(out),
        "defaults": {
            "kind": "causal-lm",
            "block_size": 16,
            "prompt": "w0 w1",
            "new_tokens": 4,
            "adapter": {"type": "hra", "r": 4, "target_modules": "all-linear"},
            "training": {"max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": 3e-2},
        },
        "tasks": [
            {"name": "up", "data": files(models / "up")},
            {"name": "skip", "data": files(models / "skip")},
        ],
        "merge": {"method": "task_arithmetic", "weights": 0.7},
        "export": {"lora": {}},
    }


def test_a_language_model_from_words_to_lora(models: Path, tmp_path: Path) -> None:
    results = run(language(models, tmp_path / "out"))
    scores = results["scores"]
    for task in ("up", "skip"):
        assert scores[task][task]["loss"] < scores["base"][task]["loss"] - 0.3
        assert scores["merge"][task]["loss"] < scores["base"][task]["loss"]
        assert scores["merge-lora"][task]["loss"] == pytest.approx(scores["merge"][task]["loss"], rel=1e-4)
        assert set(results["samples"][task]) == {"base", task, "merge"}
    assert results["gain_kept"]["merge"]["mean"] > 0


def test_a_block_is_filled_or_refused(models: Path, tmp_path: Path) -> None:
    task = load(language(models, tmp_path / "out")).tasks[0]
    data = kind_of(task, models / "llama").data(seed=0)
    assert {len(example["input_ids"]) for example in data.train} == {16}
    assert len(data.train) == 40 * 21 // 16  # twenty words and an end for each of forty texts
    with pytest.raises(ValueError, match="up train: 840 tokens do not fill one block of 4096; lower block_size"):
        kind_of(task.model_copy(update={"block_size": 4096}), models / "llama").data(seed=0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"txt": "w0", "label": "low"}], "a train: a row has no 'text', its columns are txt, label"),
        ([{"text": "w0", "label": "low"}], "classification needs two classes, the train split has only 'low'"),
        ([], "no rows"),
    ],
)
def test_data_that_cannot_be_used_cost_nothing(rows: list[Words], message: str, models: Path, tmp_path: Path) -> None:
    words = classification(models, tmp_path / "out")
    words["tasks"][0]["data"] = files(models / "a") | {"train": write_rows(tmp_path / "bad.jsonl", rows)}
    with pytest.raises(ValueError, match=message):
        run(words)
    assert not (tmp_path / "out").exists()


def test_csv_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    from orthoft.recipes.data import read_file

    datasets = pytest.importorskip("datasets")
    rows = [{"text": "a, b", "label": "x"}, {"text": 'c "d"', "label": "y"}]
    table = datasets.Dataset.from_list(rows)
    table.to_csv(tmp_path / "rows.csv", index=False)
    table.to_parquet(tmp_path / "rows.parquet")
    write_rows(tmp_path / "rows.jsonl", rows)
    assert [read_file(tmp_path / f"rows.{kind}") for kind in ("csv", "parquet", "jsonl")] == [rows] * 3
    with pytest.raises(ValueError, match=r"expected a file named \.jsonl, \.csv or \.parquet"):
        read_file(tmp_path / "rows.txt")


@pytest.mark.parametrize("how", ["ddp-cpu", "deepspeed"])
def test_two_processes_train_together_and_one_writes(how: str, models: Path, tmp_path: Path) -> None:
    if how == "deepspeed":
        pytest.importorskip("deepspeed")
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    words = classification(models, out, max_steps=3)
    encoder = load_model("classification", models / "bert", None)
    hra = adapter_config(Adapter(type="hra", r=4, target_modules=["query"]), "classification")
    peft.get_peft_model(encoder, hra).save_pretrained(tmp_path / "elsewhere")
    words["tasks"][1]["expert"] = str(tmp_path / "elsewhere")  # which one process copies, and both wait for
    recipe.write_text(yaml.safe_dump(words), encoding="utf-8")
    config = copy(how, tmp_path)
    config.write_text(config.read_text(encoding="utf-8").replace("use_cpu: false", "use_cpu: true"), encoding="utf-8")
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "-m", "orthoft.cli", "run"]
    command = [sys.executable, *launch, str(recipe), "--device", "cpu"]
    variables = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["experts"]["a"]["processes"] == 2
    assert results["experts"]["b"]["taken_from"] == str(tmp_path / "elsewhere")
    assert done.stdout.count("merged model:") == 1
