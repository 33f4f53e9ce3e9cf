"""What the bytes of a result depend on, as a key: of one merged weight, of one shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from orthoft import __version__
from orthoft.merging.files.safetensors_file import header_hash
from orthoft.merging.files.writer import Shard
from orthoft.merging.outputs import Options
from orthoft.merging.plan import MergePlan

FORMAT = 1  # of the journal and of the deltas kept beside it


class Identity:
    """The keys of a merge's parts. Two merges with the same key of a part write the same bytes of it.

    A file stands in it by its size, its times and the hash of its header (of all of it if it is JSON): one that was
    only copied or touched counts as changed, which costs time and nothing else.
    """

    def __init__(self, plan: MergePlan, output: str, options: Options, device: torch.device) -> None:
        self._plan = plan
        self._common = [FORMAT, __version__, torch.__version__, device.type, output, options.dtype, options.rank]
        self._files: dict[Path, list[Any]] = {}
        self._folders = {source.name: _files_of(source.folder) for source in plan.sources}

    def weight(self, name: str, scaled: bool) -> str:
        """Return the key of a merged delta, with or without its own scale."""
        return _key([self._common, self._words(name), scaled])

    def shard(self, shard: Shard, scale: float) -> str:
        """Return the key of a shard, whose merged deltas are multiplied by a scale of the whole model."""
        base = sorted({self._plan.base.place(name)[0] for name, *_ in shard.tensors})
        merged = [self._words(name) for name, *_ in shard.tensors if name in self._plan.merged]
        stored = [[name, str(dtype), list(shape)] for name, dtype, shape in shard.tensors]
        return _key([self._common, shard.file, stored, [self._file(file) for file in base], merged, scale])

    def _words(self, name: str) -> list[Any]:
        plan, item = self._plan, self._plan.merged[name]
        choice, post = item.choice, item.choice.post
        sources = [source for source in plan.sources if source.name in item.sources]
        statistics = [found.file for found in plan.statistics.values()]
        files = [plan.base.place(name)[0], *statistics]
        files += [file for source in sources for file in self._folders[source.name]]
        return [
            *(name, item.shape, item.sources, [source.name for source in plan.sources], plan.seed),
            *(choice.method.name, choice.params, choice.space.name, choice.space_params, choice.weights.tolist()),
            *(post.isotropise, post.rescale, post.scale),
            [self._file(file) for file in files],
        ]

    def _file(self, file: Path) -> list[Any]:
        if file not in self._files:
            told = file.stat()
            content = (
                header_hash(file) if file.suffix == ".safetensors" else hashlib.sha256(file.read_bytes()).hexdigest()
            )
            self._files[file] = [file.name, told.st_size, told.st_mtime_ns, told.st_ctime_ns, content]
        return self._files[file]


def _files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json"))


def _key(words: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(words), default=str).encode()).hexdigest()
