"""What an adapter is: the trainable state of one frozen linear map, and how it acts. No PEFT, no names, no dtypes.

Conventions: the weight ``W`` is (m outputs, n inputs), activations are rows, ``y = x W^T``. An input rotation acts as
``x' = x Q``, which is ``W' = W Q^T``: the rows of ``W`` live where the activations live.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from orthoft.delta import Delta

Linear = Callable[[Tensor], Tensor]


class Adapter(nn.Module, ABC):
    """Trainable state on one frozen linear map."""

    def __init__(self) -> None:
        super().__init__()
        self._cache: tuple[list[Tensor], Any] | None = None

    @abstractmethod
    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        """Return the adapted output; ``linear`` is the frozen layer (maybe quantised, maybe adapted already)."""

    @abstractmethod
    def delta(self, weight: Tensor) -> Delta:
        """Return ``W' - W`` for the (m, n) ``weight``, factored where it can be."""

    @abstractmethod
    def reset_parameters(self, identity: bool = True) -> None:
        """Start as the identity, or (for tests and ablations) at a random point near it."""

    @abstractmethod
    def build(self) -> Any:
        """Return the small matrices that the parameters stand for, in float32 or float64."""

    def merged(self, weight: Tensor, inverse: bool = False) -> Tensor:
        """Return ``W'`` from ``W``, or ``W`` from ``W'`` when ``inverse``."""
        delta = self.delta(weight).dense()
        return weight - delta if inverse else weight + delta

    def penalty(self) -> Tensor | None:
        """Return the regulariser of the paper times its weight, or None if there is none."""
        return None

    def matrices(self) -> Any:
        """Return ``build()``, kept from call to call in evaluation mode for as long as no parameter changes."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.build()
        state = [*self.parameters(), *self.buffers()]
        if self._cache is None or not _equal(self._cache[0], state):
            self._cache = [p.detach().clone() for p in state], self.build()
        return self._cache[1]

    def train(self, mode: bool = True) -> Self:
        self._cache = None
        return super().train(mode)


class InputRotation(Adapter):
    """``W' = W Q^T``: forward, merge and unmerge all follow from one method."""

    @abstractmethod
    def rotate(self, x: Tensor, transpose: bool = False, inverse: bool = False) -> Tensor:
        """Return ``x Q`` for rows ``x`` (..., n), with ``Q^T``, ``Q^-1`` or ``Q^-T`` in its place by the flags."""

    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        return linear(self.rotate(cast_for_autocast(x)))

    def merged(self, weight: Tensor, inverse: bool = False) -> Tensor:
        return self.rotate(weight, transpose=True, inverse=inverse)


def _equal(seen: list[Tensor], state: list[Tensor]) -> bool:
    """Compare by value: version counters miss writes through ``.data``, as averaging of weights makes them."""
    return all(
        old.dtype == new.dtype and old.device == new.device and torch.equal(old, new)
        for old, new in zip(seen, state, strict=True)
    )


def cast_for_autocast(x: Tensor) -> Tensor:
    """Cast ``x`` once where autocast would cast it in each product, so that one copy is saved for backward."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x
