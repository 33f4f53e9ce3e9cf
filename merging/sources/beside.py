"""What an adapter's file holds beside the adapter itself, and its biases: where they go in the base."""

from __future__ import annotations

from orthoft.merging.files.tensors import TensorFolder, same_tensor
from orthoft.merging.sources.adapter_file import AdapterFile
from orthoft.merging.sources.checkpoint import check_stored, not_merged, untied
from orthoft.merging.sources.names import Naming, added_rows, tied_embedding
from orthoft.merging.sources.quantised import MERGEABLE, check_unquantised, quantised


class Beside:
    """The places in the base of what is saved beside an adapter, and of its own biases.

    ``saved`` is {the base's tensor: key}, ``biases`` {the base's bias: module}, ``not_carried`` lists what the base has
    no place for.

    Raises:
        ValueError: it changes quantised weights, an output head that the base ties, or biases that the base has not.
    """

    def __init__(self, file: AdapterFile, base: TensorFolder, naming: Naming) -> None:
        self._file, self._base, self._naming = file, base, naming
        self._codes = quantised(base) if file.beside else {}
        self.not_carried: list[str] = []
        self.saved = self._place()
        self.biases = self._find_biases()

    def _place(self) -> dict[str, str]:
        placed = {}
        for own, key in self._file.beside.items():
            theirs = self._naming.to_base(own)
            if theirs is None or theirs not in self._base:
                self._leave(own, key)
            elif self._replaces(own, key, theirs):
                placed[theirs] = key
        return placed

    def _replaces(self, own: str, key: str, theirs: str) -> bool:
        """Say whether a saved tensor can stand in the place of the base's, and list what of it cannot."""
        tensors, base = self._file.tensors, self._base
        if theirs in self._codes:
            if not same_tensor(tensors, key, base, theirs):
                check_unquantised(theirs, base)
            return False
        shape, added = tensors.shape(key), added_rows(theirs, tensors.shape(key), base)
        if shape != base.shape(theirs) and not added:
            self.not_carried.append(f"{own}: it has shape {shape}, the base's has {base.shape(theirs)}")
            return False
        if base.dtype(theirs) not in MERGEABLE:
            if not same_tensor(tensors, key, base, theirs):
                self.not_carried.append(f"{own}: {not_merged(theirs, base)}")
            return False
        check_stored(own, tensors.dtype(key), base.dtype(theirs))
        self.not_carried += [f"{own}: {added}"] if added else []
        return True

    def _leave(self, own: str, key: str) -> None:
        """List a saved tensor that the base has not, unless it is an output head equal to its embedding."""
        saved, tensors, base, naming = self._file.beside, self._file.tensors, self._base, self._naming
        shapes = {theirs: tensors.shape(k) for o, k in saved.items() if (theirs := naming.to_base(o))}
        known = {name: base.shape(name) for name in base} | shapes
        twin = tied_embedding(own, known, tensors.shape(key).__eq__)
        if twin is None:
            check_unquantised(naming.to_base(own) or own, base)
            self.not_carried.append(f"{own}: the base has no such tensor")
            return
        double = saved.get(naming.to_source(twin))
        other, name = (base, twin) if double is None else (tensors, double)
        if not same_tensor(tensors, key, other, name):
            raise ValueError(untied(own, twin))

    def _find_biases(self) -> dict[str, str]:
        """Return the places of what the adapter adds to biases; without a place it has to be zero."""
        found: dict[str, str] = {}
        for module, keys in self._file.keys.items():
            key = keys.get(self._file.reader.bias or "")
            theirs = self._naming.to_base(f"{module}.bias")
            if key is None:
                continue
            shape = self._file.tensors.shape(key)
            if theirs is not None and theirs in self._base and shape == self._base.shape(theirs):
                found[theirs] = module
            elif bool(self._file.read(key).any()):
                raise ValueError(
                    f"module {module!r} has {self._file.reader.bias}, and the base has no bias of its shape there"
                )
        return found
