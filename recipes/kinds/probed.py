"""Kinds whose logits are linear in features: a probe, fitted on the frozen base, is the head over the adapter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from orthoft.recipes.head import Head, fit_probe
from orthoft.recipes.kinds.kind import IGNORED, Batch, Example, Kind, Scores, TaskData, label_loss, on_device
from orthoft.recipes.metrics import accuracy, macro_f1
from orthoft.recipes.task_schema import ProbedTask

T = TypeVar("T", bound=ProbedTask)


class Seen(NamedTuple):
    """Of all that has a label: features (N, d), labels (N,), and the number of its example (N,), which ascends."""

    features: Tensor
    labels: Tensor
    examples: Tensor


class Probed(Kind[T]):
    """A linear probe on features of the base, then an adapter under it."""

    auto = ProbedTask.auto

    @abstractmethod
    def features(self, encoder: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return features (..., d) in float32, one for each label (...) of the batch."""

    @abstractmethod
    def reading(self) -> dict[str, Any]:
        """Return in words how features are made: enough to make them without this library."""

    def f1(self, found: Tensor, seen: Seen, classes: Sequence[str]) -> float:
        """Return the F1 score of predictions (N,)."""
        return macro_f1(found, seen.labels, len(classes))

    def about(self, data: TaskData) -> str:
        return f"{len(data.classes)} classes"

    def trained(self, model: nn.Module, head: Head | None) -> nn.Module:
        assert head is not None
        return Classifier(self, model, head)

    def learnt(self, trained: nn.Module, head: Head | None) -> Head | None:
        if self.task.head == "frozen":
            return None
        assert isinstance(trained, Classifier)
        assert head is not None
        parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in (trained.weight, trained.bias)]
        weight, bias = (part.detach().float().cpu() for part in parts)
        return replace(head, weight=weight, bias=bias, probe=head.start)

    def fit(self, model: nn.Module, data: TaskData, size: int) -> Head:
        what = f"{self.task.name} probe"
        train, tuning = (self.seen(model, self.batches(part, size, what)) for part in (data.train, data.tuning))
        return fit_probe(train[:2], tuning[:2], data.classes, self.reading())

    def score(self, model: nn.Module, head: Head | None, examples: Sequence[Example], size: int, what: str) -> Scores:
        assert head is not None
        seen = self.seen(model, self.batches(examples, size, what))
        logits = head.logits(seen.features)
        found = logits.argmax(-1)
        return {
            "accuracy": accuracy(found, seen.labels),
            "f1": self.f1(found, seen, head.classes),
            "loss": F.cross_entropy(logits, seen.labels).item(),
        }

    @torch.no_grad()
    def seen(self, encoder: nn.Module, batches: Iterable[Batch]) -> Seen:
        """Return the features of all that has a label, on the CPU."""
        encoder.eval()
        found, count = list[Seen](), 0
        for batch in batches:
            y = batch.pop("labels")  # (b, ...)
            labelled = y != IGNORED
            features = self.features(encoder, on_device(batch, encoder)).cpu()
            found.append(Seen(features[labelled], y[labelled], labelled.nonzero()[:, 0] + count))
            count += len(y)
        return Seen(*(torch.cat(parts) for parts in zip(*found, strict=True)))


class Classifier(nn.Module):
    """An encoder under a head, which trains if the task says so; speaks the Trainer's language."""

    weight: Tensor
    bias: Tensor

    def __init__(self, kind: Probed[T], encoder: nn.Module, head: Head) -> None:
        super().__init__()
        self.kind, self.encoder = kind, encoder
        device = next(encoder.parameters()).device
        for name, tensor in (("weight", head.weight), ("bias", head.bias)):
            if kind.task.head == "trained":
                self.register_parameter(name, nn.Parameter(tensor.to(device, copy=True)))
            else:
                self.register_buffer(name, tensor.to(device), persistent=False)

    @property
    def _no_split_modules(self) -> Any:
        """The encoder's layers, by which FSDP2 groups weights."""
        return getattr(self.encoder, "_no_split_modules", None)

    def forward(
        self, labels: Tensor, num_items_in_batch: Tensor | float | None = None, **inputs: Tensor
    ) -> dict[str, Tensor]:
        """Return logits, and the mean loss over the labels here, or over as many as the whole step has."""
        logits = F.linear(self.kind.features(self.encoder, inputs), self.weight, self.bias)  # (..., classes)
        return {"loss": label_loss(logits, labels, num_items_in_batch), "logits": logits}
