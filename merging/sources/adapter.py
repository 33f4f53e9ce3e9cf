"""An adapter on disk as deltas of the base's weights, and the opening of any source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from orthoft.delta import Delta, Dense
from orthoft.linalg import at_least_float32
from orthoft.merging.files.tensors import TensorFolder, as_matrix, matrix_shape
from orthoft.merging.formats.registry import MERGE_FIRST, Extent
from orthoft.merging.formats.tokens import token_indices
from orthoft.merging.sources.adapter_file import AdapterFile
from orthoft.merging.sources.beside import Beside
from orthoft.merging.sources.checkpoint import CheckpointSource, Source, untied
from orthoft.merging.sources.delta import CONFIG, DeltaSource
from orthoft.merging.sources.expert_inputs import ExpertInputs
from orthoft.merging.sources.names import match_names, tied_embedding, ties_embedding
from orthoft.merging.sources.orientation import Orientation
from orthoft.merging.sources.parameters import Parameters
from orthoft.merging.sources.quantised import MERGEABLE, check_unquantised
from orthoft.merging.sources.rows import Replaced, as_precise, replaced_rows

__all__ = ["MERGEABLE", "AdapterSource", "CheckpointSource", "Source", "open_source"]


def open_source(name: str, folder: Path, base: TensorFolder) -> Source:
    """Return the adapter or the fine-tuned checkpoint in a folder, checked against the base it changes.

    Raises:
        FileNotFoundError: the folder holds neither, or an adapter_config.json without its tensors.
        ValueError: a file is corrupt, the format is unknown, or the shapes are those of another base.
    """
    try:
        if (folder / "adapter_config.json").is_file():
            return AdapterSource(name, folder, base)
        if (folder / CONFIG).is_file():
            return DeltaSource(name, folder, base)
        if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
            return CheckpointSource(name, folder, base)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"source {name!r}: {error}") from error
    raise FileNotFoundError(
        f"source {name!r}: {folder} holds neither an adapter (adapter_config.json and adapter_model.safetensors) "
        "nor a checkpoint (model.safetensors)"
    )


class AdapterSource(Source):
    """An adapter in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Rules: tensors beside the adapter's own (``modules_to_save``, biases, embeddings) replace the base's, read row by
    row; rows that they add are not carried. Rows of trained tokens replace rows. The adapter acts on what results. A
    bias of the adapter needs one in the base. An output head that the base ties to its embedding may only change with
    it.
    """

    def __init__(self, name: str, folder: Path, base: TensorFolder) -> None:
        super().__init__(name, folder)
        file = self._file = AdapterFile(folder, f"source {name!r}")
        self.config, self.kind, saved = file.config, file.reader.peft_type, file.beside
        self._parameters = Parameters(file, base, f"source {name!r}")
        self._experts = ExpertInputs(file, base, self._read)
        modules = [module for module in file.keys if module not in self._experts.modules]
        extents = {f"{module}.weight": file.extent(module) for module in modules}

        def fits(own: str, theirs: str) -> bool:
            if own in extents:
                return extents[own].fits(base.shape(theirs))
            return own not in saved or file.tensors.shape(saved[own]) == base.shape(theirs)

        names = [*extents, *saved, *file.tokens, *self._parameters.names, *self._experts.names]
        self.naming = match_names(names, base, fits, self._parameters.stored | self._experts.stored)
        self._experts.place(self.naming)
        for module in self._parameters.place(self.naming):
            del extents[f"{module}.weight"]
        self._drop_tied(extents, base)
        checked = {self._check(own, extent, base): extent for own, extent in extents.items()}
        shapes, base_says = {name: matrix_shape(base.shape(name)) for name in checked}, Orientation(base).inputs_first
        self.inputs_first = {
            name: self._inputs_first(name, extent, shapes[name], base_says) for name, extent in checked.items()
        }
        self._sizes = [(n, m) if self.inputs_first[name] else (m, n) for name, (m, n) in shapes.items()]
        beside = Beside(file, base, self.naming)
        self._saved, self._biases = beside.saved, beside.biases
        self._tokens = {self._require(own, base, _any_shape): key for own, key in file.tokens.items()}
        self.not_carried += beside.not_carried
        self._steps: tuple[tuple[Collection[str], Callable[[str, Tensor], Delta]], ...] = (
            (self._saved, self._replacement),
            (self._tokens, self._new_rows),
            (self.inputs_first, self.adapted),
            (self._parameters.places, self._parameters.delta),
            (self._experts.places, self._experts.delta),
            (self._biases, self._shift),
        )
        self.on_experts = self._experts.places
        self.adapter_ranks = {theirs: extent.rank for theirs, extent in checked.items()}
        self.ranks = self._ranks()
        self.notes += [
            f"{theirs}: where the base ties it to an output head, both change"
            for theirs in self.ranks
            if ties_embedding(base, theirs)
        ]

    def delta(self, name: str, weight: Tensor) -> Delta:
        steps = [change for names, change in self._steps if name in names]
        if len(steps) == 1:
            return steps[0](name, weight)
        total = torch.zeros_like(weight)
        for change in steps:
            total = total + change(name, weight + total).dense()
        return Dense(total)

    def needs_weight(self, name: str) -> bool:
        more = any(name in names for names in (self._saved, self._tokens, self._biases))
        return more or self.ranks[name] is None or not self._file.reader.weightless

    def module(self, name: str) -> str:
        """Return the name that this source's model class has for the module of a base's weight."""
        return self.naming.to_source(name).removesuffix(".weight")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the adapter's tensors of one adapted weight, named by what stands behind the module's name."""
        return self._file.read_module(self.module(name))

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of those tensors, from the header alone."""
        return self._file.shapes(self.module(name))

    def beside(self) -> dict[str, Tensor]:
        """Return what is saved beside the adapter's own tensors (whole modules, biases), as named in its file.

        Raises:
            ValueError: it changes biases or rows of tokens as well, which have no place there.
        """
        for name in (*self._biases, *self._tokens, *self._parameters.places, *self._experts.places):
            raise ValueError(
                f"source {self.name!r} also changes {name!r} (lora_bias, trained tokens, target_parameters, fused "
                "experts): merge it instead"
            )
        return {key: self._file.tensors[key] for key in self._file.beside.values()}

    def weight(self, name: str, base: TensorFolder) -> Tensor:
        """Return an adapted weight as the (m, n) matrix before the adapter: the one saved with it, or the base's."""
        rows = as_matrix(at_least_float32(base[name]))
        if name in self._saved:
            rows = self._replacement(name, rows).saved(0, len(rows))
        return rows.mT if self.inputs_first[name] else rows

    def adapted(self, name: str, weight: Tensor) -> Delta:
        """Return what the adapter's own tensors change of the weight, given as it is stored (as a matrix)."""
        flipped = self.inputs_first[name]
        delta = self._read(self.module(name), weight.mT if flipped else weight)
        return delta.transposed() if flipped else delta

    def _read(self, module: str, weight: Tensor) -> Delta:
        """Return what the adapter of a module changes of a matrix (outputs, inputs)."""
        tensors = self._file.read_module(module)
        try:
            read = {key: as_precise(tensor, weight) for key, tensor in (tensors | self._shared).items()}
            return self._file.reader.read(self._file.settings, module, read, weight)
        except (ValueError, KeyError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"source {self.name!r}: {reason}") from error

    def _replacement(self, name: str, weight: Tensor) -> Replaced:
        key = self._saved[name]
        return Replaced(self._file.tensors, key, weight, f"source {self.name!r}: tensor {key!r}")

    def _new_rows(self, name: str, weight: Tensor) -> Delta:
        rows = self._file.read(self._tokens[name])
        try:
            return replaced_rows(token_indices(self.config, self.module(name)), rows, weight)
        except ValueError as error:
            raise ValueError(f"source {self.name!r}: {name!r}: {error}") from error

    def _shift(self, name: str, weight: Tensor) -> Delta:
        assert self._file.reader.read_bias is not None
        module = self._biases[name]
        tensors = self._file.read_module(module)
        shift = self._file.reader.read_bias(self._file.settings, module, tensors).reshape(weight.shape)
        return Dense(as_precise(shift, weight))

    @cached_property
    def _shared(self) -> dict[str, Tensor]:
        """The tensors that belong to all modules, read or drawn once."""
        names = self._file.reader.shared
        if all(key in self._file.tensors for key in names):
            return {name: self._file.read(key) for key, name in names.items()}
        assert self._file.reader.restore is not None
        return self._file.reader.restore(self._file.settings, self._sizes)

    def _ranks(self) -> dict[str, int | None]:
        rows = {theirs: self._file.tensors.shape(key)[0] for theirs, key in self._tokens.items()}
        experts = self._experts.ranks()
        parts: tuple[Mapping[str, int | None], ...] = (self.adapter_ranks, rows, self._parameters.ranks(), experts)
        counts = Counter(name for part in parts for name in part)
        ranks = {name: rank for part in parts for name, rank in part.items()}
        several = [name for name, count in counts.items() if count > 1]
        return ranks | dict.fromkeys([*several, *self._saved, *self._biases])

    def _drop_tied(self, extents: dict[str, Extent], base: TensorFolder) -> None:
        """Leave out an adapter of the output head that only repeats the adapter of the embedding it is tied to."""
        for own, extent in list(extents.items()):
            twin = self._tied_to(own, extent.fits, base)
            module = own.removesuffix(".weight")
            other = self.module(twin) if twin else ""
            if other not in self._file.keys or self._file.reader.same is None:
                continue
            head, embedding = self._file.read_module(module), self._file.read_module(other)
            if self._file.reader.same(head, embedding):
                del extents[own], self._file.keys[module]

    def _tied_to(self, own: str, fits: Callable[[tuple[int, ...]], bool], base: TensorFolder) -> str | None:
        theirs = self.naming.to_base(own)
        if theirs is not None and theirs in base:
            return None
        return tied_embedding(own, {name: base.shape(name) for name in base}, fits)

    def _check(self, own: str, extent: Extent, base: TensorFolder) -> str:
        theirs = self._require(own, base, extent.fits)
        if not extent.fits(base.shape(theirs)):
            outputs, inputs = ("any" if size is None else size for size in (extent.outputs, extent.inputs))
            raise ValueError(
                f"an adapter of another base: its module {own.removesuffix('.weight')!r} has ({outputs}, {inputs}) "
                f"outputs and inputs, the base's {theirs!r} has shape {base.shape(theirs)}"
            )
        return theirs

    def _require(self, own: str, base: TensorFolder, fits: Callable[[tuple[int, ...]], bool]) -> str:
        """Return the base's name of a weight that has to be there."""
        theirs, twin = self.naming.to_base(own), self._tied_to(own, fits, base)
        if twin is not None:
            raise ValueError(untied(own, twin))
        if theirs is not None:
            check_unquantised(theirs, base)
        if theirs is None or theirs not in base:
            module = own.removesuffix(".weight")
            hint = f" (or it sits on parameters that are stored in another way: {MERGE_FIRST})"
            raise ValueError(
                f"an adapter of another base: its module {module!r} has no weight in {base.folder}"
                + hint * bool(self._file.targets(module))
            )
        return theirs

    def _inputs_first(
        self, theirs: str, extent: Extent, shape: tuple[int, int], base_says: Callable[[str], bool]
    ) -> bool:
        """Say whether the base stores the weight as (inputs, outputs): by its shape, and by the config if square."""
        straight, flipped = extent.agrees(shape), extent.agrees(shape[::-1])
        if straight != flipped:
            return flipped
        told = self.config.get("fan_in_fan_out")
        return base_says(theirs) if told is None else bool(told)


def _any_shape(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2
