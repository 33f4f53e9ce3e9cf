"""Where a merged LoRA puts its factors: PEFT loads all of them, in mixtures of experts too, and the rest is listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merging_files import randomised, save_adapter
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from orthoft.merging import MergeReport, merge, plan
from orthoft.merging.files.tensors import TensorFolder
from orthoft.merging.outputs import Options, get_output
from orthoft.merging.sources.renames import module_kinds

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60}
TEXT = {**SIZES, "num_key_value_heads": 1, "head_dim": 16, "num_experts_per_tok": 2}
QWEN = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "num_experts": 4, "mlp_only_layers": [0]}
DEEPSEEK = {**SIZES, "num_key_value_heads": 2, "moe_intermediate_size": 24, "n_routed_experts": 4, "n_group": 1}
DEEPSEEK |= {"topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 8, "head_dim": 8}
DEEPSEEK |= {"kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

# A router that PEFT renames, one beside shared experts and dense layers of the experts' names, one it does not know.
MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=4)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**TEXT, **QWEN)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**TEXT, num_local_experts=4)),
}
OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2, vocab_size=60, decoder_start_token_id=0)
    ),
    "mpnet": lambda: MPNetModel(MPNetConfig(**SIZES)),
}


def save_tuned(root: Path, make: Callable[[], PreTrainedModel]) -> type[PreTrainedModel]:
    """Save a model in ``base``, and one of other numbers in ``tuned``."""
    model = randomised(make(), std=0.1)
    model.save_pretrained(root / "base")
    randomised(model, std=0.1, seed=1).save_pretrained(root / "tuned")
    return type(model)


def check(root: Path, kind: type[PreTrainedModel], report: MergeReport) -> list[str]:
    """Compare what PEFT makes of ``base`` and ``out`` with ``tuned``, but for what is listed; return that."""
    left = [line.split(":")[0] for line in report.not_carried.get("output", [])]
    base = kind.from_pretrained(root / "base")
    found = PeftModel.from_pretrained(base, root / "out").merge_and_unload().state_dict()
    for name, value in kind.from_pretrained(root / "tuned").named_parameters():
        if name not in left and ".experts." not in name:
            torch.testing.assert_close(found[name], value.data, atol=1e-5, rtol=1e-4)
    return left


@pytest.mark.parametrize("name", MIXTURES)
def test_peft_loads_all_of_a_lora_of_a_mixture(name: str, tmp_path: Path) -> None:
    kind = save_tuned(tmp_path, MIXTURES[name])
    words: dict[str, Any] = {"method": "mean", "output": "lora", "rank": 32, "progress": False, "diagnostics": False}
    report = merge(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "out", **words)
    left = check(tmp_path, kind, report)
    assert not any(part in one for one in left for part in ("gate.weight", "router.weight", "shared_expert"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    router = "router" if name == "gpt_oss" else "gate"
    assert f"model.layers.1.mlp.{router}.weight" in config["target_parameters"]


def test_peft_loads_a_lora_of_routers_alone(tmp_path: Path) -> None:
    kind = save_tuned(tmp_path, MIXTURES["mixtral"])
    words: dict[str, Any] = {"method": "mean", "output": "lora", "rank": 2, "include": ["*.gate.weight"]}
    merge(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "out", **words)
    model = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "out")
    assert sum("lora_A" in key for key, _ in model.named_parameters()) == 2
    assert {tuple(value.shape) for key, value in model.named_parameters() if "lora_A" in key} == {(2, 32)}


def test_routers_of_adapters_with_the_old_names_are_named_as_they_are_loaded(tmp_path: Path) -> None:
    """Two of rank 3 make one of rank 4, the number of experts, beside another of rank 6."""
    kind = save_tuned(tmp_path, MIXTURES["mixtral"])
    random = torch.Generator().manual_seed(0)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["gate", "q_proj"]}
    modules = {"model.layers.1.block_sparse_moe.gate": (4, 32), "model.layers.1.self_attn.q_proj": (32, 32)}
    for task in "ab":
        factors = {
            f"{module}.lora_{factor}.weight": torch.randn(shape, generator=random)
            for module, (m, n) in modules.items()
            for factor, shape in {"A": (3, n), "B": (m, 3)}.items()
        }
        save_adapter(tmp_path / task, config, factors)
    sources = [tmp_path / task for task in "ab"]
    words: dict[str, Any] = {"method": "task_arithmetic", "progress": False, "diagnostics": False}
    merge(tmp_path / "base", sources, tmp_path / "whole", **words)
    merge(tmp_path / "base", sources, tmp_path / "out", output="lora", **words)
    base = kind.from_pretrained(tmp_path / "base")
    found = PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload().state_dict()
    for name, value in kind.from_pretrained(tmp_path / "whole").state_dict().items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("known", [True, False])
def test_embeddings_of_any_name_are_listed(name: str, known: bool, tmp_path: Path) -> None:
    kind = save_tuned(tmp_path, OTHERS[name])
    biases = [key for key in load_file(tmp_path / "base" / "model.safetensors") if "relative_attention_bias" in key]
    words: dict[str, Any] = {"method": "mean", "output": "lora", "rank": 32, "progress": False, "diagnostics": False}
    config = (tmp_path / "base" / "config.json").read_text()
    if not known:
        (tmp_path / "base" / "config.json").unlink()
    report = merge(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "out", **words)
    (tmp_path / "base" / "config.json").write_text(config)
    left = check(tmp_path, kind, report)
    assert biases
    assert set(biases) <= set(left)


def test_kinds_are_those_of_the_modules_as_they_are_stored(tmp_path: Path) -> None:
    MIXTURES["mixtral"]().save_pretrained(tmp_path)
    kinds = module_kinds(TensorFolder(tmp_path))
    assert kinds["model.embed_tokens.weight"] == "embedding"
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == "linear"
    assert kinds["model.layers.0.block_sparse_moe.gate.weight"] == "other"
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" not in kinds


def test_adapters_of_a_plain_model_need_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tuned(tmp_path, OTHERS["t5"])
    module = "encoder.block.0.layer.0.SelfAttention.q"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(16, 2)}
    save_adapter(tmp_path / "a", {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}, factors)
    for asked in ("lora.module_kinds", "modules.stored_names"):
        monkeypatch.setattr(f"orthoft.merging.outputs.{asked}", lambda _: pytest.fail("built a model"))
    todo = plan(tmp_path / "base", [tmp_path / "a"], method="mean")
    assert get_output("lora")(todo, Options("base")).names == [f"{module}.weight"]
