"""GGUF files: what will be in them is told first, then one tensor at a time is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from orthoft.merging.outputs.registry import rounded
from orthoft.merging.resume.partial import new_file

Dtype = Literal["f32", "f16", "bf16", "q8_0"]
DTYPES = ("f32", "f16", "bf16", "q8_0")
TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
BLOCK = 32  # entries of a row that share a scale in q8_0


@dataclass(frozen=True)
class Told:
    """A tensor that will be written: its name, shape and kind, and what reads it when its turn has come."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


def dtype_of(shape: Sequence[int], wanted: str) -> str:
    """Return how a tensor is stored in a file of a kind: vectors in float32, as llama.cpp needs them.

    Rows that are no multiple of 32 have no q8_0 and are float16, as llama.cpp does it.
    """
    if len(shape) < 2:
        return "f32"
    return "f16" if wanted == "q8_0" and shape[-1] % BLOCK else wanted


def write(out: Path, architecture: str, fill: Callable[[Any], None], tensors: Sequence[Told], overwrite: bool) -> None:
    """Write a GGUF file, which appears only when it is complete; ``fill`` gives the writer the metadata.

    Raises:
        FileExistsError: ``out`` exists and may not be overwritten, or is a folder.
        ValueError: a tensor does not fit its dtype.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    refuse_existing_file(out, overwrite)
    with new_file(out) as partial:
        writer = GGUFWriter(None, architecture)
        fill(writer)
        for told in tensors:
            kind = GGMLQuantizationType[told.dtype.upper()]
            shape = byte_shape(told.shape, told.dtype)
            count = int(torch.Size(shape).numel())
            writer.add_tensor_info(told.name, shape, _uint8(), count, raw_dtype=kind)
        try:
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for told in tensors:
                writer.write_tensor_data(encoded(told.read(), told.dtype, told.name))
        finally:
            writer.close()


def byte_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """Return the shape of a tensor as rows of bytes; q8_0 has 34 for 32 entries."""
    *rows, n = shape
    return (*rows, n // BLOCK * (BLOCK + 2) if dtype == "q8_0" else n * TORCH[dtype].itemsize)


def encoded(tensor: Tensor, dtype: str, name: str) -> Any:
    """Return a tensor as an array of bytes (..., bytes of a row).

    Raises:
        ValueError: it holds NaN or Inf in that dtype.
    """
    if dtype != "q8_0":
        return rounded(tensor, TORCH[dtype], name).contiguous().view(torch.uint8).numpy()
    from gguf import GGMLQuantizationType, quantize

    return quantize(rounded(tensor, torch.float32, name).numpy(), GGMLQuantizationType.Q8_0)


def _uint8() -> Any:
    import numpy as np

    return np.dtype(np.uint8)


def refuse_existing_file(out: str | Path, overwrite: bool) -> None:
    """Raise a FileExistsError if ``out`` is a folder or is written as one, or a file that may not be overwritten."""
    file = Path(out)
    if file.is_dir() or not os.path.basename(out):
        raise FileExistsError(f"{file} is a folder: a GGUF is one file, choose a name like {file / 'model.gguf'}")
    if file.exists() and not overwrite:
        raise FileExistsError(f"output file exists: {out} (choose another, or replace it by overwrite)")
