"""LoRAs on parameters instead of modules (``target_parameters``), as PEFT puts them on the experts of mixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from orthoft.delta import Delta, Dense, LowRank
from orthoft.linalg import at_least, frobenius_norm
from orthoft.merging.files.tensors import TensorFolder
from orthoft.merging.formats.lora import rank_and_scale
from orthoft.merging.formats.registry import MERGE_FIRST
from orthoft.merging.sources.adapter_file import AdapterFile
from orthoft.merging.sources.names import Naming
from orthoft.merging.sources.orientation import Orientation
from orthoft.merging.sources.quantised import check_unquantised
from orthoft.merging.sources.renames import Loaded, loaded_model
from orthoft.merging.sources.rows import as_precise, finite

INNER = ".base_layer"  # PEFT wraps a module once for each of its parameters, the first of them innermost
A, B = "lora_A.weight", "lora_B.weight"
Factors = tuple[Tensor, Tensor]


class Stacked(Delta):
    """The changes (p, q) of E experts, one under the other: products of factors that are read when they are needed."""

    def __init__(self, experts: int, size: tuple[int, int], factors: Callable[[int], Factors]) -> None:
        self._experts, self._size, self._factors = experts, size, factors

    @property
    def shape(self) -> tuple[int, int]:
        return self._experts * self._size[0], self._size[1]

    def dense(self) -> Tensor:
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        p = self._size[0]
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        parts = []
        for expert in range(min(start // p, self._experts - 1), max((stop + p - 1) // p, 1)):
            left, right = self._factors(expert)
            parts.append(left[max(start - expert * p, 0) : max(stop - expert * p, 0)] @ right)
        return torch.cat(parts) if parts else self.rows(0, 0)

    def norm(self) -> Tensor:
        return frobenius_norm(torch.stack([LowRank(*self._factors(expert)).norm() for expert in range(self._experts)]))

    def upcast(self, dtype: torch.dtype = torch.float32) -> Stacked:
        def factors(expert: int) -> Factors:
            left, right = self._factors(expert)
            return at_least(left, dtype), at_least(right, dtype)

        return Stacked(self._experts, self._size, factors)


@dataclass(frozen=True)
class Place:
    """Which part of a LoRA changes a tensor of the base.

    The ``module`` has ``lora_A`` (r E, i) and ``lora_B`` (o, r E): of expert e the rows ``e r + k`` and the columns
    ``k E + e``. Its change (p, q) is ``s B_e A_e``, or the transpose of that where ``flipped``. The tensor has the rows
    ``start`` to ``stop`` of it, or all rows of all experts if ``expert`` is None.
    """

    module: str
    rank: int
    scale: float
    experts: int
    size: tuple[int, int]  # (p, q)
    flipped: bool
    expert: int | None = None
    start: int = 0
    stop: int | None = None


class Parameters:
    """The LoRAs of an adapter that sit on parameters.

    ``names`` are what these parameters may be called, ``stored`` maps those that hold what the base stores expert by
    expert to the first of its tensors. ``places`` are known once the names are.
    """

    def __init__(self, file: AdapterFile, base: TensorFolder, owner: str) -> None:
        self._file, self._base, self._owner = file, base, owner
        self._levels = _levels(file)
        self.names = [name for path in self._levels for name in file.targets(path)]
        model = self._model = loaded_model(base) if self.names else Loaded()
        self._order = {name: at for at, name in enumerate(model.names)}
        self._parts = {name: parts for name, parts in model.fused.items() if parts}
        self.stored = model.firsts
        self.places: dict[str, Place] = {}
        self._second = lru_cache(maxsize=2)(self._read_second)  # of all experts: their weights come one by one

    def place(self, naming: Naming) -> list[str]:
        """Find the parameters in the base; return the modules of the file that are theirs.

        Raises:
            ValueError: a parameter is not found or quantised, or a LoRA does not fit.
        """
        taken = []
        for path, modules in self._levels.items():
            loaded = {name: naming.prefix.to_base(name) or "" for name in self._file.targets(path)}
            for name in loaded:
                check_unquantised(naming.to_base(name) or name, self._base)
            known = [name for name in loaded if naming.to_base(name) in self._base]
            if not known and modules == [path]:
                continue  # a module like any other
            unclear = len(known) > 1 and any(loaded[name] not in self._order for name in known)
            if len(known) != len(modules) or unclear:
                raise ValueError(f"the parameters of {path!r} that it targets are not in the base: {MERGE_FIRST}")
            known.sort(key=lambda name: self._order.get(loaded[name], 0))
            for name, module in zip(known, modules, strict=True):
                self.places |= self._places(name, module, loaded[name], naming.to_base(name) or "")
            taken += modules
        return taken

    def ranks(self) -> dict[str, int | None]:
        """Return the rank of the factors of each tensor, None of several experts in one."""
        return {name: None if place.expert is None else place.rank for name, place in self.places.items()}

    def delta(self, name: str, weight: Tensor) -> Delta:
        """Return the change of one of ``places``, given the weight (m, n)."""
        place = self.places[name]
        if place.expert is not None:
            return LowRank(*self._factors(place, place.expert, weight))
        stacked = Stacked(place.experts, place.size, lambda expert: self._factors(place, expert, weight))
        return stacked if stacked.shape == weight.shape else Dense(stacked.dense().reshape(weight.shape))

    def _factors(self, place: Place, expert: int, weight: Tensor) -> Factors:
        key, rank = self._file.keys[place.module][A], place.rank
        first = self._file.tensors.rows(key, expert * rank, (expert + 1) * rank)  # (r, i)
        second = self._second(place.module)[:, expert :: place.experts]  # (o, r)
        first = finite(first, f"{self._owner}: tensor {key!r}")
        left, right = (first.mT, second.mT) if place.flipped else (second, first)
        return as_precise(left[place.start : place.stop] * place.scale, weight), as_precise(right, weight)

    def _read_second(self, module: str) -> Tensor:
        return self._file.read(self._file.keys[module][B])

    def _places(self, name: str, module: str, loaded: str, whole: str) -> Iterator[tuple[str, Place]]:
        """Give the tensors of the base that a parameter is stored as, each with its place."""
        shape, parts = self._base.shape, self._parts.get(loaded)
        if parts is None:
            many = len(shape(whole)) == 3
            turned = self._turned(loaded, whole) if many else None
            place = self._checked(name, module, shape(whole) if many else (1, *shape(whole)), turned)
            yield whole, place if many else replace(place, expert=0)
            return
        if any(len(shape(one)) != 2 or shape(one)[1] != shape(parts[0][0])[1] for one in parts[0]):
            raise ValueError(f"the base's {', '.join(parts[0])} have shapes that do not make one matrix")
        stops = list(accumulate(shape(one)[0] for one in parts[0]))
        place = self._checked(name, module, (len(parts), stops[-1], shape(parts[0][0])[1]), False)
        for expert, names in enumerate(parts):
            for one, first, stop in zip(names, parts[0], stops, strict=True):
                check_unquantised(one, self._base)
                if shape(one) != shape(first):
                    raise ValueError(f"the base's {one!r} and {first!r} are experts of different shapes")
                yield one, replace(place, expert=expert, start=stop - shape(one)[0], stop=stop)

    def _turned(self, loaded: str, stored: str) -> bool:
        """Say whether PEFT takes square experts for (inputs, outputs): their module tells, where it is known."""
        if self._model.names:
            return loaded.rpartition(".")[0] in self._model.turned
        return Orientation(self._base).inputs_first(stored)

    def _checked(self, name: str, module: str, shape: tuple[int, ...], turned: bool | None) -> Place:
        """Return the place of a parameter (E, p, q); ``turned`` says whether inputs are first in square ones.

        None for what never is turned: PEFT adds to a 2-D parameter as it is.
        """
        shapes = self._file.shapes(module)
        if shapes.keys() != {A, B}:
            raise ValueError(f"{module!r}, a LoRA on a parameter, has {', '.join(sorted(shapes))}, not {A} and {B}")
        rank, scale = rank_and_scale(self._file.settings, name)
        first, second, experts = shapes[A], shapes[B], shape[0]
        if len(shape) != 3 or not all(shape) or first[:1] != second[1:] or first[:1] != (rank * experts,):
            raise ValueError(
                f"an adapter of another base: its {name!r} has factors {first} and {second} of rank {rank}, "
                f"for {experts} matrices of shape {shape[1:]}"
            )
        size, told = (second[0], *first[1:]), shape[1:]
        straight, flipped = size == told, turned is not None and size == told[::-1]
        if not straight and not flipped:
            raise ValueError(
                f"an adapter of another base: its {name!r} has {size} outputs and inputs, the base's {told}"
            )
        return Place(module, rank, scale, experts, (told[0], told[1]), flipped if straight != flipped else bool(turned))


def _levels(file: AdapterFile) -> dict[str, list[str]]:
    """Return {module: its LoRAs, innermost first} of the modules that may have LoRAs on parameters."""
    levels: dict[str, list[str]] = {}
    for module in file.keys:
        path = module
        while path.endswith(INNER):
            path = path.removesuffix(INNER)
        if file.targets(path):
            levels.setdefault(path, []).append(module)
    return {path: sorted(modules, key=len, reverse=True) for path, modules in levels.items()}
