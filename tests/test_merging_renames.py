"""Models that transformers loads under other names than it stores: adapters of the one merge into the other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merging_files import randomised
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from orthoft.merging import merge, plan
from orthoft.merging.files.tensors import TensorFolder
from orthoft.merging.sources.renames import stored_names
from orthoft.recipes.live_merge import LiveMerge
from orthoft.recipes.statistics import collect

Words = dict[str, Any]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEXT = {**SIZES, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 60}
IMAGES = {**SIZES, "image_size": 16, "patch_size": 8}
LLAMA, CLIP = {**TEXT, "model_type": "llama"}, {**IMAGES, "model_type": "clip_vision_model"}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**IMAGES)),
    "llava": lambda: LlavaForConditionalGeneration(LlavaConfig(text_config=LLAMA, vision_config=CLIP)),
    "gemma3": lambda: Gemma3ForConditionalGeneration(Gemma3Config(text_config=TEXT, vision_config=IMAGES)),
}


@pytest.fixture(params=MODELS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A base and two LoRAs, trained on the model as transformers loads it."""
    randomised(MODELS[request.param]()).save_pretrained(tmp_path / "base")
    adapt(tmp_path, load(request.param, tmp_path / "base"))
    return tmp_path


def load(name: str, folder: Path) -> PreTrainedModel:
    return type(MODELS[name]()).from_pretrained(folder)


def adapt(root: Path, model: PreTrainedModel) -> None:
    for seed, task in enumerate(("a", "b")):
        peft_model = get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
        )
        randomised(peft_model, "lora_", seed=seed)
        peft_model.save_pretrained(root / task)
        model = peft_model.unload()


def kind_of(made: Path) -> str:
    return str(json.loads((made / "base" / "config.json").read_text(encoding="utf-8"))["model_type"])


def summed(made: Path) -> dict[str, Tensor]:
    """Return the weights of the loaded base plus both LoRAs, by the adapters' own arithmetic."""
    name = kind_of(made)
    weights = {key: value.clone() for key, value in load(name, made / "base").state_dict().items()}
    for task in ("a", "b"):
        tensors = load_file(made / task / "adapter_model.safetensors")
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            update = tensors[key.replace("lora_A", "lora_B")] @ tensors[key] * (8 / 4)
            weights[key.removeprefix("base_model.model.").replace("lora_A.", "")] += update
    return weights


def test_a_merged_checkpoint_loads_and_equals_the_sum(made: Path) -> None:
    merge(made / "base", [made / "a", made / "b"], made / "out", method="task_arithmetic")
    assert load_file(made / "out" / "model.safetensors").keys() == load_file(made / "base" / "model.safetensors").keys()
    found, wanted = load(kind_of(made), made / "out").state_dict(), summed(made)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


def test_a_merged_lora_is_named_as_the_loaded_model(made: Path) -> None:
    merge(made / "base", [made / "a", made / "b"], made / "out", method="task_arithmetic", output="lora")
    model = PeftModel.from_pretrained(load(kind_of(made), made / "base"), made / "out").merge_and_unload()
    wanted = summed(made)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, wanted[name])


def lora_of(made: Path, sources: list[Path]) -> None:
    """Merge sources, one of which is a checkpoint that changes q_proj: PEFT loads all of the merged LoRA."""
    name = kind_of(made)
    merge(made / "base", sources, made / "whole", method="task_arithmetic")
    report = merge(made / "base", sources, made / "out", method="task_arithmetic", output="lora", rank=32)
    model = PeftModel.from_pretrained(load(name, made / "base"), made / "out")
    assert sum("lora_A" in key for key, _ in model.named_parameters()) == len(report.merged) > 0
    found = model.merge_and_unload().state_dict()
    for key, value in load(name, made / "whole").state_dict().items():
        if "q_proj.weight" in key:
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_lora_of_checkpoints_is_named_as_the_loaded_model(with_adapter: bool, made: Path) -> None:
    randomised(load(kind_of(made), made / "base"), "q_proj.weight", std=0.05, seed=3).save_pretrained(made / "tuned")
    lora_of(made, [made / "tuned", *([made / "a"] if with_adapter else [])])


def test_a_lora_beside_an_adapter_of_modules_that_are_not_renamed(tmp_path: Path) -> None:
    randomised(MODELS["vit"]()).save_pretrained(tmp_path / "base")
    model = get_peft_model(load("vit", tmp_path / "base"), LoraConfig(r=2, target_modules=["classifier"]))
    randomised(model, "lora_").save_pretrained(tmp_path / "head")
    tuned = randomised(load("vit", tmp_path / "base"), "q_proj.weight", std=0.05, seed=3)
    tuned.save_pretrained(tmp_path / "tuned")
    lora_of(tmp_path, [tmp_path / "head", tmp_path / "tuned"])


def test_a_lora_lists_what_loading_fuses(tmp_path: Path) -> None:
    config = MixtralConfig(**TEXT, num_local_experts=2)
    randomised(MixtralForCausalLM(config)).save_pretrained(tmp_path / "base")
    randomised(MixtralForCausalLM(config), seed=1).save_pretrained(tmp_path / "tuned")
    report = merge(
        tmp_path / "base",
        [tmp_path / "tuned"],
        tmp_path / "out",
        method="mean",
        output="lora",
        rank=32,
        exclude=["*gate*"],
    )
    fused = [name for name in load_file(tmp_path / "base" / "model.safetensors") if ".experts.0." in name]
    assert fused
    assert all(any(line.startswith(f"{name}:") for line in report.not_carried["output"]) for name in fused)
    model = PeftModel.from_pretrained(MixtralForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out")
    assert sum("lora_A" in key for key, _ in model.named_parameters()) == len(report.merged) > 0


def test_a_checkpoint_may_have_either_names(made: Path) -> None:
    model = load(kind_of(made), made / "base")
    tuned = randomised(model, "q_proj.weight", seed=3)
    tuned.save_pretrained(made / "stored")
    tuned.save_pretrained(made / "loaded", save_original_format=False)
    for form in ("stored", "loaded"):
        merge(made / "base", [made / form], made / f"out-{form}", method="task_arithmetic")
        found = load_file(made / f"out-{form}" / "model.safetensors")
        for name, value in load_file(made / "stored" / "model.safetensors").items():
            torch.testing.assert_close(found[name], value)


def test_merges_in_memory_find_their_weights(made: Path) -> None:
    todo = plan(made / "base", [made / "a", made / "b"], method="task_arithmetic")
    live = LiveMerge(todo, load(kind_of(made), made / "base"))
    wanted = summed(made)
    with live.changed(live.merged({"method": "task_arithmetic"})) as model:
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, wanted[name])


def test_statistics_of_the_loaded_model_are_found(tmp_path: Path) -> None:
    randomised(ViTModel(ViTConfig(**IMAGES))).save_pretrained(tmp_path / "base")
    model = ViTModel.from_pretrained(tmp_path / "base")
    adapt(tmp_path, model)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for task in ("a", "b"):
        tuned = PeftModel.from_pretrained(ViTModel.from_pretrained(tmp_path / "base"), str(tmp_path / task))
        collect(tuned, [{"pixel_values": images}], "gram", tmp_path / f"{task}.safetensors", progress=False)
    files = {task: tmp_path / f"{task}.safetensors" for task in ("a", "b")}
    sources = [(task, tmp_path / task) for task in ("a", "b")]
    report = merge(tmp_path / "base", sources, tmp_path / "out", method="regmean", space="full", statistics=files)
    assert len(report.merged) == 4
    assert not report.not_carried


def test_names_of_a_model_that_is_stored_as_it_loads_stay(made: Path) -> None:
    load(kind_of(made), made / "base").save_pretrained(made / "same", save_original_format=False)
    names = stored_names(TensorFolder(made / "same"))
    assert names
    assert all(loaded == stored for loaded, stored in names.items())


CODE = "from pathlib import Path\n\nPath({!r}).touch()\n"


@pytest.mark.parametrize("words", [{"model_type": "mine"}, {"architectures": ["TrainingArguments"]}])
def test_code_of_a_model_is_never_run(words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*question: object) -> str:
        raise AssertionError(f"asked {question}")

    monkeypatch.setattr("builtins.input", asked)
    base = tmp_path / "base"
    ViTModel(ViTConfig(**IMAGES)).save_pretrained(base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8")) | {"auto_map": {"AutoConfig": "own.C"}}
    (base / "config.json").write_text(json.dumps(config | words), encoding="utf-8")
    (base / "own.py").write_text(CODE.format(str(tmp_path / "ran")), encoding="utf-8")
    stored_names(TensorFolder(base))
    assert not (tmp_path / "ran").exists()


def test_a_configuration_that_appears_later_is_read(tmp_path: Path) -> None:
    ViTModel(ViTConfig(**IMAGES)).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_bytes()
    (tmp_path / "config.json").unlink()
    assert stored_names(TensorFolder(tmp_path)) == {}
    (tmp_path / "config.json").write_bytes(config)
    assert len(stored_names(TensorFolder(tmp_path))) > 30


def test_what_is_saved_beside_an_adapter_is_renamed_as_well(tmp_path: Path) -> None:
    sizes = {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
    model = BertModel(BertConfig(hidden_size=32, **sizes))
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {re.sub("LayerNorm.*", lambda m: old[m[0]], name): value for name, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], modules_to_save=["LayerNorm"]))
    randomised(tuned, "lora_")
    randomised(tuned, "LayerNorm.modules_to_save", seed=1)
    tuned.save_pretrained(tmp_path / "a")
    report = merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", method="task_arithmetic")
    assert not report.not_carried
    wanted = tuned.merge_and_unload().state_dict()
    found = BertModel.from_pretrained(tmp_path / "out").state_dict()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)


def test_a_model_without_end_is_not_built(tmp_path: Path) -> None:
    ViTModel(ViTConfig(**IMAGES)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}), encoding="utf-8")
    assert stored_names(TensorFolder(tmp_path)) == {}


@pytest.mark.parametrize("config", [None, "{}", '{"architectures": ["Nobody"]}', '{"architectures": ["ViTModel"]}'])
def test_a_base_that_transformers_does_not_know_keeps_its_names(config: str | None, tmp_path: Path) -> None:
    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(config, encoding="utf-8")
    assert stored_names(TensorFolder(tmp_path)) == {}
