"""What a recipe, its YAML and its data get wrong: one line that says where, before any work."""

from __future__ import annotations

import csv
import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
from safetensors.torch import load_file, save_file
from tiny import WORDS, label_task, save_bert, write_rows
from transformers import AutoModel
from typer.testing import CliRunner

from orthoft.cli import app
from orthoft.merging import METHODS, SPACES, merge, plan
from orthoft.merging.wish import wish_for
from orthoft.recipes import RecipeError, load, run
from orthoft.recipes.data import read_file, read_splits
from orthoft.recipes.data_schema import TextData
from orthoft.recipes.finetune import training_arguments
from orthoft.recipes.load import MANY, overridden, read_yaml
from orthoft.recipes.merge_job import MergeJob, load_job
from orthoft.recipes.models import adapter_config
from orthoft.recipes.rehearse import merge_mistakes, rehearse, saved_by
from orthoft.recipes.schema import OF_MERGE, Merge, MergeWords
from orthoft.recipes.strict import keys_of, shown

Words = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_bert(folder / "bert")
    label_task(folder / "a", 0, seed=0)
    return folder


def recipe(models: Path, out: Path, training: Words | None = None, **more: Any) -> Words:
    data = {split: str(models / "a" / f"{split}.jsonl") for split in ("train", "tuning", "test")}
    adapter = {"type": "lora", "r": 4, "target_modules": ["query", "value"]}
    task = {"name": "a", "kind": "classification", "max_length": 16, "adapter": adapter, "data": data}
    task["training"] = {"max_steps": 2} | (training or {})
    return {"name": "tiny", "base": str(models / "bert"), "output": str(out), "device": "cpu", "tasks": [task]} | more


# Data


LATIN = 'text,label\nw0,x\n"caf\xe9",y\n'.encode("latin-1")
FILES = [
    ("a.csv", LATIN, r"a\.csv:3: not UTF-8 \(byte 0xe9\): save it as a text in UTF-8$"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', r"a\.jsonl:2: not UTF-8 \(byte 0xe9\)"),
    ("a.jsonl", b"\x00\x01\xff\x80" * 9, r"a\.jsonl:1: not UTF-8 \(byte 0xff\)"),
    ("a.jsonl", b'{"a": 1}\n' + b"[" * 100_000, r"a\.jsonl:2: its lists and objects are nested too deeply$"),
    ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}", r"a\.jsonl:1: a whole number has too many digits$"),
    ("a.parquet", b"no such thing", r"a\.parquet: cannot be read as Parquet \("),
]


@pytest.mark.parametrize(("name", "content", "line"), FILES, ids=[line for *_, line in FILES])
def test_a_file_that_cannot_be_read_is_named(name: str, content: bytes, line: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=line) as error:
        read_file(tmp_path / name)
    assert len(str(error.value).splitlines()) == 1
    assert not isinstance(error.value, UnicodeError)


def test_a_field_of_csv_is_as_long_as_a_text(tmp_path: Path) -> None:
    before, text = csv.field_size_limit(), "w0 " * 60_000
    (tmp_path / "a.csv").write_text(f"text,label\n{text},x\n", encoding="utf-8")
    assert read_file(tmp_path / "a.csv") == [{"text": text, "label": "x"}]
    assert csv.field_size_limit() == before


def test_csv_that_breaks_off_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orthoft.recipes.data.LONGEST", 10)
    (tmp_path / "a.csv").write_text(f"text\nw0\n{'w0' * 9}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.csv:3: not CSV \("):
        read_file(tmp_path / "a.csv")


def told(rows: Sequence[Words], models: Path, tmp_path: Path, **data: Any) -> str:
    words = recipe(models, tmp_path / "out")
    words["tasks"][0]["data"] |= {"train": write_rows(tmp_path / "bad.jsonl", list(rows))} | data
    with pytest.raises(ValueError) as error:  # noqa: PT011
        run(words)
    assert not (tmp_path / "out").exists()
    return str(error.value)


@pytest.mark.parametrize("column", ["text", "label"])
def test_half_a_character_is_told_with_its_row(column: str, models: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{word} w1", "label": "xy"[i % 2]} for i, word in enumerate(WORDS)]
    rows[6] |= {column: "w1 \ud83d w2"}
    where = f"({tmp_path / 'bad.jsonl'}, row 7)"
    assert told(rows, models, tmp_path) == (
        f"a train: {column!r} has \\ud83d, half of a character, which is no text {where}"
    )


def test_a_row_that_lacks_a_column_is_told_with_its_number(models: Path, tmp_path: Path) -> None:
    rows: list[Words] = [{"text": word, "label": "xy"[i % 2]} for i, word in enumerate(WORDS)]
    del rows[4]["label"]
    assert told(rows, models, tmp_path) == (
        f"a train: a row has no 'label', its columns are text ({tmp_path / 'bad.jsonl'}, row 5)"
    )


def test_one_row_is_too_few_for_two_splits(models: Path, tmp_path: Path) -> None:
    line = told([{"text": "w1", "label": "x"}], models, tmp_path, tuning=None)
    assert line == (
        f"{tmp_path / 'bad.jsonl'}: one row, of which none is left to set aside for tuning: give more, or data.tuning"
    )


def test_what_no_split_takes_is_not_judged(tmp_path: Path) -> None:
    rows = [{"text": word, "more": "\ud83d"} for word in WORDS]
    file = write_rows(tmp_path / "a.jsonl", rows)
    seen: list[tuple[str, str]] = []
    data = TextData(train=file, test=file, limit={"train": 3})
    found = read_splits(data, 0, lambda row, split, place: seen.append((row["text"], place)))
    assert [len(found[split]) for split in ("train", "tuning", "test")] == [3, 2, 24]
    assert len(seen) == 29
    assert all(place == f"{file}, row {WORDS.index(text) + 1}" for text, place in seen)


# YAML


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join([*lines, f"name: *a{levels - 1}\n"])


TEXTS = [
    (bomb(9), f":1:1: with its aliases spelt out it has more than {MANY:,} values"),
    (bomb(400), f":1:1: with its aliases spelt out it has more than {MANY:,} values"),
    ("defaults: &d {data: *d}\n", ":1:11: an anchor stands within itself"),
    ("a: &a [b, *a]\n", ":1:4: an anchor stands within itself"),
    ("a: &a {<<: *a}\n", ":1:4: an anchor stands within itself"),
    ("a: " + "[" * 1000, ": not a YAML text (its lists and mappings are nested too deeply)"),
]


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(("text", "line"), TEXTS, ids=[text[:20] for text, _ in TEXTS])
def test_aliases_that_stand_for_too_much(text: str, line: str, merge: bool, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        (load_job if merge else load)(file)
    assert str(error.value) == f"{file}{line}"


def test_a_value_of_an_override_is_bounded_too() -> None:
    with pytest.raises(ValueError, match=r"is not a YAML value$"):
        overridden({}, "name=[&a [x, x], " + ", ".join(f"&a{i} [*a, *a]" for i in range(2)) + ", &d {data: *d}]")


def test_honest_texts_are_as_large_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("d: &d {a: 1, b: [2, 3]}\n" + "\n".join(f"k{i}: *d" for i in range(3000)), encoding="utf-8")
    assert read_yaml(file)["k7"] == {"a": 1, "b": [2, 3]}


@pytest.mark.parametrize(
    "value",
    ["x" * 10_000, [[[[[0] * 9] * 9] * 9] * 9] * 9, {"a": {"b": "c" * 999}}, int("f" * 9000, 16), 10**100],
    ids=["text", "deep", "mapping", "long number", "number"],
)
def test_what_came_is_shown_in_a_few_characters(value: object) -> None:
    assert len(shown(value)) <= 60


def test_short_values_are_shown_whole() -> None:
    for value in ("x", 1.5, True, None, [1, "a", {"b": 2}], "y" * 58):
        assert shown(value) == repr(value)
    assert shown("y" * 59) == "'" + "y" * 56 + "..."


# The words of a merge


@pytest.mark.parametrize("key", ["ass", "as_"])
def test_a_misspelt_key_leads_to_the_one_of_the_file(key: str) -> None:
    with pytest.raises(RecipeError, match=f"^{key}: unknown key, did you mean 'as'\\?$"):
        load_job({"base": "b", "sources": ["s"], "output": "o", "method": "ties", key: "lora"})


@pytest.mark.parametrize("name", ["scale", "weights", "method", "include"])
def test_params_hold_no_words_of_the_merge(name: str, models: Path, tmp_path: Path) -> None:
    words = recipe(models, tmp_path / "out", merge={"method": "ties", "scale": 0.5, "params": {name: 9}})
    with pytest.raises(RecipeError, match=f"^merge: {name} stands beside params, not in it$"):
        load(words)


@pytest.mark.parametrize(("name", "line"), [("rank", "stands beside"), ("resume", "is of the merge itself")])
def test_params_of_a_merge_hold_none_either(name: str, line: str) -> None:
    with pytest.raises(RecipeError, match=f"{name} {line}"):
        load_job({"base": "b", "sources": ["s"], "output": "o", "method": "ties", "params": {name: 1}})


def test_no_parameter_has_the_name_of_a_word() -> None:
    known = {*inspect.signature(merge).parameters, *inspect.signature(wish_for).parameters} - {"params"}
    assert known <= {*keys_of(MergeWords), *OF_MERGE}
    parameters = [method.parameters for method in METHODS.values()] + [space.parameters for space in SPACES.values()]
    for one in parameters:
        assert not one.types.keys() & {*OF_MERGE, *keys_of(Merge), *keys_of(MergeJob)}


# What training may say


@pytest.mark.parametrize("seed", [-1, 2**32, 99999999999999999999])
def test_a_seed_is_one_that_everybody_takes(seed: int, models: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^seed: expected (greater than or equal to 0|less than 4294967296), got "):
        load(recipe(models, tmp_path / "out", seed=seed))


NAN, INF = float("nan"), float("inf")
REFUSED: list[tuple[Words, str]] = [
    ({"seed": -1}, "seed is a number from 0 to 4294967295, got -1"),
    ({"data_seed": 2**70}, "data_seed is a number from "),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is a finite number of at least 1, got 0"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is a finite number of at least 1, got 0"),
    ({"per_device_eval_batch_size": -1}, "per_device_eval_batch_size is "),
    ({"eval_accumulation_steps": 0}, "eval_accumulation_steps is "),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers is a finite number of at least 0, got -1"),
    ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers needs dataloader_num_workers"),
    ({"learning_rate": NAN}, "learning_rate is no number"),
    ({"learning_rate": INF}, "learning_rate is a finite number of at least 0, got inf"),
    ({"learning_rate": -1.0}, "learning_rate is a finite number of at least 0, got -1.0"),
    ({"weight_decay": INF}, "weight_decay is a finite number, got inf"),
    ({"num_train_epochs": INF, "max_steps": -1}, "num_train_epochs is a finite number, got inf"),
    ({"warmup_steps": NAN}, "warmup_steps is no number"),
    ({"adam_beta1": 1.0}, "optim: Invalid beta parameter at index 0: 1.0"),
    ({"report_to": "foo"}, "foo is not supported"),
    ({"optim": "galore_adamw"}, "You need to install `galore_torch`"),
    ({"optim": "schedule_free_adamw"}, "optim: You need to install `schedulefree`"),
    ({"optim": "sgd", "optim_args": "momentum"}, "optim: "),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type: One of min_lr or min_lr_rate"),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"foo": 1}}, "lr_scheduler_type: get_polynomial"),
    ({"torch_compile_backend": "foo"}, "unknown torch_compile_backend 'foo'. Choose from: no, eager, "),
    ({"save_strategy": "best"}, "save_strategy 'best' needs metric_for_best_model"),
    ({"log_level": "foo"}, "log_level: unknown word 'foo'"),
    ({"push_to_hub": True}, "push_to_hub is not followed: `orthoft push` uploads what is done"),
    ({"resume_from_checkpoint": "x"}, "resume_from_checkpoint is not followed: a run that is given again goes on "),
]


@pytest.mark.parametrize(("training", "line"), REFUSED, ids=[str(training) for training, _ in REFUSED])
def test_what_the_trainer_would_refuse_is_refused_before(
    training: Words, line: str, models: Path, tmp_path: Path
) -> None:
    before = dict(os.environ)
    checked = load(recipe(models, tmp_path / "out", training))
    with pytest.raises((ValueError, ImportError)) as error:
        training_arguments(checked, checked.tasks[0], tmp_path / "out")
    assert str(error.value).startswith(line)
    if "torch_compile_backend" in training:
        assert os.environ == before


def test_a_reporter_that_is_not_installed(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orthoft.recipes.training_words.get_available_reporting_integrations", list)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    checked = load(recipe(models, tmp_path / "out", {"report_to": "wandb"}))
    with pytest.raises(ValueError, match=r"^report_to: WandbCallback requires wandb to be installed"):
        training_arguments(checked, checked.tasks[0], tmp_path / "out")


TAKEN: list[Words] = [
    {"push_to_hub": False, "resume_from_checkpoint": "", "learning_rate": 0.0, "max_grad_norm": INF},
    {"optim": "adafactor", "warmup_steps": 0.5},
    {"optim": "sgd", "optim_args": "momentum=0.9", "lr_scheduler_type": "constant"},
    {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 1}, "max_steps": -1},
    {"accelerator_config": {"split_batches": True}, "save_strategy": "best", "metric_for_best_model": "loss"},
]


@pytest.mark.parametrize("training", TAKEN, ids=str)
def test_what_the_trainer_follows_is_taken(training: Words, models: Path, tmp_path: Path) -> None:
    checked = load(recipe(models, tmp_path / "out", training))
    args = training_arguments(checked, checked.tasks[0], tmp_path / "out")
    assert args.learning_rate == training.get("learning_rate", 5e-5)


def test_validate_tells_it(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(recipe(models, tmp_path / "out", {"gradient_accumulation_steps": 0})), encoding="utf-8")
    found = CliRunner().invoke(app, ["recipes", "validate", str(file)])
    assert isinstance(found.exception, RecipeError)
    assert str(found.exception).startswith("tasks[0].training: gradient_accumulation_steps is ")


# Patterns of a merge, by the names in the base's files


@pytest.fixture(scope="module")
def prefixed(models: Path) -> Path:
    """The base as a checkpoint with a head has it: `AutoModel` calls its weights otherwise than the file does."""
    folder = models / "prefixed"
    save_bert(folder)
    file = folder / "model.safetensors"
    save_file({f"bert.{name}": tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return folder


def judged(words: Words, base: Path, models: Path) -> str:
    checked = load(recipe(models, models / "out", merge={"method": "mean"} | words, base=str(base)))
    try:
        rehearse(checked, base)
    except RecipeError as error:
        return str(error)
    return ""


PATTERNS = [
    ({"include": ["*.dense.weight"]}, "merge: the pattern '*.dense.weight' matches no weight that a source changes"),
    ({"exclude": ["nowhere.*"]}, "merge: the pattern 'nowhere.*' matches no weight that a source changes"),
    ({"overrides": {"*key*": {"scale": 2.0}}}, "merge: the pattern '*key*' matches no weight that a source changes"),
    ({"exclude": ["*query*", "*value*"]}, "merge: include and exclude leave no weight to merge"),
    ({"include": ["*.query.*"], "exclude": ["*.0.*"], "overrides": {"*value*": {"scale": 2.0}}}, ""),
]


@pytest.mark.parametrize("base", ["bert", "prefixed"])
@pytest.mark.parametrize(("words", "line"), PATTERNS, ids=[line or "sound" for _, line in PATTERNS])
def test_patterns_are_judged_before_any_expert_is_trained(
    words: Words, line: str, base: str, models: Path, prefixed: Path
) -> None:
    said = judged(words, models / base, models)
    assert said.startswith(line)
    assert bool(said) == bool(line)


@pytest.mark.parametrize(("base", "pattern"), [("bert", "encoder.*"), ("prefixed", "bert.encoder.*")])
def test_patterns_are_of_the_names_in_the_files(base: str, pattern: str, models: Path, prefixed: Path) -> None:
    other = "prefixed" if base == "bert" else "bert"
    assert judged({"include": [pattern]}, models / base, models) == ""
    assert "matches no weight" in judged({"include": [pattern]}, models / other, models)


def test_what_is_left_out_is_not_judged(models: Path, prefixed: Path) -> None:
    words = recipe(models, models / "out", base=str(prefixed), merge={"method": "mean", "space": "core"})
    (task,) = words["tasks"]
    whole = task["adapter"] | {"modules_to_save": ["pooler.dense"]}
    factors = task["adapter"] | {"target_modules": ["pooler.dense"]}
    words["tasks"] = [task | {"adapter": whole}, task | {"name": "b", "adapter": factors}]
    with pytest.raises(RecipeError, match=r"^merge: bert\.pooler\.dense: space 'core' needs low-rank factors"):
        rehearse(load(words), prefixed)
    for over in ({"exclude": ["bert.pooler.dense.weight"]}, {"overrides": {"bert.pooler.*": {"space": "full"}}}):
        rehearse(load(words | {"merge": words["merge"] | over}), prefixed)


@pytest.mark.parametrize("base", ["bert", "prefixed"])
@pytest.mark.parametrize(
    "more",
    [{}, {"bias": "all"}, {"modules_to_save": ["pooler.dense"]}, {"lora_bias": True}, {"trainable_token_indices": [1]}],
    ids=str,
)
def test_the_rehearsal_knows_all_that_the_merge_finds(
    more: Words, base: str, models: Path, prefixed: Path, tmp_path: Path
) -> None:
    words = recipe(models, tmp_path / "out", base=str(models / base))
    words["tasks"][0]["adapter"] |= more
    checked = load(words)
    (task,) = checked.tasks
    model = AutoModel.from_pretrained(models / base)
    peft.get_peft_model(model, adapter_config(task.adapter, task.kind)).save_pretrained(tmp_path / "expert")
    found = plan(models / base, [tmp_path / "expert"], method="mean")
    saved = saved_by(task, models / base, to_merge=True)
    named = saved.in_base(found.base)
    assert named is not None
    assert {tensor for tensors in named.values() for tensor in tensors} == {*found.sources[0].ranks}
    for name in found.sources[0].ranks:
        assert merge_mistakes(Merge(method="mean", include=[name]), checked.export, {"a": saved}, found.base) == []
