"""How llama.cpp lays out the architectures that are converted: their names there, their numbers, the order of heads."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthoft.errors import unknown

Config = Mapping[str, Any]
# By transformers' architecture: the name in GGUF, and whether heads turn neighbouring pairs there (here: halves).
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
}
NOT_STORED = re.compile(r".*rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Layout:
    """A model's architecture in GGUF: ``name_of`` gives a module's name there, None if it has none."""

    name: str
    config: Config
    pairs: bool
    name_of: Callable[[str], str | None]

    @property
    def heads(self) -> int:
        return int(self.config["num_attention_heads"])

    @property
    def kv_heads(self) -> int:
        return int(self.config.get("num_key_value_heads") or self.heads)

    @property
    def head_size(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.heads)

    def renamed(self, module: str) -> str:
        """Return what GGUF calls a module.

        Raises:
            ValueError: the architecture has no such module there.
        """
        if (name := self.name_of(module)) is None:
            raise ValueError(f"GGUF has no place for {module!r} in architecture {self.name!r}: it cannot be converted")
        return name

    def reordered(self, module: str, rows: Tensor) -> Tensor:
        """Return the rows of a weight (m, n), a bias (m,) or a factor (m, r) in the order that GGUF has for them."""
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(module.rpartition(".")[2]) if self.pairs else None
        return rows if heads is None else in_pairs(rows, heads)


def in_pairs(rows: Tensor, heads: int) -> Tensor:
    """Return each head's rows (m, ...) in the order x_1, y_1, x_2, y_2, ... instead of x_1, x_2, ..., y_1, y_2, ...."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])  # (h, 2, d / 2, ...)
    return halves.transpose(1, 2).reshape(rows.shape)


def layout_of(config: Config) -> Layout:
    """Return the layout of a model by its ``config.json``.

    Raises:
        ValueError: llama.cpp knows no such architecture, or computes it otherwise.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = str((config.get("architectures") or ["none"])[0])
    if architecture not in ARCHITECTURES:
        raise unknown("architecture for GGUF", architecture, ARCHITECTURES)
    _check(config)
    name, pairs = ARCHITECTURES[architecture]
    number = next(arch for arch, known in MODEL_ARCH_NAMES.items() if known == name)
    names = get_tensor_name_map(number, int(config["num_hidden_layers"]))
    return Layout(name, config, pairs, names.get_name)


def _check(config: Config) -> None:
    rope, given = rope_of(config), config.get("hidden_act", "silu")
    if given != "silu":
        raise ValueError(f"hidden_act={given!r} is not what llama.cpp computes for this architecture: it takes 'silu'")
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise unknown("rope_type for GGUF", rope["rope_type"], ("default", "linear", "llama3"))
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1)) not in (None, 1):
        raise ValueError("partial_rotary_factor: llama.cpp turns whole heads in this architecture")


def rope_of(config: Config) -> dict[str, Any]:
    """Return the rotary parameters of a ``config.json``, old (``rope_scaling``) or new (``rope_parameters``)."""
    told = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    told.setdefault("rope_type", told.pop("type", None) or "default")
    told.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return told


def numbers(layout: Layout) -> dict[str, Any]:
    """Return the sizes of a model as the setters of ``gguf.GGUFWriter`` that take them, by name."""
    config, rope = layout.config, rope_of(layout.config)
    told = {
        "add_block_count": int(config["num_hidden_layers"]),
        "add_context_length": int(config["max_position_embeddings"]),
        "add_embedding_length": int(config["hidden_size"]),
        "add_feed_forward_length": int(config["intermediate_size"]),
        "add_head_count": layout.heads,
        "add_head_count_kv": layout.kv_heads,
        "add_key_length": layout.head_size,
        "add_value_length": layout.head_size,
        "add_rope_dimension_count": layout.head_size,
        "add_rope_freq_base": float(rope["rope_theta"]),
        "add_layer_norm_rms_eps": float(config["rms_norm_eps"]),
        "add_vocab_size": int(config["vocab_size"]),
    }
    return told | ({"add_rope_scaling_factor": float(rope["factor"])} if rope["rope_type"] == "linear" else {})


def frequency_divisors(layout: Layout) -> Tensor | None:
    """Return what Llama 3 divides its rotary frequencies by, (head size / 2,); None of other kinds.

    A frequency whose wavelength is below ``context / high`` stays, one above ``context / low`` is divided by the
    factor, between them the inverse of the divisor goes linearly in ``context / wavelength``.
    """
    rope = rope_of(layout.config)
    if rope["rope_type"] != "llama3":
        return None
    size, context = layout.head_size, rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    theta = torch.tensor(float(rope["rope_theta"]), dtype=torch.float64)
    frequencies = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = context * frequencies / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    divisors: Tensor = 1 / ((1 - share) / factor + share)
    return divisors.float()
