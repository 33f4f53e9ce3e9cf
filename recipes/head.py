"""The classification head: mean pooling, and a linear probe of the frozen base that stays frozen under the adapter.

It makes the base's score an honest baseline: whatever an expert gains over it, the adapter learnt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Head:
    """``logits = features W^T + b`` on mean-pooled features: W (classes, d), b (classes,)."""

    weight: Tensor
    bias: Tensor
    classes: list[str]
    max_length: int
    decay: float

    def logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight.to(features.device), self.bias.to(features.device))

    def save(self, path: Path) -> None:
        """Write ``path`` (safetensors) and beside it the words (json): enough to classify without this library."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}, path)
        words = {"classes": self.classes, "pooling": "mean", "max_length": self.max_length, "decay": self.decay}
        path.with_suffix(".json").write_text(json.dumps(words, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Head:
        words = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        del words["pooling"]
        return cls(**load_file(path), **words)


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the tokens that are not padding, in float32: (b, t, d), (b, t) -> (b, d)."""
    kept = mask[..., None].to(torch.float32)
    return (hidden.float() * kept).sum(1) / kept.sum(1).clamp(min=1)


class Classifier(nn.Module):
    """An encoder under a frozen head; speaks the Trainer's language."""

    def __init__(self, encoder: nn.Module, head: Head) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head.logits(features(self.encoder, input_ids, attention_mask))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def features(encoder: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the pooled last hidden states (b, d)."""
    hidden = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return pooled(hidden, attention_mask)


@torch.no_grad()
def all_features(encoder: nn.Module, batches: Iterable[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return pooled features (N, d) and labels (N,) of every batch, on the CPU."""
    encoder.eval()
    device = next(encoder.parameters()).device
    found = [
        (features(encoder, b["input_ids"].to(device), b["attention_mask"].to(device)).cpu(), b["labels"])
        for b in batches
    ]
    return torch.cat([f for f, _ in found]), torch.cat([y for _, y in found])


def fit_probe(train: tuple[Tensor, Tensor], tuning: tuple[Tensor, Tensor], classes: list[str], max_length: int) -> Head:
    """Return the multinomial logistic regression on standardised features whose L2 decay does best on ``tuning``.

    Convex and fitted to convergence by L-BFGS from zero, so the same features give the same head. The
    standardisation is folded into the weights.
    """
    x, y = train
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    fits = [(*_logistic((x - mean) / std, y, len(classes), decay), decay) for decay in DECAYS]
    heads = [Head(W / std, b - W @ (mean / std), classes, max_length, decay) for W, b, decay in fits]
    return min(heads, key=lambda head: F.cross_entropy(head.logits(tuning[0]), tuning[1]).item())


def _logistic(x: Tensor, y: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    """Minimise ``cross_entropy(x W^T + b, y) + decay/2 ||W||^2`` for W (classes, d), b (classes,)."""
    W = torch.zeros(classes, x.shape[1], requires_grad=True)
    b = torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([W, b], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(F.linear(x, W, b), y) + decay / 2 * W.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    return W.detach(), b.detach()
