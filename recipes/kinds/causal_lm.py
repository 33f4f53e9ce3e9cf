"""Next-token prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from orthoft.recipes.data import Row
from orthoft.recipes.head import Head
from orthoft.recipes.kinds.kind import (
    IGNORED,
    Batch,
    Example,
    Kind,
    Scores,
    TaskData,
    on_device,
    padded,
    padded_labels,
)
from orthoft.recipes.task_schema import CausalLM


class CausalLanguageModel(Kind[CausalLM]):
    """Running text in blocks of ``block_size`` tokens."""

    auto = "AutoModelForCausalLM"
    peft_task = "CAUSAL_LM"

    def columns(self) -> list[str]:
        return [self.task.data.text]

    def about(self, data: TaskData) -> str:
        return f"blocks of {len(data.train[0]['input_ids'])}"

    def examples(self, rows: Sequence[Row], classes: Sequence[str], split: str) -> list[Example]:
        """Return blocks of the texts one after the other, each text ended by the end-of-text token."""
        texts = [str(row[self.task.data.text]) for row in rows]
        end = [] if self.processor.eos_token_id is None else [self.processor.eos_token_id]
        stream = [token for ids in self.processor(texts, verbose=False)["input_ids"] for token in [*ids, *end]]
        size, name = self.task.block_size, f"{self.task.name} {split}"
        blocks = [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]
        if not blocks:
            raise ValueError(f"{name}: {len(stream)} tokens do not fill one block of {size}; lower block_size")
        return [{"input_ids": block, "labels": block} for block in blocks]

    def texts(self, texts: Sequence[str]) -> list[Example]:
        ids = self.processor(list(texts), truncation=True, max_length=self.task.block_size)["input_ids"]
        return [{"input_ids": each, "labels": each} for each in ids]

    def collate(self, examples: Sequence[Example]) -> Batch:
        return padded(examples, self.processor.pad_token_id) | {"labels": padded_labels(examples)}

    @torch.no_grad()
    def score(self, model: nn.Module, head: Head | None, examples: Sequence[Example], size: int, what: str) -> Scores:
        """Return the mean loss per predicted token (nats), and its exponential."""
        model.eval()
        total, count = 0.0, 0
        for batch in self.batches(examples, size, what):
            there = on_device(batch, model)
            labels = there.pop("labels")[:, 1:]  # (b, t - 1)
            logits = model(**there).logits[:, :-1].flatten(0, 1).float()
            total += F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum").item()
            count += int((labels != IGNORED).sum())
        loss = total / count
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    @property
    def prompt(self) -> str | None:
        return self.task.prompt

    @torch.no_grad()
    def sample(self, model: Any) -> str | None:
        """Return the greedy continuation of the task's prompt: the same model writes the same text."""
        if self.prompt is None:
            return None
        model.eval()
        tokenizer = self.processor
        inputs = tokenizer(self.prompt, return_tensors="pt").to(next(model.parameters()).device)
        inputs.pop("token_type_ids", None)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        written = model.generate(**inputs, max_new_tokens=self.task.new_tokens, do_sample=False, pad_token_id=pad)
        return str(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
