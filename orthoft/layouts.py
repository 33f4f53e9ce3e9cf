"""How each kind of layer stores its weight, and how it runs with adapters: linear, embedding, convolution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from orthoft.adapter import Adapter, FrozenLinear, Map
from orthoft.linalg import at_least_float32
from orthoft.quantization import quantization_backend

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Layout(ABC):
    """A kind of layer: where its (m, n) matrix is, and what adapters do in its forward pass."""

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

    def features(self, base: Any) -> tuple[int, int]:
        return base.in_features, base.out_features

    def run(self, base: Any, call: Map, adapters: Sequence[Adapter], x: Tensor) -> Tensor:
        weight = self.rows(base.weight) if _plain(base) else None
        linear = FrozenLinear(call, weight, None if weight is None else base.bias)
        for adapter in adapters:
            linear = FrozenLinear(partial(adapter, linear=linear))
        return linear(x)


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
        return embed(x)


class ConvLayout(Layout):
    """Convolutions: the matrix is (m filters, n = channels per group x kernel), flattened.

    The filters are adapted, not the patches of the image: that is exact for any stride, padding, dilation and number of
    groups, and costs as much as a merge, once per forward pass.
    """

    def features(self, base: Any) -> tuple[int, int]:
        return base.weight[0].numel(), base.weight.shape[0]

    def rows(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def stored(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.reshape(like.shape)

    def run(self, base: Any, call: Map, adapters: Sequence[Adapter], x: Tensor) -> Tensor:
        rows = at_least_float32(self.rows(base.weight))
        for adapter in adapters:
            rows = adapter.in_training(rows) if adapter.training else adapter.merged(rows)
        weight = self.stored(rows, base.weight).to(base.weight.dtype)
        output: Tensor = base._conv_forward(x, weight, base.bias)
        return output


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
        return ConvLayout()
    backend = quantization_backend(base)  # GPTQ's and AWQ's layers are no nn.Linear
    if backend is not None and backend.layer_type == "linear":
        return LinearLayout()
    raise ValueError(
        f"{type(base).__name__} is not supported: target nn.Linear, Conv1D, nn.Embedding or nn.Conv1d to nn.Conv3d "
        "layers (or exclude this one)"
    )


def _plain(base: Any) -> bool:
    """Say whether the weight may be used in place of the call: a float tensor in a layer nobody has hooked into."""
    own_class = type(base) in (nn.Linear, Conv1D)
    weight: Any = getattr(base, "weight", None)
    own_weight = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
    return own_class and own_weight and not hasattr(base, "_hf_hook") and not base._forward_hooks
