"""Tiny models and adapters on disk for the merging tests."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reference
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging

from orthoft.merging.files.tensors import TensorFolder, as_matrix
from orthoft.merging.sources.adapter import Source

logging.disable_progress_bar()
logging.set_verbosity_error()


def bert_config() -> BertConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertConfig(**sizes, vocab_size=60, max_position_embeddings=16)


def llama_config() -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=60, max_position_embeddings=16)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertModel(bert_config()),
    "llama": lambda: LlamaForCausalLM(llama_config()),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=16)),
}
TARGETS = {
    "bert": ["query", "intermediate.dense", "output.dense"],
    "llama": ["q_proj", "k_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def randomised(model: nn.Module, marker: str = "", std: float = 0.2, seed: int = 0) -> nn.Module:
    """Fill the parameters whose names contain ``marker`` with random numbers."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if marker in name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=random) + (1.0 if "norm" in name else 0.0))
    return model


def save_base(folder: Path, kind: str, **kwargs: Any) -> Path:
    """Save a model with random weights, with what usually lies beside it."""
    model = randomised(MODELS[kind](), seed=7)
    model.save_pretrained(folder, **kwargs)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "README.md").write_text("the base")
    (folder / "pytorch_model.bin").write_bytes(b"old weights")
    return folder


def save_lora(folder: Path, model: PreTrainedModel, seed: int = 1, dora: bool = False, **kwargs: Any) -> PeftModel:
    """Save a PEFT LoRA with random factors on the model, and return the PEFT model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, LoraConfig(**{"r": 4, "use_dora": dora, **kwargs}))
        randomised(tuned, "lora_", seed=seed)
        for name, parameter in tuned.named_parameters():
            if "lora_magnitude" in name:
                nn.init.uniform_(parameter, 0.5, 2.0)
            if "modules_to_save" in name or (".bias" in name and kwargs.get("bias", "none") != "none"):
                nn.init.normal_(parameter)
        tuned.save_pretrained(folder)
    return tuned


def save_pair(root: Path) -> Path:
    """Save a tiny BERT in ``base``, and two LoRAs of it in ``a`` and ``b``."""
    save_base(root / "base", "bert")
    for seed, name in enumerate("ab", 1):
        save_lora(root / name, load(root / "base"), seed=seed, target_modules=TARGETS["bert"])
    return root


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModel.from_pretrained(folder)
    return model


def linear_weights(base: Path, kind: str) -> dict[str, tuple[Tensor, bool]]:
    """Return {module: (weight (out, in) in float64, stored as (in, out))} of the modules that adapters target."""
    tensors = tensors_of(base)
    found = {}
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and weight.ndim == 2 and module.endswith(tuple(TARGETS[kind])):
            found[module] = (weight.double().T if kind == "gpt2" else weight.double(), kind == "gpt2")
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a model folder, read with the safetensors library."""
    merged: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        merged |= load_file(file)
    return merged


def merged_by(source: Source, base: TensorFolder) -> dict[str, Tensor]:
    """Return base + delta of all weights that the source changes, shaped as stored."""
    merged = {}
    for name in source.ranks:
        weight = as_matrix(base[name].float())
        delta = source.delta(name, weight)
        assert delta.rank() == source.ranks[name], name
        merged[name] = (weight + delta.dense()).reshape(base.shape(name))
    return merged


def save_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"base_model.model.{name}": t.contiguous() for name, t in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def save_oftv2(
    folder: Path, weights: dict[str, tuple[Tensor, bool]], map: str = "series", block_share: bool = False, seed: int = 2
) -> dict[str, Tensor]:
    """Save an OFTv2 adapter, two block sizes in it, and return the oracle's deltas as stored."""
    random = torch.Generator().manual_seed(seed)
    odd = next(iter(weights)).rpartition(".")[2]
    config = {"peft_type": "ORTHOFT_OFTV2", "block_size": 4, "map": map, "degree": 5, "block_share": block_share}
    config["block_size_pattern"] = {odd: 8}
    tensors, deltas = {}, {}
    for module, (weight, stored_transposed) in weights.items():
        size = 8 if module.endswith(f".{odd}") else 4
        blocks = 1 if block_share else weight.shape[1] // size
        skew = 0.15 * torch.randn(blocks, size * (size - 1) // 2, generator=random)
        tensors[f"{module}.orthoft_oftv2_adapter.skew"] = skew
        delta = reference.rotated(weight, skew.double(), size, map, 5) - weight
        deltas[f"{module}.weight"] = delta.T if stored_transposed else delta
    save_adapter(folder, config, tensors)
    return deltas


def save_hra(
    folder: Path, weights: dict[str, tuple[Tensor, bool]], orthonormal: bool = False, seed: int = 3
) -> dict[str, Tensor]:
    """Save an HRA adapter with 4 reflections and return the oracle's deltas as stored."""
    random = torch.Generator().manual_seed(seed)
    tensors, deltas = {}, {}
    for module, (weight, stored_transposed) in weights.items():
        u, u0 = (torch.randn(4, weight.shape[1], generator=random) for _ in range(2))
        tensors[f"{module}.orthoft_hra_adapter.u"] = u
        rows = u.double()
        if orthonormal:
            tensors[f"{module}.orthoft_hra_adapter.u0"] = u0
            rows = torch.cat([torch.linalg.qr(rows.T).Q.T for rows in (u0.double(), u.double())])
        delta = reference.reflected(weight, rows) - weight
        deltas[f"{module}.weight"] = delta.T if stored_transposed else delta
    config = {"peft_type": "ORTHOFT_HRA", "r": 4, "orthonormal": orthonormal, "rank_pattern": {}}
    save_adapter(folder, config, tensors)
    return deltas


def classifier(base: Path) -> PreTrainedModel:
    """Return a classifier on the base's encoder: its names begin with ``bert.``, its head is new."""
    model: PreTrainedModel = BertForSequenceClassification.from_pretrained(base)
    return model
