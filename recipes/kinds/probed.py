"""Kinds whose logits are linear in features: a probe, fitted on the frozen base, is kept under the adapter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthoft.recipes.head import Head, fit_probe
from orthoft.recipes.kinds.kind import IGNORED, Batch, Example, Kind, Scores, TaskData, on_device
from orthoft.recipes.metrics import accuracy, macro_f1
from orthoft.recipes.task_schema import TaskBase

T = TypeVar("T", bound=TaskBase)


class Probed(Kind[T]):
    """A frozen linear probe on features of the base, then an adapter under it."""

    auto = "AutoModel"

    @abstractmethod
    def features(self, encoder: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return features (..., d) in float32, one for each label (...) of the batch."""

    @abstractmethod
    def reading(self) -> dict[str, Any]:
        """Return in words how features are made: enough to make them without this library."""

    def about(self, data: TaskData) -> str:
        return f"{len(data.classes)} classes"

    def trained(self, model: nn.Module, head: Head | None) -> nn.Module:
        assert head is not None
        return Classifier(self, model, head)

    def fit(self, model: nn.Module, data: TaskData, size: int) -> Head:
        what = f"{self.task.name} probe"
        found = [self.seen(model, self.batches(part, size, what)) for part in (data.train, data.tuning)]
        return fit_probe(found[0], found[1], data.classes, self.reading())

    def score(self, model: nn.Module, head: Head | None, examples: Sequence[Example], size: int, what: str) -> Scores:
        assert head is not None
        x, y = self.seen(model, self.batches(examples, size, what))
        logits = head.logits(x)
        found = logits.argmax(-1)
        return {
            "accuracy": accuracy(found, y),
            "f1": macro_f1(found, y, len(head.classes)),
            "loss": F.cross_entropy(logits, y).item(),
        }

    @torch.no_grad()
    def seen(self, encoder: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        """Return features (N, d) and labels (N,) of all that has a label, on the CPU."""
        encoder.eval()
        features, labels = [], []
        for batch in batches:
            y = batch.pop("labels")
            features.append(self.features(encoder, on_device(batch, encoder)).cpu()[y != IGNORED])
            labels.append(y[y != IGNORED])
        return torch.cat(features), torch.cat(labels)


class Classifier(nn.Module):
    """An encoder under a frozen head; speaks the Trainer's language."""

    def __init__(self, kind: Probed[T], encoder: nn.Module, head: Head) -> None:
        super().__init__()
        self.kind, self.encoder, self.head = kind, encoder, head

    def forward(self, labels: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        logits = self.head.logits(self.kind.features(self.encoder, inputs))  # (..., classes)
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
        return {"loss": loss, "logits": logits}
