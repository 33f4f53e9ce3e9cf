"""The head of a task with classes: a linear probe of the frozen base, which stays as it is or trains with the adapter.

It makes the base's score an honest baseline: whatever an expert gains over it, the training learnt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from orthoft.recipes.whole import write_whole, write_whole_json

DECAYS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Head:
    """``logits = features W^T + b``: W (classes, d), b (classes,); ``features`` says in words how they are made.

    ``probe`` is what a trained head began with.
    """

    weight: Tensor
    bias: Tensor
    classes: list[str]
    features: Mapping[str, Any]
    decay: float
    probe: Head | None = None

    @property
    def start(self) -> Head:
        """The probe of the frozen base, which the base is scored with."""
        return self if self.probe is None else self.probe

    def logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight.to(features.device), self.bias.to(features.device))

    def save(self, path: Path) -> None:
        """Write ``path`` (safetensors) and beside it the words (json): enough to classify without this library."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"weight": self.weight, "bias": self.bias}
        if self.probe is not None:
            tensors |= {"probe.weight": self.probe.weight, "probe.bias": self.probe.bias}
        write_whole(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        words = {"classes": self.classes, "features": dict(self.features), "decay": self.decay}
        write_whole_json(path.with_suffix(".json"), words)

    @classmethod
    def load(cls, path: Path) -> Head:
        words = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        tensors = load_file(path)
        of_probe = {name: tensors.pop(f"probe.{name}") for name in ("weight", "bias") if f"probe.{name}" in tensors}
        return cls(**tensors, **words, probe=cls(**of_probe, **words) if of_probe else None)


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the tokens that are not padding, in float32: (b, t, d), (b, t) -> (b, d)."""
    kept = mask[..., None].to(torch.float32)
    return (hidden.float() * kept).sum(1) / kept.sum(1).clamp(min=1)


def fit_probe(
    train: tuple[Tensor, Tensor], tuning: tuple[Tensor, Tensor], classes: list[str], features: Mapping[str, Any]
) -> Head:
    """Return the multinomial logistic regression on standardised features whose L2 decay does best on ``tuning``.

    Convex and fitted to convergence by L-BFGS from zero, so the same features give the same head. The
    standardisation is folded into the weights.
    """
    x, y = train
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    fits = [(*_logistic((x - mean) / std, y, len(classes), decay), decay) for decay in DECAYS]
    heads = [Head(W / std, b - W @ (mean / std), classes, features, decay) for W, b, decay in fits]
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
