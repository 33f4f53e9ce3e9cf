"""The header of a safetensors file, checked before anything in it is used."""

from __future__ import annotations

import json
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

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
MAX_HEADER = 100_000_000  # bytes, as the safetensors library has it
MAX_DIMENSIONS = 16


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor: its dtype, its shape, and which bytes behind the header are its own."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: Path) -> dict[str, Entry]:
    """Return what a safetensors file says of its tensors, once all of it is found to be true.

    The tensors have to fill the file without gaps or overlaps, each with as many bytes as its dtype and shape take.

    Raises:
        ValueError: the file is truncated or corrupt, or holds a dtype that cannot be read.
    """
    try:
        header, data = _read(file)
        entries = {name: _entry(name, said) for name, said in header.items() if name != "__metadata__"}
        _check_layout(entries, data)
    except _Unreadable as error:
        raise ValueError(f"{file} holds {error}, which cannot be read") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is truncated or not a safetensors file ({one_line(error)}): copy or save it again"
        ) from error
    return entries


def parse_json(text: str) -> Any:
    """Return what a JSON text says, or raise a ValueError: also for a key given twice, NaN, Inf or absurd nesting."""
    try:
        return json.loads(text, object_pairs_hook=_once_each, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def one_line(error: BaseException) -> str:
    """Return the message of an error as one line of at most 200 characters."""
    line = " ".join(str(error).split())
    return line if len(line) <= 200 else f"{line[:200]}..."


class _Unreadable(ValueError):
    """The file is sound, but of a dtype that torch or this package lacks."""


def _read(file: Path) -> tuple[dict[str, Any], int]:
    """Return the parsed header of a file, and the number of bytes behind it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        if len(first) < 8:
            raise ValueError(f"it has {size} bytes")
        (length,) = struct.unpack("<Q", first)
        if length > min(MAX_HEADER, size - 8):
            raise ValueError(f"its header should have {length} bytes, the file has {size}")
        text = stream.read(length).decode("utf-8")
    if not text.startswith("{"):
        raise ValueError("its header does not begin with a brace")
    header: dict[str, Any] = parse_json(text)
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not an object of words")
    "".join([*header, *metadata, *metadata.values()]).encode("utf-8")  # JSON may spell halves of characters
    return header, size - 8 - length


def _entry(name: str, said: Any) -> Entry:
    if not isinstance(said, dict) or said.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} should have a dtype, a shape and data_offsets")
    dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has the shape {shortened(shape)}")
    if not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has the data_offsets {shortened(offsets)}")
    if not isinstance(dtype, str):
        raise ValueError(f"tensor {name!r} has the dtype {shortened(dtype)}")
    if dtype not in DTYPES:
        raise _Unreadable(f"{name!r} stored as {shortened(dtype)}")
    expected = prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise ValueError(
            f"tensor {name!r} has {offsets[1] - offsets[0]} bytes, {dtype} {shortened(shape)} takes {expected}"
        )
    return Entry(DTYPES[dtype], tuple(shape), offsets[0], offsets[1])


def _check_layout(entries: dict[str, Entry], data: int) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise ValueError(f"tensor {name!r} begins at {entry.start}, the one before it ends at {end}")
        end = entry.stop
    if end != data:
        raise ValueError(f"its tensors end at {end}, the file at {data}")


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def shortened(value: Any) -> str:
    """Return the representation of a value, at most 60 characters of it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {shortened(name)} is given twice")
    return content


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number")
