"""A merge that may begin: its plan, its output and its device, once nothing speaks against them."""

from __future__ import annotations

import os
from collections.abc import Iterable
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
            an ``out`` that holds what is merged, or is a part of it.
    """
    out = Path(out)
    make, target = get_output(output), pick_device(device)
    refuse_existing(out, overwrite)
    todo = plan(base, sources, **words)
    read = [todo.base.folder, *(source.folder for source in todo.sources)]
    refuse_what_is_read(out, [*read, *(numbers.file for numbers in todo.statistics.values())], "merged")
    if is_in(out, todo.base.folder):
        raise ValueError(
            f"the output folder {out} is inside the base ({todo.base.folder}), whose folders are carried over: choose "
            "another"
        )
    return Prepared(todo, make(todo, Options(str(base), dtype, rank, max_shard_size)), target)


def refuse_what_is_read(out: Path, read: Iterable[Path], done: str) -> None:
    """Raise a ValueError if replacing ``out`` would remove something of what is read; ``done`` is what becomes of it.

    A new folder or file inside a folder that is read does no harm.
    """
    if not out.exists():
        return
    what = "output folder" if out.is_dir() else "output"
    for path in read:
        links = [file for file in path.iterdir() if file.is_symlink() and file.is_file()] if path.is_dir() else []
        if any(is_in(one, out) for one in (path, *links)):
            raise ValueError(f"the {what} {out} holds what is {done} ({path}): choose another")
        if is_in(out, path):
            raise ValueError(f"the {what} {out} is a part of what is {done} ({path}): choose another")


def is_in(path: Path, place: Path) -> bool:
    """Say whether ``path``, as it is written or with its links followed, is ``place``, which exists, or lies in it.

    Files are compared, and not their names, of which one file may have several: by a mount, or in another case.
    """
    ways = (path.absolute(), path.resolve())
    return any(os.path.exists(one) and one.samefile(place) for way in ways for one in (way, *way.parents))
