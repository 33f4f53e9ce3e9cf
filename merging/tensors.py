"""Tensors of a folder of safetensors files, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorFolder(Mapping[str, Tensor]):
    """A read-only mapping from names to tensors over one safetensors file, or the shards that an index names.

    Only headers are read at first; ``folder[name]`` reads one tensor. ``stem`` is "model" or "adapter_model".

    Raises:
        FileNotFoundError: there is neither ``<stem>.safetensors`` nor ``<stem>.safetensors.index.json``.
        ValueError: a file is truncated or corrupt, or the index names a shard that is missing, leads out of the folder,
            or lacks a tensor.
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        self.folder = folder
        index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        if index.is_file():
            self._shard_of = _read_index(index)
        elif single.is_file():
            self._shard_of = dict.fromkeys(_open(single).keys(), single.name)
        else:
            raise FileNotFoundError(f"no {single.name} and no {index.name} in {folder}{_other_weights(folder)}")
        self._files = {shard: _open(folder / shard) for shard in dict.fromkeys(self._shard_of.values())}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for name, shard in self._shard_of.items():
            self._inspect(name, shard)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[self._shard_of[name]].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)

    def __contains__(self, name: object) -> bool:
        return name in self._shard_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without reading it."""
        return self._dtypes[name]

    def _inspect(self, name: str, shard: str) -> None:
        try:
            view = self._files[shard].get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"the index of {self.folder} says that {name!r} is in {shard}, which lacks it") from error
        if view.get_dtype() not in DTYPES:
            raise ValueError(f"{name!r} in {self.folder / shard} is stored as {view.get_dtype()}, which cannot be read")
        self._shapes[name], self._dtypes[name] = tuple(view.get_shape()), DTYPES[view.get_dtype()]


def as_matrix(tensor: Tensor) -> Tensor:
    """Return the tensor as the (m, n) matrix that deltas speak of: (outputs, all else), or (1, n) for vectors."""
    return tensor.flatten(1) if tensor.ndim >= 2 else tensor.reshape(1, -1)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of ``as_matrix`` of a tensor of that shape."""
    columns = 1
    for size in shape[1:] if len(shape) >= 2 else shape:
        columns *= size
    return (shape[0] if len(shape) >= 2 else 1), columns


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or raise a ValueError that names the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} should hold a JSON object, it holds a {type(content).__name__}")
    return content


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is truncated or not a safetensors file ({reason}): copy or save it again") from error


def _read_index(index: Path) -> dict[str, str]:
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise ValueError(f"{index} lacks a 'weight_map' from tensor names to file names")
    for shard in dict.fromkeys(shard_of.values()):
        path = PurePath(shard)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{index} names the shard {shard!r}, which leads out of its folder")
        if not (index.parent / shard).is_file():
            raise ValueError(f"{index} names the shard {shard!r}, which is missing")
    return shard_of


def _other_weights(folder: Path) -> str:
    others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.gguf") for file in folder.glob(pattern))
    return f" (only safetensors are read: convert {others[0]})" if others else ""
