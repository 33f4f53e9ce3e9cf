"""A merge that may begin: its plan, its output and its device, once nothing speaks against them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orthoft.merging.files.writer import refuse_existing
from orthoft.merging.outputs import Options, Output, get_output
from orthoft.merging.plan import MergePlan, PathLike, Sources, plan
from orthoft.merging.ranks import pick_device


@dataclass(frozen=True)
class Prepared:
    """What is decided of a merge, what writes it, and where deltas are merged."""

    todo: MergePlan
    writer: Output
    device: torch.device


def prepare(
    base: PathLike,
    sources: Sources,
    out: PathLike,
    *,
    output: str = "checkpoint",
    dtype: str | None = None,
    rank: int | None = None,
    max_shard_size: int | str = "5GB",
    device: str = "cpu",
    overwrite: bool = False,
    **words: Any,
) -> Prepared:
    """Return what `orthoft.merging.merge` begins with, or raise what it would refuse; nothing is written.

    ``words`` are those of `orthoft.merging.plan`.

    Raises:
        FileNotFoundError: a folder or an adapter's file is missing.
        FileExistsError: ``out`` exists.
        ValueError, TypeError: an unknown name or device, a wrong value, a corrupt file, an adapter of another base, or
            an ``out`` that holds what is merged.
    """
    out = Path(out)
    make, target = get_output(output), pick_device(device)
    refuse_existing(out, overwrite)
    todo = plan(base, sources, **words)
    _refuse_own_folders(todo, out)
    return Prepared(todo, make(todo, Options(str(base), dtype, rank, max_shard_size)), target)


def _refuse_own_folders(todo: MergePlan, out: Path) -> None:
    place = out.resolve()
    read = [todo.base.folder, *(source.folder for source in todo.sources)]
    for path in (*read, *(numbers.file for numbers in todo.statistics.values())):
        if place in (path.resolve(), *path.resolve().parents):
            raise ValueError(f"the output folder {out} holds what is merged ({path}): choose another")
    if todo.base.folder.resolve() in place.parents:
        raise ValueError(
            f"the output folder {out} is inside the base ({todo.base.folder}), whose folders are carried over: choose "
            "another"
        )
