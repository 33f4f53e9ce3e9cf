"""Quantised layers: reading their weights, merging into them, and restoring their codes bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

from orthoft.linalg import frobenius_norm

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REFUSED = "merge into the model before quantisation, or keep the adapter apart"


def quantization_backend(base_layer: nn.Module, **kwargs: Any) -> Any:
    """Return PEFT's reader and writer of a quantised weight, or None for a plain layer (or one that PEFT cannot read).

    A 4-bit layer is kept from repacking its weight from here on, see `keep_unpacked`.
    """
    if _surely_plain(base_layer):
        return None
    try:
        # PEFT refuses torchao layers of unknown configuration, but only a merge needs it.
        backend = resolve_quantization_backend(base_layer, **{"get_apply_tensor_subclass": _no_configuration, **kwargs})
    except ImportError:  # PEFT 0.20 with torchao 0.18: layers train, and refuse merges
        return None
    keep_unpacked(base_layer)
    return backend


def quantization_kwargs(model: nn.Module) -> dict[str, Any]:
    """Return what a quantised model knows that its layers need to be quantised again."""
    return cast(dict[str, Any], get_quantization_kwargs(model))


def check_mergeable(base_layer: Any, backend: Any) -> None:
    """Check that a layer's weight can be read, written, and restored.

    Raises:
        ValueError: it cannot.
    """
    weight, name = getattr(base_layer, "weight", None), type(base_layer).__name__
    if backend is None:
        if weight is None or not _is_plain(weight):
            raise ValueError(f"this PEFT cannot merge into the quantised weight of {name}: {REFUSED}")
        if "weight" not in base_layer._parameters:  # set, it would be computed again, or taken apart into its parts
            raise ValueError(f"the weight of {name} is computed by a parametrization: remove that before merging")
        return
    if not backend.supports_merge or weight is None:
        raise ValueError(f"merging into layers quantised with {backend.backend_name} is not supported: {REFUSED}")
    if _is_bitsandbytes(weight) and not weight.is_meta and _scales(base_layer) is None:
        raise ValueError(f"the weight of {name} is not quantised yet: move the model to its device before merging")
    if hasattr(backend, "get_apply_tensor_subclass"):
        backend.get_apply_tensor_subclass()


class OriginalWeight:
    """The weight that a layer had before a merge, in host memory: floating point, or codes with their scales."""

    def __init__(self, base_layer: Any, backend: Any) -> None:
        check_mergeable(base_layer, backend)
        self.backend = backend
        self.weight = _copied(base_layer.weight, _scales(base_layer), torch.device("cpu"))

    def read(self, device: torch.device) -> Tensor:
        """Return the weight in floating point on ``device``."""
        if self.backend is None:
            return self.weight.to(device)
        return cast(Tensor, self.backend.get_base_weight(_layer_of(self._on(device))))

    def restore(self, layer: BaseTunerLayer) -> None:
        """Put the weight back, bit for bit."""
        base = cast(Any, layer).held
        if self.backend is None:
            layer.set_base_weight(self.weight.to(base.weight.device))
            return
        weight = self._on(base.weight.device)
        base.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        if _kind(weight) == "Params4bit":
            base.weight.module, base.quant_state = base, base.weight.quant_state
        elif _kind(weight) == "Int8Params":
            base.state.reset_grads()  # the layer takes codes and scales from the weight in its next forward pass

    def _on(self, device: torch.device) -> Tensor:
        return _copied(self.weight, _scales(_layer_of(self.weight)), device)


def requantization_error(layer: BaseTunerLayer, wanted: Tensor) -> float:
    """Return ``||dequantised - W'||_F / ||W'||_F`` of a layer that was to hold ``wanted``, W'."""
    norm = frobenius_norm(wanted)
    distance = frobenius_norm(layer.get_base_weight().to(wanted) - wanted)
    return float(distance / norm.clamp_min(torch.finfo(norm.dtype).tiny))


def requantization_summary(errors: Mapping[str, float]) -> str:
    """Return one line on the requantisation of layers, given their errors by name."""
    worst = max(errors, key=lambda name: errors[name])
    layers = "1 layer" if len(errors) == 1 else f"{len(errors)} layers"
    return f"requantised {layers}, relative error {errors[worst]:.2g} at most ({worst})"


def keep_unpacked(base_layer: Any) -> None:
    """Keep a bitsandbytes 4-bit layer in the layout that all of bitsandbytes can read.

    On CPUs with AVX512-BF16 the first evaluation repacks the codes and rounds the scales to bfloat16. From then on
    gradients stop at the layer without a word, and dequantisation (so merging) returns garbage. What is packed already
    is unpacked: its codes exactly, its scales as rounded, which is the weight that the packed layer has computed with.
    """
    if not hasattr(base_layer, "support_avx512bf16_for_cpu"):
        return
    base_layer.support_avx512bf16_for_cpu = False
    weight = base_layer.weight
    state: Any = getattr(weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        absmax = state.absmax.mT.reshape(-1).float()  # one scale per block of codes, row by row
        state.original_nested = False  # quantising the rounded scales once more would lose more
        weight.data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
        state.absmax = absmax
        weight.quant_state = base_layer.quant_state = state


def _surely_plain(base_layer: nn.Module) -> bool:
    """Say whether no quantisation library need be asked (asking imports them all)."""
    weight = getattr(base_layer, "weight", None)
    own = type(base_layer).__module__.partition(".")[0] in ("torch", "transformers", "orthoft")
    return own and weight is not None and _is_plain(weight)


def _no_configuration() -> Any:
    raise ValueError(
        "merging into torchao layers needs the configuration they were quantised with: load the model with "
        f"quantization_config=TorchAoConfig(...), or {REFUSED}"
    )


def _kind(weight: Tensor) -> str:
    return type(weight).__name__


def _is_plain(weight: Tensor) -> bool:
    """Say whether the entries are the weight; quantised ones may call themselves floating point, too."""
    return weight.dtype in FLOATS and type(weight).__module__.partition(".")[0] not in ("bitsandbytes", "torchao")


def _is_bitsandbytes(weight: Tensor) -> bool:
    return _kind(weight) in ("Params4bit", "Int8Params")


def _scales(base_layer: Any) -> Any:
    """Return what bitsandbytes reads codes with: 8-bit layers move it from the weight to their state in forward."""
    weight = base_layer.weight
    if _kind(weight) == "Int8Params":
        return base_layer.state.SCB if weight.SCB is None else weight.SCB
    return getattr(weight, "quant_state", None)


def _layer_of(weight: Any) -> Any:
    """Return the parts of a layer that PEFT's readers look at."""
    return SimpleNamespace(weight=weight, state=SimpleNamespace(SCB=getattr(weight, "SCB", None)))


def _copied(weight: Any, scales: Any, device: torch.device) -> Tensor:
    """Return a copy of a weight on ``device`` that shares neither codes nor scales with it."""
    if _kind(weight) == "Params4bit":
        return cast(Tensor, copy.deepcopy(weight).to(device))  # its `to` moves the scales in place
    if _kind(weight) == "Int8Params":
        codes = weight.data.to(device, copy=True)
        scales = scales.to(device, copy=True)
        made = type(weight)(codes, requires_grad=False, has_fp16_weights=weight.has_fp16_weights, CB=codes, SCB=scales)
        return cast(Tensor, made)
    return cast(Tensor, weight.detach().clone().to(device))
