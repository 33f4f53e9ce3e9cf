"""Reading ahead, working, and writing behind: three threads at one sequence of pieces, with few bytes in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from orthoft.merging.files.tensors import TensorFolder, fill

IN_FLIGHT = 1 << 26  # bytes
PIECE = 1 << 24  # bytes, a multiple of the size of every dtype


@dataclass(frozen=True)
class Piece:
    """Bytes of one tensor in a file: from ``start`` to ``stop``, counted from the tensor's first."""

    name: str
    file: Path
    offset: int  # of the tensor in the file
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.stop - self.start


def pieces_of(folder: TensorFolder, name: str, whole: bool) -> list[Piece]:
    """Return a tensor as one piece or as pieces of at most `PIECE` bytes; an empty tensor is one empty piece."""
    file, offset, nbytes = folder.place(name)
    step = max(nbytes, 1) if whole else PIECE
    starts = range(0, max(nbytes, 1), step)
    return [Piece(name, file, offset, start, min(start + step, nbytes)) for start in starts]


def stream(
    pieces: Sequence[Piece],
    work: Callable[[Piece, Tensor], Tensor],
    write: Callable[[Piece, Tensor], None],
    limit: int = IN_FLIGHT,
) -> None:
    """Read each piece, work on its bytes (a uint8 tensor of its own), and write what comes of it, in order.

    One thread reads, one writes, and the work is done in the thread that calls. No more than ``limit`` bytes, or one
    piece, are between being read and having been written.
    """
    pending = deque(pieces)
    ahead: deque[tuple[Piece, Future[Tensor]]] = deque()
    behind: deque[tuple[int, Future[None]]] = deque()
    flying = 0
    files: dict[Path, FileIO] = {}

    def room() -> bool:
        return bool(pending) and (not flying or flying + pending[0].nbytes <= limit)

    reader, writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    try:
        while pending or ahead:
            while room():
                piece = pending.popleft()
                flying += piece.nbytes
                ahead.append((piece, reader.submit(_read, piece, torch.empty(piece.nbytes, dtype=torch.uint8), files)))
            if ahead:
                piece, future = ahead.popleft()
                result = work(piece, future.result())
                behind.append((piece.nbytes, writer.submit(write, piece, result)))
                del future, result
            while behind and (behind[0][1].done() or not (ahead or room())):
                nbytes, done = behind.popleft()
                done.result()
                flying -= nbytes
    finally:
        reader.shutdown(cancel_futures=True)
        writer.shutdown(cancel_futures=True)
        for file in files.values():
            file.close()


def _read(piece: Piece, buffer: Tensor, files: dict[Path, FileIO]) -> Tensor:
    if piece.file not in files:
        files[piece.file] = FileIO(piece.file)
    fill(buffer, files[piece.file], piece.offset + piece.start)
    return buffer
