"""Changes of a weight that are read when they are needed: a saved tensor in place of the base's, a few new rows."""

from __future__ import annotations

import torch
from torch import Tensor

from orthoft.delta import Delta, LowRank
from orthoft.linalg import at_least, at_least_float32, frobenius_norm
from orthoft.merging.files.tensors import TensorFolder, is_finite

CHUNK = 2**24  # entries that are read at once where no rows are asked for


class Replaced(Delta):
    """``delta = W' - W`` with ``W'`` on disk, row by row; what ``W'`` has beyond ``W`` (m, n) is left out.

    Raises:
        ValueError: when rows are read that hold NaN or Inf; ``what`` names the tensor.
    """

    def __init__(self, tensors: TensorFolder, name: str, weight: Tensor, what: str) -> None:
        self._tensors, self._name, self._weight, self._what = tensors, name, weight, what

    @property
    def shape(self) -> tuple[int, int]:
        return self._weight.shape[0], self._weight.shape[1]

    def saved(self, start: int, stop: int) -> Tensor:
        """Return the rows ``start`` to ``stop`` of ``W'`` in float32 or more."""
        rows, columns = self.shape
        return finite(self._tensors.rows(self._name, start, min(stop, rows), columns), self._what)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows ``start`` to ``stop`` of the change, reading no others."""
        return self.saved(start, stop) - self._weight[start:stop]

    def dense(self) -> Tensor:
        return self.rows(0, self.shape[0])

    def norm(self) -> Tensor:
        step = max(CHUNK // max(self.shape[1], 1), 1)
        parts = [frobenius_norm(self.rows(i, i + step)) for i in range(0, self.shape[0], step)]
        return frobenius_norm(torch.stack(parts) if parts else self.rows(0, 0))

    def upcast(self, dtype: torch.dtype = torch.float32) -> Replaced:
        return Replaced(self._tensors, self._name, at_least(self._weight, dtype), self._what)


def replaced_rows(indices: list[int], rows: Tensor, weight: Tensor) -> LowRank:
    """Return the change of a weight (m, n) that puts ``rows`` (k, n) at ``indices``, as factors of rank k.

    Raises:
        ValueError: an index is outside of the weight, or given twice, or there is not one for each row.
    """
    if len(indices) != len(rows) or len(set(indices)) != len(indices):
        raise ValueError(f"{len(rows)} rows of tokens have {len(set(indices))} different indices")
    outside = [index for index in indices if not 0 <= index < len(weight)]
    if outside:
        raise ValueError(f"token {outside[0]} is new, the base has {len(weight)} rows: add it to the base first")
    places = torch.tensor(indices, dtype=torch.long)
    B = torch.zeros(len(weight), len(rows), dtype=weight.dtype)
    B[places, torch.arange(len(rows))] = 1
    return LowRank(B, rows - weight[places])


def finite(tensor: Tensor, what: str) -> Tensor:
    """Return the tensor in float32 or more, or raise a ValueError that says what holds NaN or Inf."""
    tensor = at_least_float32(tensor)
    if not is_finite(tensor):
        raise ValueError(f"{what} contains NaN or Inf")
    return tensor


def as_precise(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return a source's tensor in float64 if the weight is: products take one dtype."""
    return tensor.double() if weight.dtype == torch.float64 and tensor.is_floating_point() else tensor
