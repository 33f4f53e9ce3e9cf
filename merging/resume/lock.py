"""A lock on an output folder: two processes that write the same one exclude each other."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PID_AT = 1 << 20  # Windows lets nobody read the bytes that are locked, so that lock one far behind the text


@contextmanager
def locked(out: Path, file: Path | None = None) -> Iterator[None]:
    """Hold the lock of ``out``, a file (beside it unless given) that is gone afterwards.

    The system gives the lock back when a process ends, in whichever way: the file of a dead one does not block.

    Raises:
        FileExistsError: another process holds it; the message names it.
    """
    file = file or out.parent / f".{out.name}.lock"
    handle = _acquire(file, out)
    try:
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held: who waits for this very file finds it gone and makes another
        os.close(handle)


def _acquire(file: Path, out: Path) -> int:
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        if not _try_lock(handle):
            os.lseek(handle, 0, os.SEEK_SET)
            holder = os.read(handle, 200).decode(errors="replace") or "another process"
            os.close(handle)
            raise FileExistsError(f"{holder} is writing {out}: wait until it is done, or choose another output folder")
        if _is_still(handle, file):
            return handle
        os.close(handle)


def _is_still(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _try_lock(handle: int) -> bool:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, PID_AT, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
