"""Tensors of a folder of safetensors files, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from io import FileIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from orthoft.merging.files.header import DTYPES, one_line, parse_json, read_header

__all__ = ["DTYPES", "TensorFolder", "as_matrix", "matrix_shape", "read_json", "same_tensor"]

CHUNK = 2**24  # entries that are compared at once
MAX_JSON = 100_000_000  # bytes; the index of a model with 100,000 tensors has a tenth of it
OTHERS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf")  # formats of weights that are not read
STATE = ("optimizer*", "scheduler.*", "rng_state*", "training_args.*")  # of a training run, no weights


class TensorFolder(Mapping[str, Tensor]):
    """A read-only mapping from names to tensors over one safetensors file, or the shards that an index names.

    Where a folder has both, the file is read, as by transformers, which ``notes`` tell.

    Only headers are read at first, and checked; ``folder[name]`` reads one tensor, ``rows`` a part of one. ``stem`` is
    "model" or "adapter_model". Links are followed, as the cache of the Hub consists of them. Files are read and not
    mapped: the pages of a mapping count as memory of the process for as long as the system has room for them.

    Raises:
        FileNotFoundError: there is neither ``<stem>.safetensors`` nor ``<stem>.safetensors.index.json``.
        ValueError: a file is truncated or corrupt, or the index names a shard that is missing, leads out of the folder,
            or lacks a tensor.
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        self.folder = folder
        index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        if not index.is_file() and not single.is_file():
            raise FileNotFoundError(f"no {single.name} and no {index.name} in {folder}{_other_weights(folder)}")
        shard_of = {} if single.is_file() else _read_index(index)
        shards = [single.name] if single.is_file() else list(dict.fromkeys(shard_of.values()))
        both = f"{folder} holds {single.name} and {index.name}: the first is read, as by transformers"
        self.notes = [both] if single.is_file() and index.is_file() else []
        headers = {shard: read_header(folder / shard) for shard in shards}
        for name, shard in shard_of.items():
            if name not in headers[shard]:
                raise ValueError(f"the index {index} says that {name!r} is in {shard}, which lacks it")
        # Like transformers, take what stands in a shard unknown to the index.
        unnamed = {name: shard for shard, header in headers.items() for name in header if name not in shard_of}
        self._shard_of = shard_of | unnamed
        self._entries = {name: headers[shard][name] for name, shard in self._shard_of.items()}
        self._files = {shard: FileIO(folder / shard) for shard in shards}
        self._data = {shard: 8 + int.from_bytes(file.read(8), "little") for shard, file in self._files.items()}

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        return self._read(name, 0, entry.stop - entry.start).reshape(entry.shape)

    def rows(self, name: str, start: int, stop: int, columns: int | None = None) -> Tensor:
        """Return the rows ``start`` to ``stop`` of ``as_matrix(folder[name])``, reading no others.

        With a number of ``columns`` the rows are as long as that.
        """
        m, n = matrix_shape(self.shape(name))
        m, n = (m * n // columns, columns) if columns else (m, n)
        start, stop, _ = slice(start, stop).indices(m)
        count, size = max(stop - start, 0), n * self.dtype(name).itemsize
        return self._read(name, start * size, (start + count) * size).reshape(count, n)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)

    def __contains__(self, name: object) -> bool:
        return name in self._shard_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without reading it."""
        return self._entries[name].dtype

    def place(self, name: str) -> tuple[Path, int, int]:
        """Return the file of a tensor, the offset of its first byte there, and the number of its bytes."""
        shard, entry = self._shard_of[name], self._entries[name]
        return self.folder / shard, self._data[shard] + entry.start, entry.stop - entry.start

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the entries of a tensor in its bytes ``start`` to ``stop``."""
        buffer = torch.empty(stop - start, dtype=torch.uint8)
        fill(buffer, self._files[self._shard_of[name]], self.place(name)[1] + start)
        return buffer.view(self.dtype(name))


def fill(buffer: Tensor, file: FileIO, start: int) -> None:
    """Read the bytes behind ``start`` of a file into all of a uint8 tensor.

    Raises:
        ValueError: the file ends before.
    """
    view, done = buffer.numpy().data, 0
    file.seek(start)
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise ValueError(f"{file.name} became shorter while it was read: start the merge again")
        done += count


def is_finite(tensor: Tensor) -> bool:
    """Say whether there is neither NaN nor Inf, at the price of a sum where there is none."""
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())


def as_matrix(tensor: Tensor) -> Tensor:
    """Return the tensor as the (m, n) matrix that deltas speak of: (outputs, all else), or (1, n) for vectors."""
    return tensor.flatten(1) if tensor.ndim >= 2 else tensor.reshape(1, -1)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of ``as_matrix`` of a tensor of that shape."""
    columns = 1
    for size in shape[1:] if len(shape) >= 2 else shape:
        columns *= size
    return (shape[0] if len(shape) >= 2 else 1), columns


def same_tensor(folder: TensorFolder, name: str, other: TensorFolder, twin: str) -> bool:
    """Say whether two tensors on disk have the same dtype, shape and bytes, reading some rows at a time."""
    shape = folder.shape(name)
    if shape != other.shape(twin) or folder.dtype(name) != other.dtype(twin):
        return False
    rows, columns = matrix_shape(shape)
    step = max(CHUNK // max(columns, 1), 1)
    parts = (
        (source.rows(key, i, i + step) for source, key in ((folder, name), (other, twin))) for i in range(0, rows, step)
    )
    return all(
        torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
        for first, second in parts
    )


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or raise a ValueError that names the file."""
    if (size := file.stat().st_size) > MAX_JSON:
        raise ValueError(f"{file} has {size} bytes, which is too much for a JSON file of a model")
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} should hold a JSON object, it holds a {type(content).__name__}")
    return content


def _read_index(index: Path) -> dict[str, str]:
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise ValueError(f"{index} lacks a 'weight_map' from tensor names to file names")
    for shard in dict.fromkeys(shard_of.values()):
        if not _stays_inside(shard):
            raise ValueError(f"{index} names the shard {shard!r}, which leads out of its folder")
        if not _is_file(index.parent / shard):
            raise ValueError(f"{index} names the shard {shard!r}, which is missing")
    return shard_of


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _stays_inside(shard: str) -> bool:
    """Say whether a path is relative and goes down only, on Linux and on Windows, and is printable."""
    windows, posix = PureWindowsPath(shard), PurePosixPath(shard)
    plain = shard.isprintable() and not (windows.anchor or posix.anchor) and "\\" not in shard and ":" not in shard
    return plain and ".." not in posix.parts


def _other_weights(folder: Path) -> str:
    others = sorted(file.name for pattern in OTHERS for file in folder.glob(pattern))
    others = [name for name in others if not any(fnmatch(name, pattern) for pattern in STATE)]
    return f" (only safetensors are read: convert {others[0]})" if others else ""
