"""How each kind of layer stores its weight, and how it runs with adapters: linear, embedding, convolution, experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from orthoft.adapter import Adapter, FrozenLinear, Map
from orthoft.experts import Experts, are_experts
from orthoft.linalg import at_least_float32
from orthoft.quantization import quantization_backend

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
OWN_FORWARD = tuple(convolution.forward for convolution in CONVOLUTIONS)


class Layout(ABC):
    """A kind of layer: where its (m, n) matrix is, and what adapters do in its forward pass.

    ``turns``: a rotation of the inputs acts on the activations, before one call of the frozen layer.
    """

    turns = False

    def held(self, base: Any) -> Any:
        """Return what has the matrix as its ``weight``: the layer itself, or a view of one that calls it otherwise."""
        return base

    @abstractmethod
    def features(self, base: Any) -> tuple[int, int]:
        """Return (n, m): the inputs and outputs of the matrix."""

    def rows(self, weight: Tensor) -> Tensor:
        """Return the stored weight as its (m, n) matrix."""
        return weight

    def stored(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return an (m, n) matrix in the layout of the stored weight ``like``."""
        return rows

    @abstractmethod
    def run(self, base: Any, call: Map, adapters: Sequence[Adapter], x: Tensor) -> Tensor:
        """Return the output for ``x`` with the adapters, each on the layer that those before it have made.

        ``call`` runs the frozen layer as its class does it.
        """


class LinearLayout(Layout):
    """nn.Linear and its quantised relatives: the weight is (m, n)."""

    turns = True

    def features(self, base: Any) -> tuple[int, int]:
        return base.in_features, base.out_features

    def run(self, base: Any, call: Map, adapters: Sequence[Adapter], x: Tensor) -> Tensor:
        weight = self.rows(base.weight) if _plain(base) else None
        return _nested(FrozenLinear(call, weight, None if weight is None else base.bias), adapters)(x)


class Conv1DLayout(LinearLayout):
    """GPT-2's Conv1D: a linear layer that stores (n, m)."""

    def features(self, base: Any) -> tuple[int, int]:
        return base.weight.shape[0], base.weight.shape[1]

    def rows(self, weight: Tensor) -> Tensor:
        return weight.mT

    def stored(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.mT


class EmbeddingLayout(Layout):
    """nn.Embedding: the table is (m words, n); its rows are adapted as they are looked up."""

    def features(self, base: Any) -> tuple[int, int]:
        return base.embedding_dim, base.num_embeddings

    def run(self, base: Any, call: Map, adapters: Sequence[Adapter], x: Tensor) -> Tensor:
        embed = call
        for adapter in adapters:
            embed = partial(adapter.lookup, embed=embed)
        with loaded(*adapters):
            return embed(x)


class ConvLayout(Layout):
    """Convolutions: the matrix is (m filters, n = channels per group x kernel), flattened.

    The filters are adapted, not the patches of the image: that is exact for any stride, padding, dilation and number of
    groups, and costs as much as a merge, once per forward pass. A layer with a forward of its own, or with hooks, is
    called with the adapted filters in place of its weight.
    """

    def features(self, base: Any) -> tuple[int, int]:
        return base.weight[0].numel(), base.weight.shape[0]

    def rows(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def stored(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.reshape(like.shape)

    def run(self, base: Any, call: Map, adapters: Sequence[Adapter], x: Tensor) -> Tensor:
        with loaded(base, *adapters):
            frozen = base.weight
            rows = at_least_float32(self.rows(frozen))
            for adapter in adapters:
                rows = adapter.in_training(rows) if adapter.training else adapter.merged(rows)
            weight = self.stored(rows, frozen).to(frozen.dtype if frozen.dtype.itemsize > 1 else x.dtype)
            if _plain_forward(base) and (_unhooked(base) or "weight" not in base._parameters):
                output: Tensor = base._conv_forward(x, weight, base.bias)
            else:
                output = functional_call(_Called(base, call), {"base.weight": weight}, (x,))
            return output


class ExpertsLayout(Layout):
    """The experts of a mixture as transformers fuses them: one rotation of what all experts of a layer read.

    Their first matrices are one parameter (E, m, n), or (E, n, m) where the module says that it is transposed; the
    matrix is (E m, n), one expert under the other. The activations are rotated, once for all experts: no stack of
    weights is made or kept for backward. Their second matrices stay as they are.
    """

    turns = True

    def __init__(self, base: Any) -> None:
        self.transposed = bool(base.is_transposed)

    def held(self, base: Any) -> Experts:
        return Experts(base)

    def features(self, base: Any) -> tuple[int, int]:
        weight = self.held(base).weight
        experts, m, n = (weight.mT if self.transposed else weight).shape
        return n, experts * m

    def rows(self, weight: Tensor) -> Tensor:
        return (weight.mT if self.transposed else weight).flatten(0, 1)

    def stored(self, rows: Tensor, like: Tensor) -> Tensor:
        stack = rows.reshape(len(like), -1, rows.shape[1])
        return stack.mT if self.transposed else stack

    def run(self, base: Any, call: Map, adapters: Sequence[Adapter], x: Tensor) -> Tensor:
        return _nested(FrozenLinear(call), adapters)(x)


def layout_of(base: nn.Module) -> Layout:
    """Return the layout of a layer.

    Raises:
        ValueError: adapters cannot act on this kind of layer.
    """
    if isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise ValueError(
            "the out_proj of nn.MultiheadAttention is not called, only its weight is read, so an adapter would have no "
            "effect: leave it out with exclude_modules"
        )
    if isinstance(base, Conv1D):
        return Conv1DLayout()
    if isinstance(base, nn.Linear):
        return LinearLayout()
    if isinstance(base, nn.Embedding):
        return EmbeddingLayout()
    if isinstance(base, CONVOLUTIONS):
        if not _plain_forward(base) and "weight" not in base._parameters:
            raise ValueError(f"the weight of {type(base).__name__} is computed, by a forward of its own: leave it out")
        return ConvLayout()
    if are_experts(base):
        return ExpertsLayout(base)
    backend = quantization_backend(base)  # GPTQ's and AWQ's layers are no nn.Linear
    if backend is not None and backend.layer_type == "linear":
        return LinearLayout()
    raise ValueError(
        f"{type(base).__name__} is not supported: target nn.Linear, Conv1D, nn.Embedding, nn.Conv1d to nn.Conv3d "
        "layers or the fused experts of a mixture (or exclude this one)"
    )


def _nested(linear: FrozenLinear, adapters: Sequence[Adapter]) -> FrozenLinear:
    """Return the layer with its adapters, each on what those before it have made."""
    for adapter in adapters:
        linear = FrozenLinear(partial(adapter, linear=linear))
    return linear


def _plain(base: Any) -> bool:
    """Say whether the weight may be used in place of the call: a float tensor in a layer nobody has hooked into."""
    own_class = type(base) in (nn.Linear, Conv1D)
    weight: Any = getattr(base, "weight", None)
    own_weight = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.dtype.itemsize > 1
    return own_class and own_weight and _unhooked(base)


def _plain_forward(base: nn.Module) -> bool:
    """Say whether a convolution computes as torch's do; one whose weight is parametrised has a class of its own."""
    return type(base).forward in OWN_FORWARD


def _unhooked(base: Any) -> bool:
    """Say whether nobody needs the call itself: no hook of torch's, no forward set from outside, as accelerate's is."""
    own_forward = "forward" not in base.__dict__
    return own_forward and not (
        base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    )


class _Called(nn.Module):
    """The call of a frozen layer with the layer as a child, so that its weight can be replaced for this call."""

    def __init__(self, base: nn.Module, call: Map) -> None:
        super().__init__()
        self.base, self.call = base, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def loaded(*modules: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which modules have the parameters that accelerate's offloading takes from them between calls.

    It loads them in the call of a module only: whoever uses one in another way needs this. Costs nothing without it.
    """
    hooked = [module for module in modules if "_hf_hook" in module.__dict__]
    return _loaded(hooked) if hooked else nullcontext()


@contextmanager
def _loaded(modules: Sequence[Any]) -> Iterator[None]:
    hooks = [(module, hook) for module in modules for hook in getattr(module._hf_hook, "hooks", (module._hf_hook,))]
    offloading = [(module, hook) for module, hook in hooks if getattr(hook, "offload", False)]
    try:
        for module, hook in offloading:
            hook.pre_forward(module)
            hook.offload = False  # a call within would load the frozen weight again, over an adapted one
        yield
    finally:
        for module, hook in offloading:
            hook.offload = True
            hook.post_forward(module, None)
