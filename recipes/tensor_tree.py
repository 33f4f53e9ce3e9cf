"""Nested states (of optimizers, schedules, random generators) as safetensors: tensors and JSON, no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from orthoft.adapter import whole

WORDS = "tree"  # the key of the JSON in the file's metadata


def write_tree(file: Path, tree: Any) -> None:
    """Write a tree of mappings, lists, tuples, tensors and plain values; sharded tensors must have been gathered.

    Raises:
        TypeError: something else is in it.
    """
    tensors: dict[str, Tensor] = {}
    words = json.dumps(_words(tree, tensors))
    save_file(tensors, file, {WORDS: words})


def read_tree(file: Path) -> Any:
    """Return what `write_tree` wrote, with its tensors on the CPU."""
    with safe_open(file, framework="pt") as tensors:
        return _tree(json.loads(tensors.metadata()[WORDS]), tensors)


def gathered(tree: Any) -> Any:
    """Return a tree whose sharded tensors are whole; every process has to call it."""
    if isinstance(tree, Tensor):
        return whole(tree.detach())
    if isinstance(tree, Mapping):
        return {key: gathered(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value) for value in tree)
    return tree


def _words(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Return JSON for a tree, where a tensor is the name under which it is put into ``tensors``."""
    if isinstance(tree, Tensor):
        name = str(len(tensors))
        tensors[name] = tree.detach().cpu().contiguous().clone()  # a file holds no shared memory
        return {"tensor": name}
    if isinstance(tree, Mapping):  # pairs: JSON would turn keys that are numbers into texts
        return {"mapping": [[key, _words(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return {type(tree).__name__: [_words(value, tensors) for value in tree]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"expected tensors and plain values in a state, got {type(tree).__name__}")


def _tree(words: Any, tensors: Any) -> Any:
    if not isinstance(words, dict):
        return words
    ((kind, value),) = words.items()
    if kind == "tensor":
        return tensors.get_tensor(value)
    if kind == "mapping":
        return {key: _tree(inner, tensors) for key, inner in value}
    found = [_tree(inner, tensors) for inner in value]
    return tuple(found) if kind == "tuple" else found
