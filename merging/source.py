"""One fine-tuned model on disk, adapter or checkpoint, as deltas of the base's weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthoft.delta import Delta, Dense
from orthoft.linalg import at_least_float32
from orthoft.merging.names import inputs_first, match_prefix
from orthoft.merging.readers import Extent, get_reader
from orthoft.merging.tensors import TensorFolder, as_matrix, matrix_shape, read_json

MERGEABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # not the codes of quantised weights


class Source(ABC):
    """One fine-tuned model on disk.

    ``kind`` is its format, ``ranks`` maps the names of the base's weights it changes to the rank of its factors there
    (None without factors), ``not_carried`` lists what it holds that the base has no place for. ``inputs_first`` says of
    adapted weights whether the base stores them transposed.
    """

    kind: str
    config: Mapping[str, Any]
    inputs_first: Mapping[str, bool]
    ranks: Mapping[str, int | None]
    not_carried: list[str]

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.config, self.inputs_first = {}, {}

    @abstractmethod
    def delta(self, name: str, weight: Tensor) -> Delta:
        """Return the change of one of the base's weights, given as an (m, n) matrix in float32 or more.

        Only the tensors of this weight are read.

        Raises:
            ValueError: a tensor holds NaN or Inf.
        """

    def module(self, name: str) -> str:
        """Return the name that this source's model class has for the module of a base's weight."""
        return name.removesuffix(".weight")


def open_source(name: str, folder: Path, base: TensorFolder) -> Source:
    """Return the adapter or the fine-tuned checkpoint in a folder, checked against the base it changes.

    Raises:
        FileNotFoundError: the folder holds neither, or an adapter_config.json without its tensors.
        ValueError: a file is corrupt, the format is unknown, or the shapes are those of another base.
    """
    try:
        if (folder / "adapter_config.json").is_file():
            return AdapterSource(name, folder, base)
        if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
            return CheckpointSource(name, folder, base)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"source {name!r}: {error}") from error
    raise FileNotFoundError(
        f"source {name!r}: {folder} holds neither an adapter (adapter_config.json and adapter_model.safetensors) "
        "nor a checkpoint (model.safetensors)"
    )


class CheckpointSource(Source):
    """A fully fine-tuned model: every floating tensor that the base has too is a dense delta."""

    kind = "checkpoint"

    def __init__(self, name: str, folder: Path, base: TensorFolder) -> None:
        super().__init__(name, folder)
        tensors = self._tensors = TensorFolder(folder)
        prefix = match_prefix(list(tensors), base, lambda own, theirs: tensors.shape(own) == base.shape(theirs))
        named = ((prefix.to_base(own), own) for own in tensors)
        self._own = {theirs: own for theirs, own in named if theirs is not None and theirs in base}
        if not self._own:
            first = next(iter(tensors), None)
            raise ValueError(f"fine-tuned from another base: none of its tensors, e.g. {first!r}, is in {base.folder}")
        for theirs, own in self._own.items():
            if tensors.shape(own) != base.shape(theirs):
                raise ValueError(
                    f"fine-tuned from another base: {own!r} has shape {tensors.shape(own)}, "
                    f"the base's {theirs!r} has {base.shape(theirs)}"
                )
        self.ranks = {theirs: None for theirs in self._own if base.dtype(theirs) in MERGEABLE}
        self.not_carried = self._left_out(base)

    def _left_out(self, base: TensorFolder) -> list[str]:
        found = set(self._own.values())
        left = [f"{own}: the base has no such tensor" for own in self._tensors if own not in found]
        for theirs, own in self._own.items():
            if theirs not in self.ranks and not _same_bytes(self._tensors[own], base[theirs]):
                left.append(f"{own}: the base stores it as {base.dtype(theirs)}, which is not merged")
        return left

    def delta(self, name: str, weight: Tensor) -> Delta:
        own = self._own[name]
        return _replacement(_finite(self._tensors[own], f"source {self.name!r}: tensor {own!r}"), weight)


class AdapterSource(Source):
    """An adapter in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Tensors beside the adapter's own (``modules_to_save``, biases, embeddings) replace the base's tensors: their deltas
    are dense.
    """

    def __init__(self, name: str, folder: Path, base: TensorFolder) -> None:
        super().__init__(name, folder)
        self.config = read_json(folder / "adapter_config.json")
        self._reader = get_reader(self.config)
        self._tensors = TensorFolder(folder, "adapter_model")
        self.kind = self._reader.peft_type
        self._keys, self._beside = self._split()
        saved = self._beside
        if not self._keys and not saved:
            raise ValueError(f"{folder / 'adapter_model.safetensors'} holds no tensors")
        extents = {f"{module}.weight": self._extent(module) for module in self._keys}

        def fits(own: str, theirs: str) -> bool:
            if own in extents:
                return _fits(extents[own], base, theirs)
            return self._tensors.shape(saved[own]) == base.shape(theirs)

        self._prefix = match_prefix(list(extents) or list(saved), base, fits)
        checked = {self._check(own, extent, base): extent for own, extent in extents.items()}
        self.inputs_first = {theirs: self._inputs_first(theirs, extent, base) for theirs, extent in checked.items()}
        self._saved, self.not_carried = self._place(saved, base)
        self.adapter_ranks = {theirs: extent.rank for theirs, extent in checked.items()}
        self.ranks = self.adapter_ranks | dict.fromkeys(self._saved)

    def delta(self, name: str, weight: Tensor) -> Delta:
        saved = self._saved.get(name)
        if saved is not None:
            replaced = _replacement(self._read(saved), weight)
            if name not in self.inputs_first:
                return replaced
            return Dense(replaced.dense() + self.adapted(name, weight + replaced.dense()).dense())
        return self.adapted(name, weight)

    def module(self, name: str) -> str:
        return self._prefix.to_source(name).removesuffix(".weight")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the adapter's tensors of one adapted weight, named by what stands behind the module's name."""
        return {suffix: self._read(key) for suffix, key in self._keys[self.module(name)].items()}

    def suffixes(self, name: str) -> list[str]:
        """Return the names of those tensors, without reading them."""
        return list(self._keys[self.module(name)])

    def beside(self) -> dict[str, Tensor]:
        """Return what is saved beside the adapter's own tensors (whole modules, biases), as named in its file."""
        return {key: self._tensors[key] for key in self._beside.values()}

    def weight(self, name: str, base: TensorFolder) -> Tensor:
        """Return an adapted weight as the (m, n) matrix before the adapter: the one saved with it, or the base's."""
        saved = self._saved.get(name)
        rows = as_matrix(at_least_float32(base[name] if saved is None else self._read(saved)))
        return rows.mT if self.inputs_first[name] else rows

    def adapted(self, name: str, weight: Tensor) -> Delta:
        """Return what the adapter's own tensors change of the weight, given as it is stored (as a matrix)."""
        module, tensors = self.module(name), self.tensors(name)
        flipped = self.inputs_first[name]
        try:
            delta = self._reader.read(self.config, module, tensors, weight.mT if flipped else weight)
        except (ValueError, KeyError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"source {self.name!r}: {reason}") from error
        return delta.transposed() if flipped else delta

    def _read(self, key: str) -> Tensor:
        return _finite(self._tensors[key], f"source {self.name!r}: tensor {key!r}")

    def _split(self) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """Return {module: {suffix: key}} of the adapter's own tensors, and {tensor: key} of those saved beside them."""
        own: dict[str, dict[str, str]] = {}
        saved: dict[str, str] = {}
        for key in self._tensors:
            name = key.removeprefix("base_model.model.")
            module, found, rest = name.partition(f".{self._reader.prefix}")
            if found:
                own.setdefault(module, {})[self._reader.prefix + rest] = key
            elif ".original_module." not in name and ".modules_to_save." not in name:  # doubles, with bias="all"
                saved[name.replace(".base_layer.", ".")] = key
        return own, saved

    def _extent(self, module: str) -> Extent:
        shapes = {suffix: self._tensors.shape(key) for suffix, key in self._keys[module].items()}
        try:
            return self._reader.extent(self.config, shapes)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"module {module!r} has no {self.kind} adapter, only {', '.join(map(str, shapes.items()))}"
            ) from error

    def _check(self, own: str, extent: Extent, base: TensorFolder) -> str:
        theirs = self._prefix.to_base(own)
        described = f"an adapter of another base: its module {own.removesuffix('.weight')!r}"
        if theirs is None or theirs not in base:
            raise ValueError(f"{described} has no weight in {base.folder}")
        if not _fits(extent, base, theirs):
            outputs, inputs = ("any" if size is None else size for size in (extent.outputs, extent.inputs))
            raise ValueError(
                f"{described} has ({outputs}, {inputs}) outputs and inputs, "
                f"the base's {theirs!r} has shape {base.shape(theirs)}"
            )
        if base.dtype(theirs) not in MERGEABLE:
            raise ValueError(f"the base's {theirs!r} is stored as {base.dtype(theirs)}: dequantise the base first")
        return theirs

    def _inputs_first(self, theirs: str, extent: Extent, base: TensorFolder) -> bool:
        """Say whether the base stores the weight as (inputs, outputs): by its shape, and by the config if square."""
        shape = matrix_shape(base.shape(theirs))
        straight, flipped = _agree(extent, shape), _agree(extent, shape[::-1])
        if straight != flipped:
            return flipped
        told = self.config.get("fan_in_fan_out")
        return inputs_first(base, theirs) if told is None else bool(told)

    def _place(self, saved: Mapping[str, str], base: TensorFolder) -> tuple[dict[str, str], list[str]]:
        """Return {the base's tensor: key} of what is saved beside the adapter, and what the base has no place for."""
        placed, left = {}, []
        for own, key in saved.items():
            theirs, shape = self._prefix.to_base(own), self._tensors.shape(key)
            if theirs is None or theirs not in base:
                left.append(f"{own}: the base has no such tensor")
            elif base.shape(theirs) != shape:
                left.append(f"{own}: it has shape {shape}, the base's has {base.shape(theirs)}")
            else:
                placed[theirs] = key
        return placed, left


def _fits(extent: Extent, base: TensorFolder, name: str) -> bool:
    shape = matrix_shape(base.shape(name))
    return len(base.shape(name)) >= 2 and (_agree(extent, shape) or _agree(extent, shape[::-1]))


def _agree(extent: Extent, shape: tuple[int, ...]) -> bool:
    return extent.outputs in (None, shape[0]) and extent.inputs in (None, shape[1])


def _finite(tensor: Tensor, what: str) -> Tensor:
    tensor = at_least_float32(tensor)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{what} contains NaN or Inf")
    return tensor


def _replacement(saved: Tensor, weight: Tensor) -> Dense:
    return Dense(as_matrix(saved) - weight)


def _same_bytes(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.view(torch.uint8), second.view(torch.uint8))
