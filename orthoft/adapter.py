"""What an adapter is: the trainable state of one frozen linear map, and how it acts. No PEFT, no names, no dtypes.

Conventions: the weight ``W`` is (m outputs, n inputs), activations are rows, ``y = x W^T``. An input rotation acts as
``x' = x Q``, which is ``W' = W Q^T``: the rows of ``W`` live where the activations live. An embedding is the (m, n)
table whose rows are looked up, a convolution the (m, n) matrix of its flattened filters: the same ``W' = W Q^T``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, is_in_torch_dispatch_mode

from orthoft.delta import Delta

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FrozenLinear:
    """The linear map under an adapter: callable, and where it is a plain layer also its weight (m, n) and bias.

    ``weight`` is None where the layer is quantised, adapted already, or may only be called (offloaded by hooks).
    """

    call: Map
    weight: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.call(x)


class Adapter(nn.Module, ABC):
    """Trainable state on one frozen linear map. It is made, adopts its weight, and is reset, in this order."""

    kept: ClassVar[tuple[str, ...]] = ()  # buffers that a cast leaves in float32: rounded bases are not orthonormal
    _former_parameters: dict[str, Tensor]  # set by nn.DataParallel on its replicas, which have no others

    def __init__(self) -> None:
        super().__init__()
        self._cache: tuple[list[Tensor], Any] | None = None

    @abstractmethod
    def forward(self, x: Tensor, linear: FrozenLinear) -> Tensor:
        """Return the adapted output of a linear layer for ``x`` (..., n)."""

    @abstractmethod
    def lookup(self, ids: Tensor, embed: Map) -> Tensor:
        """Return the adapted rows of an embedding; ``embed`` looks up the frozen (or adapted) ones."""

    @abstractmethod
    def delta(self, weight: Tensor) -> Delta:
        """Return ``W' - W`` for the (m, n) ``weight``, factored where it can be."""

    @abstractmethod
    def reset_parameters(self, identity: bool = True) -> None:
        """Start as the identity, or (for tests and ablations) at a random point near it."""

    @abstractmethod
    def build(self) -> Any:
        """Return the small matrices that the parameters stand for, in float32 or float64."""

    @abstractmethod
    def flops_per_token(self) -> int:
        """Return the floating-point operations of ``forward`` per token beyond those of the frozen layer."""

    @abstractmethod
    def combine(self, adapters: Sequence[Self], weights: Sequence[float]) -> None:
        """Become the weighted combination of adapters of the same layer, in this method's own geometry.

        One adapter with weight 1 is reproduced (one with a series up to its defect), weight 0 is the identity.

        Raises:
            ValueError: they have no common geometry (other blocks, other bases, another pattern).
        """

    def adopt(self, weight: Callable[[], Tensor]) -> None:
        """Take what is derived from the frozen (m, n) weight, such as a basis; it may cost a dequantisation."""

    def merged(self, weight: Tensor, inverse: bool = False) -> Tensor:
        """Return ``W'`` from ``W``, or ``W`` from ``W'`` when ``inverse``. Differentiable."""
        delta = self.delta(weight).dense()
        return weight - delta if inverse else weight + delta

    def in_training(self, weight: Tensor) -> Tensor:
        """Return ``W'`` as this training step has it: `merged`, with what is left out by dropout."""
        return self.merged(weight)

    def penalty(self) -> Tensor | None:
        """Return the regulariser of the paper times its weight, or None if there is none."""
        return None

    def matrices(self) -> Any:
        """Return ``build()``, kept from call to call in evaluation mode for as long as no parameter changes."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or is_replica(self):
            return self._built()
        state = self.sources()
        if not have_values(state):
            return self._built()
        if self._cache is None or not _equal(self._cache[0], state):
            self._cache = [p.detach().clone() for p in state], self._built()
        return self._cache[1]

    def _built(self) -> Any:
        """Return ``build()`` as it is without autocast, which would compute the small matrices in half precision."""
        held: Any = self._former_parameters.values() if is_replica(self) else self.parameters()
        device = next(iter(held)).device.type
        if not autocasts(device):
            return self.build()
        with torch.autocast(device, enabled=False):
            return self.build()

    def sources(self) -> list[Tensor]:
        """Return the tensors that `build` reads, whose change outdates its result."""
        return [*self.parameters(), *self.buffers()]

    def _apply(self, fn: Map, recurse: bool = True) -> Self:
        before = {name: buffer for name in self.kept if (buffer := self._buffers[name]) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            if (after := self.get_buffer(name)).dtype.itemsize < 4:
                self._buffers[name] = buffer.to(after.device)
        return self

    def train(self, mode: bool = True) -> Self:
        self._cache = None
        return super().train(mode)


class InputRotation(Adapter):
    """``W' = W Q^T``: forward, look-up, merge and unmerge all follow from one method."""

    @abstractmethod
    def rotate(self, x: Tensor, transpose: bool = False, inverse: bool = False) -> Tensor:
        """Return ``x Q`` for rows ``x`` (..., n), with ``Q^T``, ``Q^-1`` or ``Q^-T`` in its place by the flags."""

    def forward(self, x: Tensor, linear: FrozenLinear) -> Tensor:
        return linear(self.turn(x))

    def turn(self, x: Tensor) -> Tensor:
        """Return what the frozen layer gets in place of ``x``: rotated, with what this training step leaves out."""
        return self.rotate(cast_for_autocast(x))

    def lookup(self, ids: Tensor, embed: Map) -> Tensor:
        return self.rotate(embed(ids), transpose=True)

    def merged(self, weight: Tensor, inverse: bool = False) -> Tensor:
        return self.rotate(weight, transpose=True, inverse=inverse)


def _equal(seen: list[Tensor], state: list[Tensor]) -> bool:
    """Compare by value: version counters miss writes through ``.data``, as averaging of weights makes them."""
    return all(
        old.dtype == new.dtype and old.device == new.device and torch.equal(old, new)
        for old, new in zip(seen, state, strict=True)
    )


def have_values(tensors: Sequence[Tensor]) -> bool:
    """Say whether tensors may be compared and kept: not on the meta device, in FakeTensorMode or under torch.func."""
    modes = _get_current_dispatch_mode_stack() if is_in_torch_dispatch_mode() else []
    faked = bool(modes) and any(isinstance(mode, FakeTensorMode) for mode in modes)
    shapes = [x for x in tensors if x.is_meta or type(x) is FakeTensor]
    return not shapes and not faked and peek_interpreter_stack() is None


def is_replica(module: nn.Module) -> bool:
    """Say whether a module is nn.DataParallel's copy for one call: its parameters are plain attributes."""
    return "_is_replica" in module.__dict__


def cast_for_autocast(x: Tensor) -> Tensor:
    """Cast ``x`` once where autocast would cast it in each product, so that one copy is saved for backward."""
    device = x.device.type
    if autocasts(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def autocasts(device: str) -> bool:
    """Say whether autocast is on for a type of device; there is none for shapes without storage."""
    return device != "meta" and torch.is_autocast_enabled(device)


def whole(parameter: Tensor) -> Tensor:
    """Return a parameter in one piece where FSDP2 keeps parts of it on each process, as it does outside of forward."""
    gathered: Tensor = getattr(parameter, "full_tensor", lambda: parameter)()
    return gathered
