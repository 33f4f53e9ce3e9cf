"""The training of one task: what its words do, and that it goes on after a break as if there had been none."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import label_task, save_bert, save_llama, text_task, without_dropout
from torch import Tensor

from orthoft.recipes import RecipeError, run
from orthoft.recipes.finetune import Bar, RecipeTrainer
from orthoft.recipes.models import load_model
from orthoft.recipes.schema import Quantization

Words = dict[str, Any]
STEPS, BATCH = 12, 16  # eight steps an epoch


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_bert(folder / "bert")
    save_bert(folder / "plain")
    without_dropout(folder / "plain")
    save_llama(folder / "llama")
    label_task(folder / "a", 0, seed=0)
    label_task(folder / "b", 2, seed=1)
    text_task(folder / "up", 1, seed=0)
    return folder


def classification(models: Path, out: Path, **training: Any) -> Words:
    adapter = {"type": "hra", "r": 4, "target_modules": ["query", "value"]}
    return {
        "name": "tiny",
        "base": str(models / "bert"),
        "output": str(out),
        "defaults": {
            "kind": "classification",
            "max_length": 16,
            "training": {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 3e-2} | training,
        },
        "tasks": [{"name": "a", "adapter": adapter, "data": files(models / "a")}],
    }


def language(models: Path, out: Path, **training: Any) -> Words:
    task = {"name": "a", "kind": "causal-lm", "block_size": 16, "data": files(models / "up")}
    adapter = {"type": "lora", "r": 4, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"]}
    training = {"max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 3e-2} | training
    words = {"name": "tiny", "base": str(models / "llama"), "output": str(out)}
    return words | {"tasks": [task | {"adapter": adapter, "training": training}]}


def files(folder: Path) -> Words:
    limit = {"train": 128, "tuning": 48, "test": 48}
    return {"limit": limit} | {split: str(folder / f"{split}.jsonl") for split in ("train", "tuning", "test")}


def trained(words: Words, say: list[str] | None = None, name: str = "a") -> tuple[Words, dict[str, Tensor]]:
    """Return what is told of an expert, and its tensors."""
    told = run(words, until="finetune", say=(say if say is not None else []).append)["experts"][name]
    return told, load_file(Path(told["folder"], "adapter_model.safetensors"))


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Broken(RuntimeError):
    """What stops a training midway."""


@pytest.fixture
def broken_off(monkeypatch: pytest.MonkeyPatch) -> Callable[[Words, int], None]:
    """A function that runs a recipe up to a step of its task, at which it breaks."""

    def run_up_to(words: Words, step: int) -> None:
        with monkeypatch.context() as patch:

            def on_step_end(self: Bar, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == step:
                    raise Broken

            patch.setattr(Bar, "on_step_end", on_step_end)
            with pytest.raises(Broken):
                run(words, until="finetune")

    return run_up_to


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """An expert whose training was not interrupted."""
    return trained(classification(models, tmp_path_factory.mktemp("whole") / "out"))[1]


# Checkpoints

KILLED = """
import json, os, signal, sys
from orthoft.recipes import run
from orthoft.recipes.finetune import Bar

def on_step_end(self, args, state, control, **kwargs):
    if state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)

Bar.on_step_end = on_step_end
run(json.loads(sys.argv[1]), until="finetune")
"""


def test_a_killed_training_goes_on_to_the_same_bits(models: Path, tmp_path: Path, whole: dict[str, Tensor]) -> None:
    words, lines = classification(models, tmp_path / "killed", save_steps=5), list[str]()
    killed = subprocess.run([sys.executable, "-c", KILLED, json.dumps(words)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    _, tensors = trained(words, lines)
    assert "  goes on from step 5" in lines
    assert same(tensors, whole)


@pytest.mark.parametrize(("kind", "step"), [(classification, 8), (language, 4), (language, 10)])
def test_a_broken_training_goes_on_to_the_same_bits(
    kind: Any, step: int, models: Path, tmp_path: Path, broken_off: Callable[[Words, int], None]
) -> None:
    """With dropout, momentum, a schedule, accumulated gradients and autocast."""
    more = {"lr_scheduler_type": "cosine", "warmup_steps": 3, "gradient_accumulation_steps": 2, "bf16": True}
    more["per_device_train_batch_size"] = 8 if kind is classification else 4
    words, lines = kind(models, tmp_path / "broken", save_steps=2, **more), list[str]()
    broken_off(words, step + 1)
    _, tensors = trained(words, lines)
    assert f"  goes on from step {step}" in lines
    assert same(tensors, trained(kind(models, tmp_path / "whole", **more))[1])


def checkpoints(out: Path) -> list[Path]:
    return sorted((out / "experts" / ".a.trainer").glob("checkpoint-*"))


def test_a_checkpoint_holds_what_is_trained_and_no_pickle(
    models: Path, tmp_path: Path, broken_off: Callable[[Words, int], None]
) -> None:
    words = classification(models, tmp_path / "out", save_steps=2)
    broken_off(words, 9)
    kept = checkpoints(tmp_path / "out")
    assert [folder.name for folder in kept] == ["checkpoint-6", "checkpoint-8"]
    assert {file.suffix for folder in kept for file in folder.iterdir()} == {".json", ".safetensors"}
    size = sum(file.stat().st_size for file in kept[-1].glob("[ts]*.safetensors"))
    told, _ = trained(words)
    assert size < 4 * 3 * told["parameters"] + 16_000  # the adapter and two moments in float32, and their names
    assert size < (models / "bert" / "model.safetensors").stat().st_size
    assert {path.name for path in (tmp_path / "out" / "experts").iterdir()} == {"a"}


def test_a_broken_checkpoint_is_passed_over(
    models: Path, tmp_path: Path, broken_off: Callable[[Words, int], None], whole: dict[str, Tensor]
) -> None:
    out, lines = tmp_path / "out", list[str]()
    words = classification(models, out, save_steps=2)
    broken_off(words, 9)
    file = checkpoints(out)[-1] / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    _, tensors = trained(words, lines)
    assert f"  skipped {file.parent}: state.safetensors is broken" in lines
    assert "  goes on from step 6" in lines
    assert same(tensors, whole)


def test_checkpoints_of_other_data_are_not_taken_up(
    models: Path, tmp_path: Path, broken_off: Callable[[Words, int], None]
) -> None:
    words, lines = classification(models, tmp_path / "out", save_steps=2), list[str]()
    words["tasks"][0]["data"] = label_task(tmp_path / "mine", 0, seed=3)
    broken_off(words, 5)
    label_task(tmp_path / "mine", 0, seed=4)
    told, _ = trained(words, lines)
    assert told["steps"] == STEPS
    assert not any("goes on" in line for line in lines)


# Early stopping


def stopping(models: Path, out: Path, **training: Any) -> Words:
    words = classification(models, out, eval_steps=2, max_steps=60, **training) | {"base": str(models / "plain")}
    words["tasks"][0]["early_stopping"] = {"patience": 2, "threshold": 0.01}
    return words


def test_training_stops_early_and_keeps_what_was_best(models: Path, tmp_path: Path) -> None:
    early = stopping(models, tmp_path / "early", lr_scheduler_type="constant")
    told, tensors = trained(early)
    kept = told["kept"]
    assert 2 < kept["step"] == told["steps"] - 4 < 60  # two evaluations in vain
    for late, name in ((0, "short"), (4, "long")):
        words = stopping(models, tmp_path / name, lr_scheduler_type="constant") | {"base": early["base"]}
        del words["tasks"][0]["early_stopping"]
        words["defaults"]["training"]["max_steps"] = kept["step"] + late
        assert same(tensors, trained(words)[1]) == (name == "short")


def test_a_broken_training_stops_where_a_whole_one_does(
    models: Path, tmp_path: Path, broken_off: Callable[[Words, int], None]
) -> None:
    whole, expected = trained(stopping(models, tmp_path / "whole"))
    words = stopping(models, tmp_path / "broken", save_steps=2)
    broken_off(words, whole["steps"] - 1)
    told, tensors = trained(words)
    assert told["kept"] == whole["kept"]
    assert told["steps"] == whole["steps"]
    assert same(tensors, expected)


# Precision and batches


def test_bfloat16_is_of_the_products_alone(models: Path, tmp_path: Path) -> None:
    words = classification(models, tmp_path / "out", bf16=True, max_steps=40) | {
        "merge": {"method": "mean"},
        "device": "cpu",
    }
    results = run(words)
    losses = [loss for _, loss in results["experts"]["a"]["losses"]]
    assert losses[-1] < losses[0] - 0.05
    exact = trained(classification(models, tmp_path / "exact", max_steps=40))[1]
    tensors = load_file(tmp_path / "out" / "experts" / "a" / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert not same(tensors, exact)
    merged = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    assert all(value.isfinite().all() for value in merged.values())
    merge, expert = (results["scores"][row]["a"]["loss"] for row in ("merge", "a"))
    assert merge == pytest.approx(expert, abs=1e-4)  # of one expert


@pytest.mark.parametrize("kind", [classification, language])
def test_accumulated_gradients_are_those_of_the_larger_batch(kind: Any, models: Path, tmp_path: Path) -> None:
    plain = {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0}  # Adam would not notice another scale
    words, size = kind(models, tmp_path / "once", **plain), BATCH if kind is classification else 8
    parts = {"per_device_train_batch_size": size // 2, "gradient_accumulation_steps": 2}
    more = kind(models, tmp_path / "twice", **plain, **parts)
    for recipe in (words, more):
        recipe["tasks"][0]["adapter"] |= {"lora_dropout": 0.0} if kind is language else {}
        recipe["base"] = recipe["base"].replace("bert", "plain")
    (_, once), (_, twice) = trained(words), trained(more)
    for name, value in once.items():
        torch.testing.assert_close(twice[name], value, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("kind", "reentrant"), [(classification, True), (language, False)])
def test_checkpointed_activations_change_nothing(kind: Any, reentrant: bool, models: Path, tmp_path: Path) -> None:
    _, expected = trained(kind(models, tmp_path / "plain", max_steps=3))
    more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    _, tensors = trained(kind(models, tmp_path / "less", max_steps=3, **more))
    for name, value in expected.items():
        torch.testing.assert_close(tensors[name], value, atol=1e-5, rtol=0)


# Seeds


def test_an_expert_does_not_depend_on_those_before_it(models: Path, tmp_path: Path) -> None:
    words = classification(models, tmp_path / "both")
    first = words["tasks"][0]
    second = first | {"name": "b", "data": files(models / "b")}
    first["training"] = {"bf16": True, "gradient_accumulation_steps": 2, "max_steps": 3}
    _, after = trained(words | {"tasks": [first, second]}, name="b")
    _, alone = trained(words | {"tasks": [second], "output": str(tmp_path / "alone")}, name="b")
    assert same(after, alone)
    other = words | {"tasks": [second], "output": str(tmp_path / "other"), "seed": 1}
    assert not same(trained(other, name="b")[1], alone)


# Quantised bases


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_quantised_base_is_trained_and_scored_as_the_merge_is_which_is_whole(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = language(models, tmp_path / "out", max_steps=30) | {"merge": {"method": "mean"}, "export": {"lora": {}}}
    loaded: list[bool] = []

    def watched(*args: Any) -> Any:
        model = load_model(*args)
        loaded.append(bool(getattr(model, "is_quantized", False)))
        return model

    with monkeypatch.context() as patch:
        patch.setattr("orthoft.recipes.evaluation.load_model", watched)
        results = run(words | {"quantization": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}})
    assert loaded == [True] * 4  # base, expert, merge, merged LoRA
    plain = run(words | {"output": str(tmp_path / "plain"), "tasks": words["tasks"]})
    base, whole = results["scores"]["base"]["a"]["loss"], plain["scores"]["base"]["a"]["loss"]
    assert 1e-4 < abs(base - whole) < 0.3
    assert results["scores"]["a"]["a"]["loss"] < base - 0.1
    merge, merged = (told["scores"]["merge"]["a"]["loss"] for told in (results, plain))
    assert merge < base - 0.1
    assert merge != merged
    tensors = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    original = load_file(models / "llama" / "model.safetensors")
    assert tensors.keys() == original.keys()
    assert torch.equal(tensors["model.embed_tokens.weight"], original["model.embed_tokens.weight"])


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize(
    ("dtype", "words", "computes"),
    [
        (None, {}, torch.bfloat16),
        ("float16", {}, torch.float16),
        ("float16", {"bnb_4bit_compute_dtype": "float32"}, torch.float32),
    ],
)
def test_four_bits_compute_in_the_type_of_the_recipe_or_the_base(
    dtype: str | None,
    words: Words,
    computes: torch.dtype,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    load_model("causal-lm", models / "llama", "bfloat16").save_pretrained(tmp_path)
    model = load_model("causal-lm", tmp_path, dtype, Quantization(load_in_4bit=True, **words))
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.compute_dtype == computes
    assert layer.weight.quant_type == "nf4"
    assert not layer.support_avx512bf16_for_cpu  # scored on such CPUs with the scales that its experts train with


@pytest.mark.parametrize("words", [{}, {"load_in_4bit": True, "load_in_8bit": True}])
def test_one_width_of_quantisation(words: Words, models: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^quantization: choose one of load_in_4bit and load_in_8bit$"):
        run(classification(models, tmp_path / "out") | {"quantization": words})


# Devices and failures


def test_a_device_that_is_not_there_is_one_line(models: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        run(language(models, tmp_path / "out") | {"device": "cuda:77"})
    assert str(error.value).startswith("device: no device 'cuda:77' here, choose from: cpu")
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there_hides_no_other_mistake(models: Path, tmp_path: Path) -> None:
    words = language(models, tmp_path / "out") | {"device": "cuda:77"}
    words["tasks"][0]["adapter"] = {"type": "lorra"}
    with pytest.raises(RecipeError) as error:
        run(words)
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["device", "tasks[0].adapter"]


@pytest.mark.parametrize(
    ("training", "line"),
    [
        ({"fp16": True}, "fp16 does nothing on a CPU: take bf16"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 10, "eval_steps": 10}, "load_best"),
    ],
)
def test_words_that_would_do_nothing_are_refused(training: Words, line: str, models: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=line):
        run(language(models, tmp_path / "out", **training) | {"device": "cpu"})


@pytest.mark.parametrize(
    "training", [{"save_steps": 2}, {"save_strategy": "epoch"}, {"save_steps": 2, "deepspeed": "zero.json"}]
)
def test_checkpoints_of_deepspeed_are_refused(
    training: Words, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "deepspeed" not in training:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RecipeError, match="DeepSpeed's checkpoints are pickles"):
        run(language(models, tmp_path / "out", **training))


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero_stage 3"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "efficient_loading leaves"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "set fsdp_version to 2"),
    ],
)
def test_a_launch_that_leaves_no_whole_weights_is_refused(
    variables: dict[str, str], line: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=f"^accelerate launch: .*{line}"):
        run(language(models, tmp_path / "out"))


def test_a_type_that_the_cpu_imitates_is_told(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orthoft.recipes.devices.computes_in", lambda dtype: dtype != torch.bfloat16)
    said: list[str] = []
    run(
        language(models, tmp_path / "out", max_steps=1) | {"dtype": "bfloat16", "device": "cpu"},
        until="finetune",
        say=said.append,
    )
    assert said[0].startswith("bfloat16 is slow on this CPU")


def test_a_loss_that_is_no_number_is_one_line(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(float("nan"))

    monkeypatch.setattr(RecipeTrainer, "training_step", nothing)
    with pytest.raises(ValueError, match=r"^a: the training loss is nan; lower training\.learning_rate$"):
        run(language(models, tmp_path / "out"))


def test_too_little_memory_says_what_to_lower(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has\n a total of 1 GiB.")

    monkeypatch.setattr(RecipeTrainer, "training_step", full)
    with pytest.raises(MemoryError) as error:
        run(language(models, tmp_path / "out"))
    assert str(error.value).startswith("a: CUDA out of memory; lower training.per_device_train_batch_size")
    assert len(str(error.value).splitlines()) == 1


# Memory


def test_one_model_at_a_time(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = language(models, tmp_path / "out", max_steps=2, bf16=True)
    words["tasks"].append(words["tasks"][0] | {"name": "b"})
    words |= {"merge": {"method": "mean"}, "export": {"lora": {}}, "evaluate": {"harness": {"tasks": ["x"]}}}
    seen: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def count() -> None:
        alive.append(sum(ref() is not None for ref in seen))

    def watched(*args: Any) -> Any:
        count()
        model = load_model(*args)
        seen.append(weakref.ref(model))
        return model

    def scored(*args: Any) -> Words:
        count()
        return {}

    for module in ("finetune", "evaluation"):
        monkeypatch.setattr(f"orthoft.recipes.{module}.load_model", watched)
    monkeypatch.setattr("orthoft.recipes.pipeline.run_harness", scored)
    gc.collect()
    gc.disable()  # what falls to it by chance would hide what is held
    try:
        run(words)
    finally:
        gc.enable()
    assert alive == [0] * 8  # two trainings, base, two experts, merge, merged LoRA, harness


@pytest.mark.parametrize(("row", "at"), [("loading bert", "load_model"), ("base on a", "score")])
def test_too_little_memory_to_evaluate_is_one_line(
    row: str, at: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = classification(models, tmp_path / "out", max_steps=1)
    run(words, until="finetune")

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    place = "evaluation.load_model" if at == "load_model" else "kinds.probed.Probed.score"
    monkeypatch.setattr(f"orthoft.recipes.{place}", full)
    with pytest.raises(MemoryError, match=rf"^{row}: CUDA out of memory; lower "):
        run(words)
