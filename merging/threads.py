"""How many threads torch works with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch work with this many threads in the calling thread.

    One is right for short work beside threads that read and write: torch's helpers spin while they wait, and take the
    cores from those (ten times the time of a whole export, on two cores).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
