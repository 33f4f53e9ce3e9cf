"""Writing of model folders: one tensor at a time, and all or nothing."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from glob import escape
from math import prod
from pathlib import Path
from typing import Any

import torch

from orthoft.merging.files.safetensors_file import SafetensorsFile
from orthoft.merging.files.tensors import OTHERS, STATE, read_json

__all__ = [
    "SafetensorsFile",
    "Shard",
    "carry_over",
    "parse_size",
    "put_in_place",
    "refuse_existing",
    "sharded",
    "sync_file",
    "write_index",
    "write_json",
    "write_text",
]

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SINGLE = "model.safetensors"
# Weights in any format and the state of a training run: of the base, not of the merge. Its model card likewise.
LEFT_OUT = (
    *(*OTHERS, "*.safetensors", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.index.json"),
    *(*STATE, "trainer_state.json", "README.md", "report.json", "report.html", ".*"),
)
LEFT_OUT_FOLDERS = ("checkpoint-*", "onnx", "openvino", "original", "runs", ".*")


@dataclass(frozen=True)
class Shard:
    """A file of tensors that is to be written, and what will be in it, in order: names, dtypes and shapes."""

    file: str
    tensors: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]

    @property
    def nbytes(self) -> int:
        """The number of bytes of its tensors."""
        return sum(dtype.itemsize * prod(shape) for _, dtype, shape in self.tensors)


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raise a FileExistsError if ``out`` exists, unless it is a folder that may be overwritten.

    Raises:
        ValueError: ``out`` has no name of its own, as "." and "..", so that nothing can be put in its place.
    """
    if out.name in ("", ".."):
        raise ValueError(f"the output folder needs a name, got {str(out)!r}")
    if out.is_dir() and overwrite:
        return
    if out.exists() or out.is_symlink():
        if out.is_dir():
            raise FileExistsError(f"output folder exists: {out} (choose another, or replace it by overwrite)")
        raise FileExistsError(f"output is a file: {out} (choose another)")


def make_parent(out: Path) -> None:
    """Make the folder that ``out`` is to stand in, or raise an OSError that says why nothing can be written there."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise type(error)(f"nothing can be written into {out.parent} ({error.strerror})") from error


def sharded(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], limit: int) -> list[Shard]:
    """Share tensors out over files of at most ``limit`` bytes, in order; within a file larger dtypes come first."""
    shards: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        size = dtype.itemsize * prod(shape)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append((name, dtype, shape))
        filled += size
    many = len(shards) > 1
    files = (f"model-{i:05d}-of-{len(shards):05d}.safetensors" if many else SINGLE for i in range(1, len(shards) + 1))
    by_size = (sorted(held, key=lambda entry: -entry[1].itemsize) for held in shards)  # which keeps all aligned
    return [Shard(file, tuple(held)) for file, held in zip(files, by_size, strict=True)]


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write which tensor is in which file, if there are several."""
    if len(shards) < 2:
        return
    where = {name: shard.file for shard in shards for name, *_ in shard.tensors}
    total = sum(shard.nbytes for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    write_json(folder / f"{SINGLE}.index.json", index)


def carry_over(base: Path, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Copy all of the base folder but its weights and its model card, and put a chosen ``dtype`` into its config.json.

    Folders inside are copied whole: they may hold further modules (a pooling layer, say), weights and all.
    """
    for file in sorted(base.iterdir()):
        if file.is_dir() and not any(fnmatch(file.name, pattern) for pattern in LEFT_OUT_FOLDERS):
            shutil.copytree(file, folder / file.name, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
        elif file.is_file() and not any(fnmatch(file.name, pattern) for pattern in LEFT_OUT):
            shutil.copyfile(file, folder / file.name)
    config = folder / "config.json"
    if dtype is not None and config.is_file():
        content = {key: value for key, value in read_json(config).items() if key != "torch_dtype"}
        write_json(config, content | {"dtype": str(dtype).removeprefix("torch.")})


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write an object as indented JSON."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write UTF-8; names of files that the locale could not decode are written as the bytes that they are."""
    file.write_text(text, encoding="utf-8", errors="surrogateescape")


def parse_size(size: int | str) -> int:
    """Return a number of bytes, given as such or like "5GB" (KB, MB, GB, TB are powers of ten)."""
    text = str(size).strip()
    number, unit = (text, "") if text.isdigit() else (text[:-2], text[-2:].upper())
    factor = UNITS.get(unit, 1 if not unit else 0)
    if not number.strip().isdigit() or int(number) * factor <= 0:
        raise ValueError(f"a size is a number of bytes or e.g. '5GB' ({', '.join(UNITS)}), got {size!r}")
    return int(number) * factor


def put_in_place(new: Path, out: Path) -> None:
    """Sync a folder and rename it to ``out``, which may be replaced."""
    new.chmod(0o755)
    _sync(new)
    _replace(new, out)


def _replace(new: Path, out: Path) -> None:
    """Rename ``new`` to ``out``; an old ``out`` steps aside first, comes back on failure, and is removed at the end."""
    old = None
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
        out.rename(old)  # onto the empty folder
    try:
        new.rename(out)
    except BaseException:
        if old is not None:
            old.rename(out)
        raise
    for left in out.parent.glob(f".{escape(out.name)}.old-*"):  # its own, and those of processes that were killed here
        shutil.rmtree(left, ignore_errors=True)
    _sync_folder(out.parent)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            sync_file(path)
    _sync_folder(folder)


def sync_file(file: Path) -> None:
    """Wait until the bytes of a file are on the disk."""
    with file.open("r+b") as stream:  # Windows syncs only what may be written
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
