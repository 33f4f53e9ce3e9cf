"""Scores on held-out data: accuracy and loss, or token loss, perplexity and a sample of generated text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthoft.merging.files.tensors import TensorFolder
from orthoft.recipes.head import Head, all_features

Scores = dict[str, float]


def score(model: nn.Module, head: Head | None, batches: Iterable[dict[str, Tensor]]) -> Scores:
    """Return a model's scores: of its language head, or of a classification head that is given."""
    return causal_lm(model, batches) if head is None else classification(model, head, batches)


def classification(encoder: nn.Module, head: Head, batches: Iterable[dict[str, Tensor]]) -> Scores:
    """Return accuracy and mean cross-entropy of a head on an encoder."""
    x, y = all_features(encoder, batches)
    logits = head.logits(x)
    return {
        "accuracy": (logits.argmax(-1) == y).float().mean().item(),
        "loss": F.cross_entropy(logits, y).item(),
    }


@torch.no_grad()
def causal_lm(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Scores:
    """Return the mean loss per predicted token (nats), and its exponential."""
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for batch in batches:
        ids = batch["input_ids"].to(device)  # (b, t)
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"].to(device)).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    loss = total / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """Return the greedy continuation of ``prompt``: the same model writes the same text."""
    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt").to(next(model.parameters()).device)
    inputs.pop("token_type_ids", None)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    written = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=pad)
    return str(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def export_check(base: Path, merged: Path, norms: Mapping[str, float]) -> float:
    """Return the largest ``| ||W' - W|| - ||D|| | / ||W'||`` over the merged weights: disk against delta.

    Storing ``W' = W + D`` rounds it by at most half the machine epsilon of its dtype, so neither norm of the change
    may differ by more than that from the norm of ``D`` that the merge reports (and that one is good to float32).

    Raises:
        RuntimeError: a weight differs by more.
    """
    before, after = TensorFolder(base), TensorFolder(merged)
    worst = 0.0
    for name, norm in norms.items():
        stored = after[name]
        change = torch.linalg.vector_norm(stored.double() - before[name].double()).item()
        size = torch.linalg.vector_norm(stored.double()).item()
        difference = abs(change - norm)
        if difference > torch.finfo(stored.dtype).eps * size + 1e-4 * norm:
            raise RuntimeError(f"{name} in {merged} changed by {change:.6g}, the merged delta has norm {norm:.6g}")
        worst = max(worst, difference / size if size else 0.0)
    return worst
