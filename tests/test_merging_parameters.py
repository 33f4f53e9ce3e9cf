"""LoRAs on parameters, as PEFT puts them on the experts and the routers of mixtures: a merge is that of PEFT itself."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merging_files import randomised, save_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralModel,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from orthoft.convert import to_lora
from orthoft.merging import merge, plan
from orthoft.merging.files.tensors import TensorFolder, as_matrix
from orthoft.merging.formats.lora import UNREAD
from orthoft.merging.formats.registry import MERGED_BY_PEFT, PROMPTS
from orthoft.merging.sources.adapter import open_source

Words = dict[str, Any]
EXPERTS = 3
TEXT: Words = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
TEXT |= {"head_dim": 8, "vocab_size": 20, "pad_token_id": 0, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
QWEN = {**TEXT, "num_experts": EXPERTS, "moe_intermediate_size": 12}
# Of the last two one projection is square in each expert: its shape does not tell which way round it is stored.
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**TEXT, intermediate_size=12)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**TEXT, intermediate_size=16)),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(**TEXT, intermediate_size=16, intermediate_size_mlp=16, moe_layers=[0])
    ),
}
UP_AND_DOWN = {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "experts.down_proj"]}
CASES: list[tuple[str, Words]] = [
    ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3", "gate"]}),  # PEFT makes parameters of them itself
    ("mixtral", {"target_modules": [], "target_parameters": ["down_proj"]}),
    ("qwen3_moe", {"target_modules": ["gate_proj", "up_proj", "gate"], "use_rslora": True}),
    ("qwen3_moe", UP_AND_DOWN | {"rank_pattern": {"gate_up_proj": 5}, "alpha_pattern": {"experts": 9, "down_proj": 7}}),
    ("gpt_oss", UP_AND_DOWN),
    ("llama4", UP_AND_DOWN),
    ("llama4", {"target_modules": [], "target_parameters": ["q_proj.weight", "feed_forward.experts.down_proj"]}),
]


def save_base(folder: Path, kind: str, **words: Any) -> PreTrainedModel:
    model = randomised(MODELS[kind](), seed=7)
    model.save_pretrained(folder, **words)
    return type(model).from_pretrained(folder)


def save_lora(folder: Path, model: PreTrainedModel, words: Words, seed: int = 1) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, **words))
    randomised(tuned, "lora_", seed=seed).save_pretrained(folder)
    return tuned


def close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name], atol=2e-6, rtol=1e-5, msg=name)


def loaded(folder: Path, kind: PreTrainedModel) -> dict[str, Tensor]:
    return type(kind).from_pretrained(folder).state_dict()


@pytest.mark.parametrize(("kind", "words"), CASES)
@pytest.mark.parametrize("as_stored", [True, False])
def test_a_merge_is_that_of_peft(kind: str, words: Words, as_stored: bool, tmp_path: Path) -> None:
    model = save_base(tmp_path / "base", kind, save_original_format=as_stored)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = save_lora(tmp_path / "a", model, words)
    targets = json.loads((tmp_path / "a" / "adapter_config.json").read_text(encoding="utf-8"))["target_parameters"]
    report = merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", method="task_arithmetic", progress=False)
    wanted = tuned.merge_and_unload().state_dict()
    close(loaded(tmp_path / "out", model), wanted)
    changed = {name for name in wanted if (wanted[name] - before[name]).norm() > 1e-2}
    assert all(any(name.endswith(f".{target}") for name in changed) for target in targets)
    assert not report.not_carried


@pytest.mark.parametrize("as_stored", [True, False])
def test_two_of_them_add_up(as_stored: bool, tmp_path: Path) -> None:
    kept = save_base(tmp_path / "base", "mixtral", save_original_format=as_stored)
    total = {name: tensor.clone() for name, tensor in kept.state_dict().items()}
    for seed, name in enumerate("ab"):
        tuned = save_lora(tmp_path / name, type(kept).from_pretrained(tmp_path / "base"), CASES[0][1], seed)
        for key, tensor in tuned.merge_and_unload().state_dict().items():
            total[key] += tensor - kept.state_dict()[key]
    sources = [tmp_path / "a", tmp_path / "b"]
    merge(tmp_path / "base", sources, tmp_path / "out", method="task_arithmetic", progress=False)
    close(loaded(tmp_path / "out", kept), total)
    todo = plan(tmp_path / "base", sources, method="tsv")
    assert all((item.rank is None) == item.stacked for item in todo.merged.values())  # one by one they have factors


def test_experts_of_another_class_are_found_by_their_ends(tmp_path: Path) -> None:
    kept = save_base(tmp_path / "base", "mixtral")
    tuned = save_lora(tmp_path / "a", MixtralModel.from_pretrained(tmp_path / "base"), CASES[1][1])
    merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", method="mean", progress=False)
    wanted = {f"model.{name}": tensor for name, tensor in tuned.merge_and_unload().state_dict().items()}
    close(loaded(tmp_path / "out", kept), wanted | {"lm_head.weight": kept.state_dict()["lm_head.weight"]})


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_are_read_one_by_one(kind: str, tmp_path: Path) -> None:
    save_lora(tmp_path / "a", save_base(tmp_path / "base", kind), UP_AND_DOWN)
    base = TensorFolder(tmp_path / "base")
    source = open_source("a", tmp_path / "a", base)
    names = [name for name in source.ranks if "experts" in name]
    assert len(names) == (3 * EXPERTS if kind == "mixtral" else 2)
    for name in names:
        weight = base[name].flatten(0, -2).double()
        delta = source.delta(name, weight)
        whole = delta.dense()
        assert whole.dtype == delta.dtype == torch.float64
        assert delta.rank() == source.ranks[name]
        for start, stop in [(0, 0), (0, 5), (3, 14), (14, 3), (10, 12), (len(whole) - 1, len(whole) + 9)]:
            torch.testing.assert_close(delta.rows(start, stop), whole[start:stop], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(delta.norm(), whole.norm())
        torch.testing.assert_close(delta.upcast().dense(), whole)
        flat = source.delta(name, as_matrix(base[name]).double())
        torch.testing.assert_close(flat.dense(), whole.reshape(flat.shape))


@pytest.mark.parametrize("factor", ["A", "B"])
def test_nan_in_an_expert_is_told(factor: str, tmp_path: Path) -> None:
    save_lora(tmp_path / "a", save_base(tmp_path / "base", "mixtral"), CASES[1][1])
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if f"lora_{factor}" in name)
    tensors[key][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"^source 'a': tensor '.*experts.*' contains NaN or Inf$"):
        merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", method="mean", progress=False)


PATH = "model.layers.0.mlp.experts"
READ = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["down_proj"]}
GOOD: dict[str, tuple[int, ...]] = {"lora_A.weight": (6, 12), "lora_B.weight": (16, 6)}
BROKEN: list[tuple[Words, dict[str, tuple[int, ...]], str]] = [
    ({}, {"lora_A.weight": (6, 13), "lora_B.weight": (16, 6)}, "an adapter of another base: its '.*down_proj' has "),
    ({"r": 3}, GOOD, r"has factors \(6, 12\) and \(16, 6\) of rank 3, for 3 matrices of shape \(16, 12\)"),
    ({}, GOOD | {"lora_magnitude_vector": (16,)}, "a LoRA on a parameter, has lora_A.weight, .*magnitude"),
    ({}, {"lora_A.weight": (6, 12)}, "only .*'lora_A.weight', "),
    ({}, {f"base_layer.{name}": shape for name, shape in GOOD.items()} | GOOD, "are not in the base: load it in PEFT"),
    ({"target_parameters": ["gate_up_proj", "down_proj"]}, GOOD, "are not in the base: load it in PEFT"),
    ({"target_parameters": ["other"]}, GOOD, r"has no weight in .* \(or it sits on parameters .* load it in PEFT"),
    ({"target_parameters": "down_proj"}, GOOD, "a list of names, of at most 100 parameters, got 'down_proj'"),
    ({"target_parameters": [f"p{i}" for i in range(101)]}, GOOD, "a list of names, of at most 100 parameters"),
]


@pytest.mark.parametrize(("change", "shapes", "message"), BROKEN)
def test_what_does_not_fit_is_refused(
    change: Words, shapes: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    save_base(tmp_path / "base", "mixtral")
    tensors = {f"{PATH}.{name}": torch.ones(shape) for name, shape in shapes.items()}
    save_adapter(tmp_path / "a", READ | change, tensors)
    with pytest.raises(ValueError, match=rf"^source 'a': .*{message}") as caught:
        plan(tmp_path / "base", [tmp_path / "a"], method="mean")
    assert "\n" not in str(caught.value)


def test_without_a_configuration_the_base_itself_tells(tmp_path: Path) -> None:
    kept = save_base(tmp_path / "base", "gpt_oss")
    tuned = save_lora(tmp_path / "a", kept, {"target_modules": [], "target_parameters": ["gate_up_proj"]})
    merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "with", method="mean", progress=False)
    (tmp_path / "base" / "config.json").rename(tmp_path / "config.json")
    merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", method="mean", progress=False)
    close(load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "with" / "model.safetensors"))
    assert f"{PATH}.gate_up_proj" in tuned.merge_and_unload().state_dict()


def test_quantised_experts_are_told(tmp_path: Path) -> None:
    save_lora(tmp_path / "a", save_base(tmp_path / "base", "gpt_oss"), UP_AND_DOWN)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj")]:
        tensors[f"{name}_blocks"] = tensors[f"{name}_scales"] = torch.ones(2, dtype=torch.uint8)
        tensors[f"{name}_scales"] = tensors.pop(name).to(torch.uint8)
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match=r"^source 'a': the base's '.*_proj_blocks' .* dequantise the base first$"):
        plan(tmp_path / "base", [tmp_path / "a"], method="mean")


def test_a_conversion_does_not_lose_them(tmp_path: Path) -> None:
    save_lora(tmp_path / "a", save_base(tmp_path / "base", "mixtral"), UP_AND_DOWN)
    with pytest.raises(
        ValueError, match=r"also changes '.*experts.*' \(lora_bias, trained tokens, target_parameters, fused experts\)"
    ):
        to_lora(tmp_path / "a", tmp_path / "out", base=tmp_path / "base", rank=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"peft_type": kind}, f"its peft_type '{kind}' is not read: load it in ") for kind in sorted(MERGED_BY_PEFT)),
        *(({"peft_type": kind}, f"its peft_type '{kind}' is a prompt, which no change of") for kind in sorted(PROMPTS)),
        *(({field: True}, f"it uses {field}, which is not read: load it in PEFT, merge") for field in sorted(UNREAD)),
    ],
)
def test_what_is_not_read_is_told_with_what_to_do(change: Words, message: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "base" / "model.safetensors")
    folder = save_adapter(tmp_path / "a", {"peft_type": "LORA", "r": 1, "lora_alpha": 1} | change, {"x": torch.ones(1)})
    with pytest.raises(ValueError, match=f"^source 'a': {message}"):
        open_source("a", folder, TensorFolder(tmp_path / "base"))


def test_peft_knows_what_is_said_to_be_its_own() -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    tuners = {kind.value: tuner for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    assert all(issubclass(tuners[kind], BaseTuner) for kind in MERGED_BY_PEFT)
    assert not any(issubclass(tuners[kind], BaseTuner) for kind in PROMPTS if kind in tuners)
