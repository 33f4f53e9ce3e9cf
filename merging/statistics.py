"""Numbers from data that methods merge with: Fisher information, Gram matrices of inputs, Adam's second moments.

A file of statistics is one safetensors file (``statistics.safetensors`` where a folder is given), of one task and one
kind, which its metadata name: ``{"kind": "fisher" | "gram" | "second_moment", "examples": "256"}``. Its keys are the
base's names of the weights, with or without a prefix, as in a source. What it holds of a weight:

* ``fisher``: the mean over examples of the squared gradient, in the weight's own shape.
* ``second_moment``: Adam's running mean of the squared gradient, in the weight's own shape.
* ``gram``: ``X^T X`` of the inputs ``X`` (tokens, n), per example. Its shape is that of the stored matrix with n twice
  and a 1 for the outputs, which tells the side also where the weight is square: (1, n, n) of a weight stored as
  (outputs, inputs), (n, n, 1) of one stored as (inputs, outputs), as GPT-2's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from orthoft.errors import unknown
from orthoft.linalg import at_least_float32
from orthoft.merging.files.header import read_header
from orthoft.merging.files.tensors import TensorFolder, as_matrix, is_finite, matrix_shape
from orthoft.merging.sources.names import match_names

STEM = "statistics"
KINDS = ("fisher", "gram", "second_moment")
STATISTICS_OF: dict[str, str] = {}  # the kind that a method takes, by its name
ASYMMETRY = 1e-3  # of a Gram matrix in half precision, relative to its largest entry


def takes(kind: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Mark a merge method, a function of its registered name, as one that takes statistics of this kind."""

    def mark(merge: Callable[..., Tensor]) -> Callable[..., Tensor]:
        STATISTICS_OF[merge.__name__] = kind
        return merge

    return mark


def statistics_file(path: str | Path) -> Path:
    """Return the file that a path means: itself if it ends in .safetensors, else statistics.safetensors in a folder."""
    path = Path(path).expanduser()
    return path if path.suffix == ".safetensors" else path / f"{STEM}.safetensors"


def metadata_in(path: str | Path) -> Mapping[str, str]:
    """Return what a file of statistics says of itself, its ``kind`` among it; see the module.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is corrupt.
    """
    file = statistics_file(path)
    if not file.is_file():
        raise FileNotFoundError(f"no statistics: there is no file {file}")
    read_header(file)
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


class Statistics:
    """The statistics of one task; only the headers are read at first, `get` reads those of one weight.

    ``kind`` is what they are, ``metadata`` all that the file says of them, ``weights`` maps the base's names to the
    file's, and ``not_used`` lists what the file holds that the base has no weight for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is corrupt, does not say its kind, or belongs to another base.
    """

    def __init__(self, path: str | Path, base: TensorFolder) -> None:
        self.file = statistics_file(path)
        self.metadata = metadata_in(path)
        self._tensors = TensorFolder(self.file.parent, self.file.stem)
        self.kind = self.metadata.get("kind", "")
        if self.kind not in KINDS:
            raise unknown(f"kind in the metadata of {self.file}:", self.metadata.get("kind"), KINDS)
        self._base = base
        self.weights = self._named()
        used = set(self.weights.values())
        self.not_used = [own for own in self._tensors if own not in used]

    def get(self, name: str) -> Tensor | None:
        """Return the statistics of one of the base's weights as a method takes them, or None without any.

        They are in float32 or more. Fisher information and second moments come in the shape of the stored matrix, Gram
        matrices as (1, n, n) or (n, n, 1). Fisher information is divided by its root mean square over the whole file,
        so that each task has the same say: weights ``w_t * root_mean_square`` undo it.

        Raises:
            ValueError: NaN or Inf, negative squares, or a Gram matrix that is not symmetric.
        """
        if name not in self.weights:
            return None
        own = self.weights[name]
        numbers = at_least_float32(self._tensors[own])
        if not is_finite(numbers):
            raise ValueError(f"{self._what(own)} contains NaN or Inf")
        if self.kind == "gram":
            return self._symmetric(numbers, own)
        if (numbers < 0).any():
            raise ValueError(f"{self._what(own)} has entries below 0, which a mean of squares cannot have")
        matrix = as_matrix(numbers)
        return matrix / self.root_mean_square if self.kind == "fisher" else matrix

    @cached_property
    def root_mean_square(self) -> float:
        """The root mean square of all entries that the base has weights for, read one tensor at a time."""
        norms = (torch.linalg.vector_norm(self._tensors[own], dtype=torch.float64) for own in self.weights.values())
        total = sum(float(norm) ** 2 for norm in norms)
        count = sum(math.prod(self._tensors.shape(own)) for own in self.weights.values())
        return math.sqrt(total / count) or 1.0  # all zero: nothing to scale

    def _named(self) -> dict[str, str]:
        naming = match_names(list(self._tensors), self._base, self._fits)
        pairs = {theirs: own for own in self._tensors if (theirs := naming.to_base(own)) in self._base and theirs}
        if not pairs:
            first = next(iter(self._tensors), None)
            raise ValueError(f"{self.file} is of another base: none of its names, e.g. {first!r}, is in it")
        for theirs, own in pairs.items():
            if not self._fits(own, theirs):
                raise ValueError(
                    f"{self._what(own)} has shape {self._tensors.shape(own)}, {self.kind} statistics of the base's "
                    f"{theirs!r} have {' or '.join(map(str, self._shapes(theirs)))}"
                )
        return pairs

    def _fits(self, own: str, theirs: str) -> bool:
        return self._tensors.shape(own) in self._shapes(theirs)

    def _shapes(self, theirs: str) -> list[tuple[int, ...]]:
        shape = self._base.shape(theirs)
        if self.kind != "gram":
            return [shape]
        rows, columns = matrix_shape(shape)
        shapes: list[tuple[int, ...]] = [(1, columns, columns), (rows, rows, 1)]
        return shapes if len(shape) == 2 else shapes[:1]

    def _symmetric(self, numbers: Tensor, own: str) -> Tensor:
        G = numbers.squeeze(-1 if numbers.shape[-1] == 1 else 0)  # (n, n)
        if (G - G.mT).abs().max() > ASYMMETRY * G.abs().max() or (G.diagonal() < 0).any():
            raise ValueError(f"{self._what(own)} is no Gram matrix: it is not symmetric, or negative on its diagonal")
        return numbers

    def _what(self, own: str) -> str:
        return f"{own!r} in {self.file}"


def open_statistics(path: str | Path, base: TensorFolder) -> Statistics:
    """Return the statistics in a file or a folder, checked against the base whose weights they are of."""
    return Statistics(path, base)


def statistics_of_tasks(
    method: str, paths: Mapping[str, str | Path], sources: Sequence[str], base: TensorFolder
) -> dict[str, Statistics]:
    """Return the statistics of each source, by name and in order, for a merge method; none without paths.

    Raises:
        ValueError: the method takes none, a name is not a source, a source has none, or the kind is another.
        FileNotFoundError: there is no such file.
    """
    if not paths:
        return {}
    if method not in STATISTICS_OF:
        takers = ", ".join(sorted(STATISTICS_OF))
        raise ValueError(f"method {method!r} takes no statistics (those that do are {takers})")
    for name in paths:
        if name not in sources:
            raise unknown("source in statistics", name, sources)
    for name in sources:
        if name not in paths:
            raise ValueError(f"there are no statistics for source {name!r}: give them for all sources, or for none")
    found = {name: open_statistics(paths[name], base) for name in sources}
    for opened in found.values():
        if opened.kind != STATISTICS_OF[method]:
            raise ValueError(
                f"method {method!r} takes {STATISTICS_OF[method]} statistics, {opened.file} holds {opened.kind}"
            )
    return found


def complete(statistics: Sequence[Tensor | None] | None) -> list[Tensor] | None:
    """Return the statistics of a weight if every task has them, else None: the rule of all methods here.

    A task without numbers cannot be weighed against tasks with numbers, so that such a weight is merged without any.
    """
    present = [numbers for numbers in statistics or () if numbers is not None]
    return present if statistics and len(present) == len(statistics) else None


def check_weights(method: str, weights: Tensor) -> None:
    """Raise a ValueError if a weight is negative or all are zero: they scale sums of squares."""
    if (weights < 0).any() or weights.sum() == 0:
        raise ValueError(f"method {method!r} takes weights of 0 or more, not all 0, got {weights.tolist()}")


def by_inputs(x: Tensor, grams: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], bool]:
    """Return deltas as (T, outputs, inputs), their Gram matrices as (n, n), and whether ``x`` has the inputs first."""
    if all(G.shape == (1, x.shape[2], x.shape[2]) for G in grams):
        return x, [G[0] for G in grams], False
    return x.mT, [G[..., 0] for G in grams], True
