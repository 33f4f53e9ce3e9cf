"""A safetensors file that is written tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from orthoft.merging.files.header import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK = 1 << 22  # bytes that are read at once
FORMAT = {"format": "pt"}  # the metadata that transformers and PEFT ask for
FLUSH = 1 << 26  # bytes that are sent on to the disk while the next ones are made


class SafetensorsFile:
    """A safetensors file that grows tensor by tensor: room for the header is kept free and filled when it is closed.

    Layout: length of the header as 8 bytes little-endian, the header as JSON padded with spaces to a multiple of 8, the
    tensors without gaps. ``names`` are those that will be written; alignment is kept if larger dtypes come first.
    ``metadata`` stands in the header in its own order, where the safetensors library draws one.
    ``digest`` is the `content_hash` of the file once it is closed.
    """

    digest: str

    def __init__(self, file: Path, names: Iterable[str], metadata: Mapping[str, str] = FORMAT) -> None:
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)}
        room = 64 + len(json.dumps(self._header))
        room += sum(len(json.dumps(name)) + 512 for name in names)  # dtype, 16 sizes and offsets fit 512 characters
        self._room = -(-room // 8) * 8
        self._file: BinaryIO = file.open("wb")
        self._file.seek(8 + self._room)
        self._end = self._since = self._checksum = 0
        self._disk = ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None

    def write(self, name: str, tensor: Tensor) -> None:
        """Append a tensor."""
        self.begin(name, tensor.dtype, tensor.shape)
        self.append(tensor)

    def begin(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        """Announce a tensor, whose entries are then appended in any number of pieces."""
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        start, self._end = self._end, self._end + nbytes
        self._header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, self._end]}

    def append(self, piece: Tensor) -> None:
        """Append the next entries of the tensor that was announced last."""
        data = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._file.write(data)
        self._checksum = zlib.crc32(data, self._checksum)
        self._since += len(data)
        if self._since >= FLUSH and (self._flushing is None or self._flushing.done()):
            self._told()
            self._since = 0
            self._flushing = self._disk.submit(os.fsync, self._file.fileno())

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._disk.shutdown()
        with self._file:
            if error is None:
                self._told()
                header = json.dumps(self._header, separators=(",", ":")).encode()
                head = self._room.to_bytes(8, "little") + header.ljust(self._room)
                self._file.seek(0)
                self._file.write(head)
                self._file.flush()
                os.fsync(self._file.fileno())
                self.digest = _joined(head, self._checksum)

    def _told(self) -> None:
        """Raise the error of the last flush: the system tells it once, a later one would succeed."""
        if self._flushing is not None:
            self._flushing.result()


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = FORMAT) -> None:
    """Write tensors to a safetensors file that is read by whom any new file is: the library's own is the owner's alone.

    By names; larger dtypes come first, which keeps all aligned.
    """
    with SafetensorsFile(file, tensors, metadata) as out:
        for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
            out.write(name, tensors[name])


def content_hash(file: Path) -> str:
    """Return the SHA-256 of a safetensors file's header and of the CRC-32 of what stands behind it, as hexadecimals.

    It tells whether a file is as it was when it was written, not whether somebody meant to deceive: SHA-256 of all its
    bytes would take as long as writing them. The header is hashed apart because it is written last.
    """
    data = 0
    with file.open("rb") as stream:
        head = stream.read(8)
        head += stream.read(min(int.from_bytes(head, "little"), file.stat().st_size))
        while block := stream.read(BLOCK):
            data = zlib.crc32(block, data)
    return _joined(head, data)


def header_hash(file: Path) -> str:
    """Return the SHA-256 of a safetensors file's header: names, dtypes, shapes and places, not the numbers."""
    with file.open("rb") as stream:
        head = stream.read(8)
        head += stream.read(min(int.from_bytes(head, "little"), file.stat().st_size))
    return hashlib.sha256(head).hexdigest()


def _joined(head: bytes, data: int) -> str:
    return hashlib.sha256(head + data.to_bytes(4, "little")).hexdigest()
