"""A text for a text: translation, summaries, answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthoft.recipes.data import Row
from orthoft.recipes.head import Head
from orthoft.recipes.kinds.kind import (
    IGNORED,
    Batch,
    Example,
    TaskData,
    filled,
    label_loss,
    on_device,
    padded,
    padded_labels,
)
from orthoft.recipes.kinds.writing import Writing
from orthoft.recipes.task_schema import Seq2Seq


class SequenceToSequence(Writing[Seq2Seq]):
    """An encoder reads the source, a decoder writes the target and the end-of-text token."""

    auto = Seq2Seq.auto
    peft_task = "SEQ_2_SEQ_LM"

    def columns(self) -> list[str]:
        return [self.task.data.source, self.task.data.target]

    def about(self, data: TaskData) -> str:
        lengths = [len(example["labels"]) for example in data.train]
        return f"targets of {min(lengths)} to {max(lengths)} tokens"

    def examples(self, rows: Sequence[Row], classes: Sequence[str], split: str) -> list[Example]:
        where = f"{self.task.name} {split}"
        sources, targets = (filled(rows, column, where) for column in self.columns())
        read = self.sources(sources)["input_ids"]
        return [
            {"input_ids": ids, "labels": self.labels(target), "target": target}
            for ids, target in zip(read, targets, strict=True)
        ]

    def sources(self, texts: Sequence[str], **options: Any) -> Any:
        """Return the tokens of sources behind the prefix."""
        texts = [self.task.prefix + text for text in texts]
        return self.processor(texts, truncation=True, max_length=self.task.max_source_length, **options)

    def labels(self, target: str) -> list[int]:
        """Return the tokens of a target, which the end-of-text token ends even where the tokenizer adds none."""
        most, end = self.task.max_target_length, self.processor.eos_token_id
        ids: list[int] = self.processor(text_target=target, truncation=True, max_length=most)["input_ids"]
        return ids if end is None or ids[-1:] == [end] else [*ids[: most - 1], end]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return a batch whose sources and targets differ in length, so that a layer's inputs tell which they are."""
        batch, labels = padded(examples, self.processor.pad_token_id), padded_labels(examples)
        if labels.shape == batch["input_ids"].shape:
            labels = F.pad(labels, (0, 1), value=IGNORED)
        return batch | {"decoder_attention_mask": (labels != IGNORED).long(), "labels": labels}

    def inputs(self, model: Any, batch: Batch) -> Batch:
        shifted: Tensor = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        return super().inputs(model, batch) | {"decoder_input_ids": shifted}

    def trained(self, model: nn.Module, head: Head | None) -> nn.Module:
        return Writer(model)

    def predicted(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        chosen = batch["labels"] != IGNORED  # (b, u)
        return model(**batch).logits[chosen], batch["labels"][chosen]

    def answers(self, model: Any, examples: Sequence[Example], batch: Batch) -> list[tuple[str, str]]:
        return list(zip(self.written(model, batch), (example["target"] for example in examples), strict=True))

    def written(self, model: Any, batch: Batch) -> list[str]:
        """Return the greedy answer to each source: the same model writes the same text."""
        read = {key: batch[key] for key in ("input_ids", "attention_mask")}
        found = model.generate(**read, max_new_tokens=self.task.new_tokens, do_sample=False, num_beams=1)
        return [str(text) for text in self.processor.batch_decode(found, skip_special_tokens=True)]

    @torch.no_grad()
    def sample(self, model: nn.Module) -> str | None:
        if self.prompt is None:
            return None
        model.eval()
        read = on_device(self.sources([self.prompt], return_tensors="pt"), model)
        return self.written(model, read)[0]


class Writer(nn.Module):
    """An encoder and a decoder with the loss that the Trainer wants: their own is a mean over each batch alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def _no_split_modules(self) -> Any:
        """The layers by which FSDP2 groups weights."""
        return getattr(self.model, "_no_split_modules", None)

    def forward(
        self, labels: Tensor, num_items_in_batch: Tensor | float | None = None, **inputs: Tensor
    ) -> dict[str, Tensor]:
        logits = self.model(labels=labels, **inputs).logits  # (b, u, words)
        return {"loss": label_loss(logits.float(), labels, num_items_in_batch), "logits": logits}
