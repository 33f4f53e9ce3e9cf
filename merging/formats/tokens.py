"""PEFT's trained tokens on disk: a few rows of an embedding, by themselves or beside a LoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orthoft.delta import Delta
from orthoft.merging.formats.fields import Field, needed
from orthoft.merging.formats.registry import Config, Extent, Shapes, Tensors, reader
from orthoft.merging.sources.rows import replaced_rows

TOKENS = ".token_adapter.trainable_tokens_delta"  # the end of the names beside a LoRA


def _are_indices(value: Any) -> bool:
    return isinstance(value, list) and all(type(index) is int and abs(index) < 2**62 for index in value)


def token_indices(config: Config, module: str) -> list[int]:
    """Return which rows of a module's weight are trained, from ``trainable_token_indices``.

    Raises:
        ValueError: the field is neither a list nor an object from modules to lists, or does not name the module.
    """
    told = config.get("trainable_token_indices")
    if isinstance(told, dict):
        told = next((told[name] for name in told if f".{module}".endswith(f".{name}")), None)
    if not _are_indices(told):
        raise ValueError("'trainable_token_indices' in its configuration is no list of whole numbers for it")
    return list(told or [])


def _extent(config: Config, shapes: Shapes) -> Extent:
    rows, columns = shapes["trainable_tokens_delta"]
    return Extent(None, columns, rows)


def same_when_tied(head: Tensors, embedding: Tensors) -> bool:
    """Say whether the rows of an output head are those of the embedding."""
    return torch.equal(head["trainable_tokens_delta"], embedding["trainable_tokens_delta"])


INDICES = Field("a list of whole numbers", _are_indices)


@reader(
    "TRAINABLE_TOKENS",
    prefix="trainable_tokens_",
    extent=_extent,
    fields={"token_indices": needed(INDICES)},
    names=frozenset(["trainable_tokens_delta"]),
    same=same_when_tied,
)
def trainable_tokens(config: Config, module: str, tensors: Tensors, weight: Tensor) -> Delta:
    """``W'`` has the saved rows in place of those of the trained tokens: a change of as many ranks."""
    try:
        return replaced_rows(config["token_indices"], tensors["trainable_tokens_delta"], weight)
    except ValueError as error:
        raise ValueError(f"module {module!r}: {error}") from error
