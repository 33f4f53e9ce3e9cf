"""One fine-tuned model on disk as deltas of the base's weights, and the simplest of them: a whole checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthoft.delta import Delta
from orthoft.merging.files.tensors import TensorFolder, same_tensor
from orthoft.merging.sources.names import added_rows, match_names, tied_embedding
from orthoft.merging.sources.quantised import MERGEABLE, check_quantised, quantised
from orthoft.merging.sources.rows import Replaced


class Source(ABC):
    """One fine-tuned model on disk.

    ``kind`` is its format, ``ranks`` maps the names of the base's weights it changes to the rank of its factors there
    (None without factors), ``not_carried`` lists what it holds that the base has no place for, ``notes`` what is worth
    knowing of it. ``inputs_first`` says of adapted weights whether the base stores them transposed, ``on_experts`` are
    the tensors of fused experts whose inputs an adapter rotates.
    """

    kind: str
    config: Mapping[str, Any]
    inputs_first: Mapping[str, bool]
    ranks: Mapping[str, int | None]
    on_experts: Collection[str]
    not_carried: list[str]
    notes: list[str]

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.config, self.inputs_first = {}, {}
        self.on_experts = ()
        self.not_carried, self.notes = [], []

    def needs_weight(self, name: str) -> bool:
        """Say whether `delta` looks at the numbers of the base's weight, not at its shape alone."""
        return True

    @abstractmethod
    def delta(self, name: str, weight: Tensor) -> Delta:
        """Return the change of one of the base's weights, given as an (m, n) matrix in float32 or more.

        Only the tensors of this weight are read.

        Raises:
            ValueError: a tensor holds NaN or Inf; of tensors that are read row by row, when those rows are read.
        """


class CheckpointSource(Source):
    """A fully fine-tuned model: every floating tensor that the base has too is a delta, read row by row.

    Rules: rows added to an embedding or to the output head are not carried. A head that the base does not store,
    because it is tied to the embedding, has to be equal to the embedding; a head that only the base stores, equal to
    its embedding, follows the embedding. Quantised weights have to be the base's.
    """

    kind = "checkpoint"

    def __init__(self, name: str, folder: Path, base: TensorFolder) -> None:
        super().__init__(name, folder)
        tensors = self._tensors = TensorFolder(folder)
        naming = match_names(list(tensors), base, lambda own, theirs: tensors.shape(own) == base.shape(theirs))
        named = ((naming.to_base(own), own) for own in tensors)
        self._own = {theirs: own for theirs, own in named if theirs is not None and theirs in base}
        if not self._own:
            first = next(iter(tensors), None)
            raise ValueError(f"fine-tuned from another base: none of its tensors, e.g. {first!r}, is in {base.folder}")
        for theirs, own in self._own.items():
            check_stored(own, tensors.dtype(own), base.dtype(theirs))
        check_quantised(tensors, base, naming)
        for theirs, own in self._own.items():
            self._check_shape(own, theirs, base)
        self._tie_heads(base)
        codes = quantised(base)  # the same in both by now
        numbers = [theirs for theirs in self._own if theirs not in codes]
        self.ranks = {theirs: None for theirs in numbers if base.dtype(theirs) in MERGEABLE}
        for theirs in numbers:
            if theirs not in self.ranks and not same_tensor(tensors, own := self._own[theirs], base, theirs):
                self.not_carried.append(f"{own}: {not_merged(theirs, base)}")
        self.notes += tensors.notes
        lacking = [theirs for theirs in base if theirs not in self._own]
        self.notes += [f"{name} lacks {len(lacking)} tensors of the base, e.g. {lacking[0]!r}"] if lacking else []

    def delta(self, name: str, weight: Tensor) -> Delta:
        own = self._own[name]
        return Replaced(self._tensors, own, weight, f"source {self.name!r}: tensor {own!r}")

    def _check_shape(self, own: str, theirs: str, base: TensorFolder) -> None:
        shape = self._tensors.shape(own)
        if shape == base.shape(theirs):
            return
        if not (added := added_rows(theirs, shape, base)):
            raise ValueError(
                f"fine-tuned from another base: {own!r} has shape {shape}, the base's {theirs!r} has "
                f"{base.shape(theirs)}"
            )
        self.not_carried.append(f"{own}: {added}")

    def _tie_heads(self, base: TensorFolder) -> None:
        found, shape = set(self._own.values()), self._tensors.shape
        saved = {theirs: shape(own) for theirs, own in self._own.items()}
        for own in self._tensors:
            if own in found:
                continue
            twin = tied_embedding(own, saved, shape(own).__eq__)
            if twin is None:
                self.not_carried.append(f"{own}: the base has no such tensor")
            elif not same_tensor(self._tensors, own, self._tensors, self._own[twin]):
                raise ValueError(untied(own, twin))
        embeddings = {theirs: base.shape(theirs) for theirs in self._own}
        for theirs in [name for name in base if name not in self._own]:
            twin = tied_embedding(theirs, embeddings, base.shape(theirs).__eq__)
            if twin is not None and same_tensor(base, theirs, base, twin):
                self._own[theirs] = self._own[twin]
                self.notes.append(f"{self.name} stores no {theirs}: it is tied to {twin}, as in the base")


def check_stored(own: str, stored: torch.dtype, base: torch.dtype) -> None:
    """Raise a ValueError if a source holds codes of a quantised weight where the base has the weight itself."""
    if base in MERGEABLE and stored not in MERGEABLE:
        raise ValueError(f"{own!r} is stored as {stored}, the base's as {base}: dequantise the source first")


def not_merged(name: str, base: TensorFolder) -> str:
    """Return what to say of another value of a tensor that counts or indexes (a buffer)."""
    return f"the base stores it as {base.dtype(name)}, which is not merged"


def untied(own: str, twin: str) -> str:
    """Return what to say of an output head that changes by itself, where the base ties it to its embedding."""
    return (
        f"{own!r} is not the base's {twin!r}, to which the base ties it (it stores no such tensor): "
        "save the base with tie_word_embeddings=False first"
    )
