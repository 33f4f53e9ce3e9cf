"""Scores of predictions, as plain functions."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(found: Tensor, labels: Tensor) -> float:
    """Return the share of predictions (N,) that equal their labels (N,)."""
    return (found == labels).float().mean().item()


def macro_f1(found: Tensor, labels: Tensor, classes: int) -> float:
    """Return the mean over classes of ``2 tp / (2 tp + fp + fn)``, of predictions and labels (N,).

    A class that is neither predicted nor a label does not count.
    """
    hits = torch.bincount(labels[found == labels], minlength=classes)
    total = torch.bincount(found, minlength=classes) + torch.bincount(labels, minlength=classes)  # 2 tp + fp + fn
    return (2 * hits[total > 0] / total[total > 0]).mean().item()
