"""Texts with a class each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthoft.recipes.data import Row
from orthoft.recipes.head import pooled
from orthoft.recipes.kinds.kind import Batch, Example, class_indices, class_names, filled, padded
from orthoft.recipes.kinds.probed import Probed
from orthoft.recipes.task_schema import Classification


class SequenceClassification(Probed[Classification]):
    """Features are the mean over the tokens of the last hidden states."""

    def columns(self) -> list[str]:
        return [self.task.data.text, self.task.data.label]

    def classes(self, rows: Sequence[Row]) -> list[str]:
        return class_names([row[self.task.data.label] for row in rows])

    def examples(self, rows: Sequence[Row], classes: Sequence[str], split: str) -> list[Example]:
        where = f"{self.task.name} {split}"
        labels = class_indices([row[self.task.data.label] for row in rows], classes, where)
        found = self.texts(filled(rows, self.task.data.text, where))
        return [example | {"labels": label} for example, label in zip(found, labels, strict=True)]

    def texts(self, texts: Sequence[str]) -> list[Example]:
        ids = self.processor(list(texts), truncation=True, max_length=self.task.max_length)["input_ids"]
        return [{"input_ids": each} for each in ids]

    def collate(self, examples: Sequence[Example]) -> Batch:
        labels = torch.tensor([example.get("labels", 0) for example in examples])
        return padded(examples, self.processor.pad_token_id) | {"labels": labels}

    def reading(self) -> dict[str, Any]:
        return {"pooling": "mean", "max_length": self.task.max_length}

    def features(self, encoder: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return pooled(encoder(**inputs).last_hidden_state, inputs["attention_mask"])
