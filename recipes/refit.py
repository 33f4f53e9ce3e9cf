"""Heads fitted anew on what a merged model makes of each task's rows: the merge moved the features that they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from orthoft.recipes.expert import Ready
from orthoft.recipes.layout import HEADS


def refitted(model: nn.Module, ready: Sequence[Ready], folder: Path, size: int) -> list[Ready]:
    """Return the tasks with probes of the merged model's features in place of those of the base's, saved in ``folder``.

    The same regression as the first probe, on the same rows of the train and tuning splits: the model does not change.
    """
    heads = {one.task.name: one.kind.fit(model, one.data, size) for one in ready}
    for name, head in heads.items():
        head.save(folder / HEADS / f"{name}.safetensors")
    return [replace(one, head=heads[one.task.name]) for one in ready]
