"""Tiny random models, a tokenizer of a few words, and tasks that such models can learn, all made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WORDS = [f"w{i}" for i in range(24)]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.3,
}


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


def save_bert(folder: Path, initializer_range: float = 0.3, dropout: float = 0.1) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        **SIZES | {"initializer_range": initializer_range},
        vocab_size=save_tokenizer(folder),
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(config).save_pretrained(folder)


def without_dropout(folder: Path) -> None:
    """Take dropout out of a model that was saved: it falls elsewhere in batches of another size."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {name: 0.0 for name in config if name.endswith("dropout_prob")}
    file.write_text(json.dumps(config), encoding="utf-8")


def save_llama(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES,
        vocab_size=save_tokenizer(folder),
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def save_t5(folder: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=save_tokenizer(folder),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)


def save_bart(folder: Path) -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=save_tokenizer(folder),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        dropout=0.0,
        init_std=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    BartForConditionalGeneration(config).save_pretrained(folder)


def save_vit(folder: Path) -> None:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=4)).save_pretrained(folder)


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


def tag_task(folder: Path, offset: int, seed: int) -> dict[str, str]:
    """Write sentences with BIO tags: half of the words belong to entities, and the word before decides on B or I."""
    draw = random.Random(seed)

    def row() -> dict[str, Any]:
        tokens = draw.choices(WORDS, k=draw.randint(3, 7))
        inside = [(WORDS.index(word) + offset) % 24 < 12 for word in tokens]
        before = [False, *inside[:-1]]
        return {
            "tokens": tokens,
            "tags": [("I-x" if was else "B-x") if now else "O" for was, now in zip(before, inside, strict=True)],
        }

    sizes = {"train": 160, "tuning": 24, "test": 48}
    return {split: write_rows(folder / f"{split}.jsonl", [row() for _ in range(n)]) for split, n in sizes.items()}


def image_task(folder: Path, shapes: tuple[str, str], seed: int) -> dict[str, str]:
    """Write pictures of two shapes (disc, cross, ring), in any place and colour, as files beside the rows."""
    from PIL import Image, ImageDraw

    draw = random.Random(seed)

    def row(name: str) -> dict[str, Any]:
        shape, picture = draw.choice(shapes), Image.new("RGB", (20, 20), tuple(draw.choices(range(80), k=3)))
        pen, (x, y), r = ImageDraw.Draw(picture), (draw.randint(6, 13), draw.randint(6, 13)), draw.randint(4, 6)
        colour, box = tuple(draw.choices(range(120, 256), k=3)), (x - r, y - r, x + r, y + r)
        if shape == "cross":
            pen.line(box, fill=colour, width=2)
            pen.line((x - r, y + r, x + r, y - r), fill=colour, width=2)
        else:
            pen.ellipse(box, fill=colour if shape == "disc" else None, outline=colour, width=2)
        picture.save(folder / name)
        return {"image": name, "label": shape}

    folder.mkdir(parents=True)
    sizes = {"train": 96, "tuning": 24, "test": 48}
    return {
        split: write_rows(folder / f"{split}.jsonl", [row(f"{split}{i}.png") for i in range(n)])
        for split, n in sizes.items()
    }


def pair_task(folder: Path, step: int, seed: int) -> dict[str, str]:
    """Write pairs of texts: the target has, for each word of the source, the word ``step`` further."""
    draw = random.Random(seed)

    def row() -> dict[str, Any]:
        words = draw.choices(range(len(WORDS)), k=draw.randint(2, 5))
        target = [WORDS[(i + step) % len(WORDS)] for i in words]
        return {"source": " ".join(WORDS[i] for i in words), "target": " ".join(target)}

    sizes = {"train": 96, "tuning": 16, "test": 32}
    return {split: write_rows(folder / f"{split}.jsonl", [row() for _ in range(n)]) for split, n in sizes.items()}


class Net(nn.Module):
    """A model of one layer, called lin."""

    def __init__(self, lin: nn.Module) -> None:
        super().__init__()
        self.lin = lin

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)
