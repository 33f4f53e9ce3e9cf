"""A case for each kind of task: its base and words, two tasks, a stranger who scores its export, rows that are bad."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import (
    image_task,
    label_task,
    pair_task,
    save_bart,
    save_bert,
    save_llama,
    save_t5,
    save_vit,
    tag_task,
    text_task,
)
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

Words = dict[str, Any]
Rows = list[dict[str, Any]]
Stranger = Callable[[Path, Path, Rows, Words], dict[str, float]]  # (model, head, rows, task's words) -> scores
ALL_LINEAR = {"type": "hra", "r": 4, "target_modules": "all-linear"}
OF_ENCODER = ALL_LINEAR | {"exclude_modules": ["pooler.dense"]}


def naive_f1(found: list[list[str]], labels: list[list[str]]) -> float:
    """F1 of entities by runs of one type: a run begins anew at each B."""

    def spans(tags: list[str]) -> set[tuple[str, tuple[int, ...]]]:
        number, numbered = 0, []
        for place, (before, tag) in enumerate(zip(["O", *tags], tags, strict=False)):
            number += tag[0] == "B" or tag[1:] != before[1:]
            numbered.append((number, tag[2:], place, tag[0] != "O"))
        runs = groupby((each for each in numbered if each[3]), key=lambda each: each[:2])
        return {(kind, tuple(each[2] for each in run)) for (_, kind), run in runs}

    pairs = [(spans(a), spans(b)) for a, b in zip(found, labels, strict=True)]
    right = sum(len(a & b) for a, b in pairs)
    wrong = sum(len(a ^ b) for a, b in pairs)
    return 2 * right / (2 * right + wrong) if right + wrong else 0.0


# What a stranger computes from an export, one row at a time, by transformers alone


def head_of(file: Path) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    tensors, told = load_file(file), json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    return tensors["weight"], tensors["bias"], told["classes"]


def judged(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    hits = (logits.argmax(-1) == labels).float()
    return {"accuracy": hits.mean().item(), "loss": F.cross_entropy(logits, labels).item()}


def texts_by_stranger(model: Path, head: Path, rows: Rows, words: Words) -> dict[str, float]:
    encoder, tokenizer = AutoModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    weight, bias, classes = head_of(head)
    features = [encoder(**tokenizer(row["text"], return_tensors="pt")).last_hidden_state[0].mean(0) for row in rows]
    return judged(torch.stack(features) @ weight.T + bias, torch.tensor([classes.index(row["label"]) for row in rows]))


def tags_by_stranger(model: Path, head: Path, rows: Rows, words: Words) -> dict[str, float]:
    encoder, tokenizer = AutoModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    weight, bias, classes = head_of(head)
    logits = []
    for row in rows:
        read = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
        places = [read.word_ids().index(i) for i in range(len(row["tokens"]))]
        logits.append(encoder(**read).last_hidden_state[0, places] @ weight.T + bias)
    found = judged(torch.cat(logits), torch.tensor([classes.index(tag) for row in rows for tag in row["tags"]]))
    tags = [[classes[i] for i in each.argmax(-1)] for each in logits]
    return found | {"f1": naive_f1(tags, [row["tags"] for row in rows])}


def pictures_by_stranger(model: Path, head: Path, rows: Rows, words: Words) -> dict[str, float]:
    encoder, processor = AutoModel.from_pretrained(model).eval(), AutoImageProcessor.from_pretrained(model)
    weight, bias, classes = head_of(head)
    folder = Path(words["data"]["test"]).parent
    read = [processor(Image.open(folder / row["image"]), return_tensors="pt") for row in rows]
    features = torch.cat([encoder(**each).last_hidden_state.mean(1) for each in read])
    return judged(features @ weight.T + bias, torch.tensor([classes.index(row["label"]) for row in rows]))


def pairs_by_stranger(model: Path, head: Path, rows: Rows, words: Words) -> dict[str, float]:
    writer, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    total, count, same = 0.0, 0, 0
    for row in rows:
        read = tokenizer(row["source"], return_tensors="pt").input_ids
        labels = tokenizer(row["target"] + " [EOS]", return_tensors="pt").input_ids
        total += writer(input_ids=read, labels=labels).loss.item() * labels.numel()
        count += labels.numel()
        answer = writer.generate(input_ids=read, max_new_tokens=words["new_tokens"], do_sample=False)
        same += tokenizer.decode(answer[0], skip_special_tokens=True) == row["target"]
    return {"loss": total / count, "perplexity": math.exp(total / count), "exact_match": same / len(rows)}


def running_text_by_stranger(model: Path, head: Path, rows: Rows, words: Words) -> dict[str, float]:
    writer, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    stream = torch.tensor([token for row in rows for token in [*tokenizer(row["text"]).input_ids, 2]])
    size = words["block_size"]
    losses = [writer(input_ids=b[None], labels=b[None]).loss.item() for b in stream.split(size) if len(b) == size]
    return {"loss": sum(losses) / len(losses)}


# The table of cases


@dataclass(frozen=True)
class Case:
    """One kind on one architecture: its base, its words, the data of two tasks, a stranger, and rows that are bad."""

    kind: str
    architecture: str
    base: Callable[[Path], None]
    data: Callable[[Path, int, int], dict[str, str]]  # (folder, which task, seed) -> files
    stranger: Stranger
    bad: dict[str, tuple[dict[str, Any], str]]  # what is laid over a test row, and the line that answers it
    words: Words = field(default_factory=dict)
    training: Words = field(default_factory=dict)
    adapter: Words = field(default_factory=lambda: OF_ENCODER)

    @property
    def has_heads(self) -> bool:
        return self.kind.endswith("classification")

    def recipe(self, folder: Path, out: Path) -> Words:
        training = {"max_steps": 80, "per_device_train_batch_size": 16, "learning_rate": 1e-2} | self.training
        tasks = [{"name": name, "data": files(folder / name)} for name in "ab"]
        return {
            "name": "tiny",
            "base": str(folder / "base"),
            "output": str(out),
            "defaults": {"kind": self.kind, "adapter": self.adapter, "training": training} | self.words,
            "tasks": tasks,
            "merge": {"method": "task_arithmetic", "scale": 0.7, "refit_heads": self.has_heads},
        }


def files(folder: Path) -> dict[str, str]:
    return {split: str(folder / f"{split}.jsonl") for split in ("train", "tuning", "test")}


NO_LABEL = ({"label": "never"}, "a test: label 'never' is not in the train split, which has ")
PAIRS = {
    "kind": "seq2seq",
    "data": lambda folder, which, seed: pair_task(folder, 1 + 4 * which, seed),
    "stranger": pairs_by_stranger,
    "words": {"generate": True, "prompt": "w3 w4", "new_tokens": 8},
    "training": {"max_steps": 60},
    "adapter": ALL_LINEAR,
    "bad": {
        "no column": ({"target": None}, "a test: a row has no 'target', its columns are source, target"),
        "empty": ({"source": "  "}, "a test: 1 of 32 rows have an empty 'source': leave them out"),
    },
}
CASES = [
    Case(
        kind="classification",
        architecture="bert",
        base=save_bert,
        data=lambda folder, which, seed: label_task(folder, 2 * which, seed),
        stranger=texts_by_stranger,
        bad={
            "no column": ({"text": None}, "a test: a row has no 'text', its columns are text, label"),
            "unknown label": NO_LABEL,
            "empty": ({"text": ""}, "a test: 1 of 128 rows have an empty 'text': leave them out"),
        },
    ),
    Case(
        kind="token-classification",
        architecture="bert",
        base=lambda folder: save_bert(folder, initializer_range=0.1, dropout=0.0),
        data=lambda folder, which, seed: tag_task(folder, 3 * which, seed),
        stranger=tags_by_stranger,
        training={"max_steps": 60},
        adapter={"type": "lora", "r": 4, "target_modules": "all-linear", "exclude_modules": ["pooler.dense"]},
        bad={
            "no column": ({"tags": None}, "a test: a row has no 'tags', its columns are tokens, tags"),
            "unequal": ({"tags": ["O"]}, "a test: 'tokens' and 'tags' are two lists of one length above 0, got "),
            "no list": ({"tokens": "w1 w2"}, "a test: 'tokens' and 'tags' are two lists of one length above 0, got "),
            "empty": ({"tokens": [], "tags": []}, "a test: 'tokens' and 'tags' are two lists of one length above 0"),
            "unknown label": ({"tokens": ["w1"], "tags": ["B-y"]}, "a test: label 'B-y' is not in the train split"),
            "no word": ({"tokens": [" "], "tags": ["O"]}, "a test: no word of ' ' fits 128 tokens"),
        },
    ),
    Case(
        kind="image-classification",
        architecture="vit",
        base=save_vit,
        data=lambda folder, which, seed: image_task(folder, (("disc", "cross"), ("disc", "ring"))[which], seed),
        stranger=pictures_by_stranger,
        training={"max_steps": 40},
        bad={
            "no column": ({"image": None}, "a test: a row has no 'image', its columns are image, label"),
            "unknown label": NO_LABEL,
            "not there": ({"image": "none.png"}, "a test: no such picture: "),
            "broken": ({"image": "test.jsonl"}, "a test: "),
            "no picture": ({"image": 3}, "a test: 3 cannot be read as a picture: expected a path, or the bytes of a "),
        },
    ),
    Case(architecture="t5", base=save_t5, **PAIRS),
    Case(architecture="bart", base=save_bart, **PAIRS),
    Case(
        kind="causal-lm",
        architecture="llama",
        base=save_llama,
        data=lambda folder, which, seed: text_task(folder, 1 + 4 * which, seed),
        stranger=running_text_by_stranger,
        training={"max_steps": 30},
        words={"block_size": 16, "prompt": "w0 w1"},
        bad={"no column": ({"text": None}, "a test: a row has no 'text', its columns are text")},
        adapter=ALL_LINEAR,
    ),
]
