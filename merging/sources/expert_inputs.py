"""Adapters of ours on the fused experts of a mixture: one rotation of what all experts of a layer read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from orthoft.delta import Delta, Dense
from orthoft.experts import FIRST_MATRICES
from orthoft.merging.files.tensors import TensorFolder
from orthoft.merging.formats.registry import MERGE_FIRST
from orthoft.merging.sources.adapter_file import AdapterFile
from orthoft.merging.sources.names import Naming
from orthoft.merging.sources.orientation import EXPERTS, Orientation
from orthoft.merging.sources.quantised import check_unquantised
from orthoft.merging.sources.renames import Loaded, loaded_model

ROTATIONS = ("ORTHOFT_OFTV2", "ORTHOFT_HRA", "ORTHOFT_GOFT", "ORTHOFT_PSOFT")
Read = Callable[[str, Tensor], Delta]  # of a module, and a matrix (outputs, inputs)


def first_matrices(modules: Iterable[str], base: TensorFolder) -> dict[str, str]:
    """Return {module: its first matrices, as the loaded model calls them} of those modules that are fused experts.

    A module may have a prefix more or less than in the base.
    """
    asked = [module for module in modules if EXPERTS.fullmatch(f"{module}.weight")]
    names = (*base, *loaded_model(base).names) if asked else ()
    known = {name for name in names if name.rpartition(".")[2] in FIRST_MATRICES}
    found = {module: [f"{module}.{last}" for last in FIRST_MATRICES] for module in asked}
    own = {module: next((one for one in ends if _fits(one, known)), None) for module, ends in found.items()}
    return {module: name for module, name in own.items() if name is not None}


def _fits(name: str, known: Collection[str]) -> bool:
    return any(f".{name}".endswith(f".{one}") or f".{one}".endswith(f".{name}") for one in known)


def stored_experts(name: str, naming: Naming, base: TensorFolder) -> list[str]:
    """Return the tensors of the base that hold the first matrices of experts, all in one or each by itself."""
    if parts := loaded_model(base).fused.get(naming.prefix.to_base(name) or ""):
        return [one for expert in parts for one in expert]
    whole = naming.to_base(name) or ""
    return [whole] if whole in base and len(base.shape(whole)) == 3 else []


@dataclass(frozen=True)
class Place:
    """The module whose adapter changes a tensor of the base: a matrix (p, n), or a stack (E, p, n), or (E, n, p)."""

    module: str
    rank: int | None
    turned: bool = False


class InputsFirst(Delta):
    """The change (E n, p) of experts that are stored as (inputs, outputs), by that of (E p, n), the other way round."""

    def __init__(self, inner: Delta, experts: int) -> None:
        self._inner, self._experts = inner, experts
        self._outputs, self._inputs = inner.shape[0] // experts, inner.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self._experts * self._inputs, self._outputs

    def dense(self) -> Tensor:
        return self._inner.dense().reshape(self._experts, self._outputs, self._inputs).mT.flatten(0, 1)

    def part(self, start: int, stop: int) -> Delta:
        """Return the change of an expert as its kind is, of other rows as numbers."""
        expert, rest = divmod(start, self._inputs)
        if rest or stop - start != self._inputs:
            return super().part(start, stop)
        return self._inner.part(expert * self._outputs, (expert + 1) * self._outputs).transposed()

    def norm(self) -> Tensor:
        return self._inner.norm()

    def upcast(self, dtype: torch.dtype = torch.float32) -> InputsFirst:
        return InputsFirst(self._inner.upcast(dtype), self._experts)


class ExpertInputs:
    """The modules of an adapter that are fused experts.

    ``names`` are what their first matrices are called in the loaded model, ``stored`` maps those that the base stores
    expert by expert to the first of its tensors. ``places`` are known once the names are.
    """

    def __init__(self, file: AdapterFile, base: TensorFolder, read: Read) -> None:
        self._file, self._base, self._read = file, base, read
        self._modules = first_matrices(file.keys, base) if file.reader.peft_type in ROTATIONS else {}
        self._model = loaded_model(base) if self._modules else Loaded()
        self.names = list(self._modules.values())
        self.stored = self._model.firsts
        self.places: dict[str, Place] = {}

    @property
    def modules(self) -> list[str]:
        """The modules of the file that are experts."""
        return list(self._modules)

    def place(self, naming: Naming) -> None:
        """Find the experts in the base.

        Raises:
            ValueError: they are not there, are quantised, or have other inputs.
        """
        for module, name in self._modules.items():
            tensors = stored_experts(name, naming, self._base)
            if not tensors:
                raise ValueError(f"an adapter of another base: its experts {module!r} are not in the base")
            told = (naming.prefix.to_base(name) or "").rpartition(".")[0] in self._model.turned
            for tensor in tensors:
                fused = len(self._base.shape(tensor)) == 3
                turned = fused and (told if self._model.names else Orientation(self._base).inputs_first(tensor))
                self.places[tensor] = Place(module, None if fused else self._file.extent(module).rank, turned)
                self._check(tensor, self.places[tensor])

    def _check(self, name: str, place: Place) -> None:
        check_unquantised(name, self._base)
        shape, inputs = self._base.shape(name), self._file.extent(place.module).inputs
        if inputs not in (None, shape[-2 if place.turned else -1]):
            raise ValueError(
                f"an adapter of another base: its module {place.module!r} rotates {inputs} inputs of experts, the "
                f"base's {name!r} has shape {shape}"
            )
        if len(shape) == 2 and "orthoft_psoft_adapter.fingerprint" in self._file.shapes(place.module):
            raise ValueError(
                f"module {place.module!r} was saved without its basis, which is one of all experts, and the base has "
                f"them one by one: {MERGE_FIRST}"
            )

    def ranks(self) -> dict[str, int | None]:
        """Return the rank of the factors of each tensor, None of several experts in one."""
        return {name: place.rank for name, place in self.places.items()}

    def delta(self, name: str, weight: Tensor) -> Delta:
        """Return the change of one of ``places``, given the weight as a matrix."""
        place, shape = self.places[name], self._base.shape(name)
        if len(shape) == 2:
            return self._read(place.module, weight)
        stack = weight.reshape(shape)
        rows = (stack.mT if place.turned else stack).flatten(0, 1)
        delta = self._read(place.module, rows)
        delta = InputsFirst(delta, shape[0]) if place.turned else delta
        return delta if delta.shape == weight.shape else Dense(delta.dense().reshape(weight.shape))
