"""Tiny random models, a tokenizer of a few words, and tasks that such models can learn, all made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WORDS = [f"w{i}" for i in range(24)]


def save_tokenizer(folder: Path) -> int:
    """Save a tokenizer of whole words; return the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=64
    )
    fast.save_pretrained(folder)
    return len(vocabulary)


def save_bert(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    vocabulary = save_tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)


def save_llama(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = save_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def label_task(folder: Path, offset: int, seed: int) -> dict[str, str]:
    """Write a task in which the first word decides, so that a probe of averaged features is left behind."""
    draw = random.Random(seed)

    def row() -> dict[str, Any]:
        words = draw.choices(WORDS, k=4)
        return {"text": " ".join(words), "label": "low" if (WORDS.index(words[0]) + offset) % 24 < 12 else "high"}

    sizes = {"train": 256, "tuning": 64, "test": 128}
    return {split: write_rows(folder / f"{split}.jsonl", [row() for _ in range(n)]) for split, n in sizes.items()}


def text_task(folder: Path, step: int, seed: int) -> dict[str, str]:
    """Write a language in which each word determines the next."""
    draw = random.Random(seed)

    def row() -> dict[str, Any]:
        start = draw.randrange(len(WORDS))
        return {"text": " ".join(WORDS[(start + step * i) % len(WORDS)] for i in range(20))}

    sizes = {"train": 40, "tuning": 8, "test": 12}
    return {split: write_rows(folder / f"{split}.jsonl", [row() for _ in range(n)]) for split, n in sizes.items()}


class Net(nn.Module):
    """A model of one layer, called lin."""

    def __init__(self, lin: nn.Module) -> None:
        super().__init__()
        self.lin = lin

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)
