"""Writing of model folders: one tensor at a time, and all or nothing."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from orthoft.merging.tensors import DTYPES, read_json

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Weights in any format and the state of a training run: of the base, not of the merge. Its model card likewise.
LEFT_OUT = (
    *(
        "*.safetensors",
        "*.bin",
        "*.pt",
        "*.pth",
        "*.gguf",
        "*.h5",
        "*.msgpack",
        "*.ot",
        "*.onnx",
        "*.ckpt",
        "*.index.json",
    ),
    *("optimizer*", "scheduler.*", "rng_state*", "trainer_state.json", "README.md", ".*"),
)
LEFT_OUT_FOLDERS = ("checkpoint-*", "onnx", "openvino", "runs", ".*")


@contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside ``out`` which becomes ``out`` if the block succeeds, and is removed if it fails.

    An old ``out`` is replaced only after success.

    Raises:
        FileExistsError: ``out`` exists and may not be overwritten.
    """
    refuse_existing(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        yield partial
        partial.chmod(0o755)
        _sync(partial)
        refuse_existing(out, overwrite)  # it may have come into being in the meantime
        _replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raise a FileExistsError if ``out`` exists, unless it is a folder that may be overwritten."""
    if out.is_dir() and overwrite:
        return
    if out.exists() or out.is_symlink():
        if out.is_dir():
            raise FileExistsError(f"output folder exists: {out} (choose another, or replace it by overwrite)")
        raise FileExistsError(f"output is a file: {out} (choose another)")


class SafetensorsFile:
    """A safetensors file that grows tensor by tensor: room for the header is kept free and filled when it is closed.

    Layout: length of the header as 8 bytes little-endian, the header as JSON padded with spaces to a multiple of 8, the
    tensors without gaps. ``names`` are those that will be written; alignment is kept if larger dtypes come first.
    """

    def __init__(self, file: Path, names: Iterable[str]) -> None:
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        room = 64 + sum(len(json.dumps(name)) + 256 for name in names)  # dtype, shape and offsets fit 256 characters
        self._room = -(-room // 8) * 8
        self._file: BinaryIO = file.open("wb")
        self._file.seek(8 + self._room)
        self._end = 0

    def write(self, name: str, tensor: Tensor) -> None:
        """Append a tensor."""
        tensor = tensor.detach().cpu().contiguous()
        start, self._end = self._end, self._end + tensor.nbytes
        self._header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, self._end],
        }
        self._file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            header = json.dumps(self._header, separators=(",", ":")).encode()
            self._file.seek(0)
            self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()


def write_sharded(
    folder: Path,
    sizes: Mapping[str, tuple[torch.dtype, int]],
    tensor_of: Callable[[str], Tensor],
    max_shard_size: int | str = "5GB",
) -> None:
    """Write tensors as ``model.safetensors``, or as shards of at most ``max_shard_size`` bytes and their index.

    Args:
        sizes: names, with the dtype and the number of entries that ``tensor_of`` will return for them.
        tensor_of: called once per name, in the order of writing.
    """
    shards = _shards(
        {name: dtype.itemsize * count for name, (dtype, count) in sizes.items()}, parse_size(max_shard_size)
    )
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = ["model.safetensors"] if len(shards) == 1 else files
    for file, names in zip(files, shards, strict=True):
        names.sort(key=lambda name: -sizes[name][0].itemsize)
        with SafetensorsFile(folder / file, names) as shard:
            for name in names:
                shard.write(name, tensor_of(name))
    if len(shards) > 1:
        total = sum(dtype.itemsize * count for dtype, count in sizes.values())
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def carry_over(base: Path, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Copy all of the base folder but its weights and its model card, and put a chosen ``dtype`` into its config.json.

    Folders inside are copied whole: they may hold further modules (a pooling layer, say), weights and all.
    """
    for file in sorted(base.iterdir()):
        if file.is_dir() and not any(fnmatch(file.name, pattern) for pattern in LEFT_OUT_FOLDERS):
            shutil.copytree(file, folder / file.name, ignore=shutil.ignore_patterns(".*"))
        elif file.is_file() and not any(fnmatch(file.name, pattern) for pattern in LEFT_OUT):
            shutil.copyfile(file, folder / file.name)
    config = folder / "config.json"
    if dtype is not None and config.is_file():
        content = {key: value for key, value in read_json(config).items() if key != "torch_dtype"}
        write_json(config, content | {"dtype": str(dtype).removeprefix("torch.")})


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write an object as indented JSON."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def parse_size(size: int | str) -> int:
    """Return a number of bytes, given as such or like "5GB" (KB, MB, GB, TB are powers of ten)."""
    number, unit = (str(size)[:-2], str(size)[-2:].upper()) if isinstance(size, str) else (str(size), "")
    factor = UNITS.get(unit, 1 if not unit else 0)
    if not number.strip().isdigit() or int(number) * factor <= 0:
        raise ValueError(f"a size is a number of bytes or e.g. '5GB' ({', '.join(UNITS)}), got {size!r}")
    return int(number) * factor


def _shards(nbytes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in nbytes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


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
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
    _sync_folder(out.parent)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
