"""The processes that do one merge together, as ``torchrun`` and ``accelerate launch`` start them."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # a rank may be done long before another: gloo's own half an hour is too short
TOLD_AS = {kind.__name__: kind for kind in (ValueError, TypeError, FileNotFoundError, FileExistsError, OSError)}


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what there is one of."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Return every size-th item: this process's part."""
        return list(items[self.rank :: self.size])

    def each(self, work: Callable[[], T]) -> list[T]:
        """Do work in every process, wait for all, and return what each returned, in order of ranks.

        Raises:
            Exception: what went wrong here; or in another process, named in the message, so that all end alike.
        """
        if self.size == 1:
            return [work()]
        mine: tuple[T | None, tuple[str, str] | None] = (None, None)
        failure: Exception | None = None
        try:
            mine = (work(), None)
        except Exception as error:
            failure, mine = error, (None, (_kind(error), str(error)))
        told: list[Any] = [None] * self.size
        _gather(told, mine)
        if failure is not None:
            raise failure
        for rank, (_, lost) in enumerate(told):
            if lost is not None:
                raise TOLD_AS.get(lost[0], RuntimeError)(f"rank {rank}: {lost[1]}")
        return [result for result, _ in told]

    def only_first(self, work: Callable[[], None]) -> None:
        """Do work in the first process while the others wait."""
        self.each(work if self.first else lambda: None)


def open_ranks() -> Ranks:
    """Join the processes that RANK and WORLD_SIZE speak of; without them, or without others, this process is all.

    A program that has set up torch.distributed itself decides by itself which of its processes merge: each merge is one
    process's then.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2 or "RANK" not in os.environ or not dist.is_available():
        return Ranks()
    if dist.is_initialized() and not _joined.cache_info().currsize:
        return Ranks()
    return _joined()


@cache
def _joined() -> Ranks:
    """Join once for all merges of this process: to meet again at the same port would race with taking leave."""
    dist.init_process_group("gloo", timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), dist.get_world_size())


def pick_device(name: str) -> torch.device:
    """Return the device of a name: "cpu", "auto" (CUDA if there is any), "cuda" (this rank's own) or "cuda:1".

    Raises:
        ValueError: no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}: choose cpu, auto, cuda or cuda:N")
    if device.type == "cpu":
        return device
    if (count := torch.cuda.device_count()) == 0:
        raise ValueError(f"device {name!r} was chosen, and torch finds no CUDA device: take 'cpu' or 'auto'")
    index = int(os.environ.get("LOCAL_RANK", "0")) % count if device.index is None else device.index
    if index >= count:
        raise ValueError(f"device {name!r} was chosen, and there are {count} CUDA devices: 0 to {count - 1}")
    return torch.device("cuda", index)


def _kind(error: Exception) -> str:
    return next((name for name, kind in TOLD_AS.items() if isinstance(error, kind)), "RuntimeError")


def _gather(told: list[Any], mine: object) -> None:
    try:
        dist.all_gather_object(told, mine)
    except RuntimeError as error:
        raise RuntimeError("another process of this merge has died: the same command goes on from here") from error
