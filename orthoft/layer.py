"""The PEFT layer of every adapter: a frozen layer and its named adapters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, MutableMapping
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from orthoft.adapter import Adapter, InputRotation, Map, cast_for_autocast
from orthoft.config import OrthoConfig
from orthoft.layouts import ExpertsLayout, layout_of, loaded
from orthoft.linalg import at_least_float32
from orthoft.quantization import OriginalWeight, quantization_backend, requantization_error


class OrthoLayer(nn.Module, BaseTunerLayer):
    """A frozen layer (linear, also quantised, an embedding, a convolution, fused experts) and its named adapters.

    Active adapters nest in the order given: each adapts the layer that those before it have made, in forward as in
    merge. While merged, the original weight is kept in host memory, so that `unmerge` restores it bit for bit.
    """

    # PEFT is untyped: what this class takes from it.
    adapter_layer_names: tuple[str, ...]
    active_adapters: list[str]
    disable_adapters: bool
    get_base_layer: Callable[[], Any]
    set_adapter: Callable[..., None]

    def __init__(self, base_layer: nn.Module, quantization_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        self.merged_adapters: list[str] = []
        self._original_weight: OriginalWeight | None = None
        self.requantization_error: float | None = None  # of the merged weight, relative, if the layer is quantised
        base = self.get_base_layer()
        self.layout = layout_of(base)
        self.in_features, self.out_features = self.layout.features(base)
        self.quantization_backend = quantization_backend(self.held, **(quantization_kwargs or {}))

    @property
    def adapters(self) -> MutableMapping[str, Adapter]:
        """The adapters by name (a ModuleDict)."""
        return cast(MutableMapping[str, Adapter], getattr(self, self.adapter_layer_names[0]))

    @property
    def held(self) -> Any:
        """What has the matrix of the frozen layer as its ``weight``."""
        return self.layout.held(self.get_base_layer())

    def get_base_weight(self) -> Tensor:
        """Return the weight of the frozen layer, in floating point."""
        if self.quantization_backend is None:
            return self.held.weight.data  # type: ignore[no-any-return]
        return super().get_base_weight()  # type: ignore[no-any-return]

    def set_base_weight(self, weight: Tensor) -> None:
        """Set it, quantised again where it was."""
        if self.quantization_backend is None:
            self.held.weight.data = weight
        else:
            super().set_base_weight(weight)

    def update_layer(self, adapter_name: str, config: OrthoConfig, key: str) -> None:
        """Add an adapter."""
        adapter = config.make_adapter(key, self.in_features, self.out_features)
        if isinstance(self.layout, ExpertsLayout) and not isinstance(adapter, InputRotation):
            raise ValueError(
                f"{key!r} holds the experts of a mixture, whose inputs an adapter can rotate; {config.method} changes "
                "their weights: leave it out with exclude_modules"
            )
        base = self.get_base_layer()
        with gather_params_ctx(base.parameters()):  # ZeRO-3 keeps them in parts
            adapter.adopt(self._frozen_rows)
        adapter.reset_parameters(identity=config.init_weights)
        self.adapters[adapter_name] = adapter.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        dtype = getattr(getattr(self.held, "weight", None), "dtype", torch.float32)
        rounds = dtype.is_floating_point and dtype.itemsize > 1  # float8 stores weights; nothing is computed in it
        if rounds and not any(p.is_meta for p in adapter.parameters()):
            adapter.to(dtype)  # as all of PEFT's; with autocast_adapter_dtype, its default, PEFT makes it float32 again
            for buffer in adapter.buffers():  # which PEFT leaves as they are: it would load into rounded ones
                buffer.data = at_least_float32(buffer) if buffer.is_floating_point() else buffer.data
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the device only: PEFT, which calls this after loading too, would round what was loaded."""
        if adapter_name not in self.adapters or any(p.is_meta for p in self.adapters[adapter_name].parameters()):
            return
        base = self.get_base_layer()
        held = next(itertools.chain(base.parameters(), base.buffers()), None)
        if device is None and held is not None:  # meta is where accelerate's offloading has it, not where it computes
            device = getattr(base._hf_hook, "execution_device", None) if hasattr(base, "_hf_hook") else held.device
        if device is not None:
            self.adapters[adapter_name].to(device)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names: list[str] | None = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()

        def base(x: Tensor) -> Tensor:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]

        if names is not None:
            return self._forward_by_row(x, base, names)
        if self.disable_adapters or self.merged:
            return base(x)
        return self._adapted(x, base, self.active_adapters)

    def _adapted(self, x: Tensor, base: Map, names: list[str]) -> Tensor:
        adapters = [self.adapters[name] for name in names if name in self.adapters]
        return self.layout.run(self.base_layer, base, adapters, x) if adapters else base(x)

    def _forward_by_row(self, x: Tensor, base: Map, names: list[str]) -> Tensor:
        """One adapter per row of the batch; "__base__" stands for none."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if isinstance(self.layout, ExpertsLayout) and names and len(x) % len(names) == 0:
            names = [name for name in names for _ in range(len(x) // len(names))]  # rows come as their tokens
        if len(names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(x)} respectively."
            )
        if not names:
            return base(x)
        rows = {name: [i for i, n in enumerate(names) if n == name] for name in dict.fromkeys(names)}
        order = torch.tensor([i for index in rows.values() for i in index], device=x.device, dtype=torch.long)
        found = {name: self.adapters[name] for name in rows if name in self.adapters}
        turned = {name: a.turn for name, a in found.items() if isinstance(a, InputRotation)}
        if self.layout.turns and len(turned) == len(found):  # one call of the frozen layer for all
            with loaded(*found.values()):
                parts = [turned.get(name, cast_for_autocast)(x[index]) for name, index in rows.items()]
            return base(torch.cat(parts)[torch.argsort(order)])
        parts = [self._adapted(x[index], base, [name]) for name, index in rows.items()]
        return torch.cat(parts)[torch.argsort(order)]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the weight: computed in float32 from the original, rounded (or quantised) once.

        Raises:
            ValueError: the layer is quantised in a way that cannot be merged into; with ``safe_merge``, if the merged
                weight is not finite. Nothing has changed then.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.adapters]
        if not names:
            return
        held = self.held
        original = self._original_weight or OriginalWeight(held, self.quantization_backend)
        weight = original.read(held.weight.device)
        merged = self._merged_weight(weight, [*self.merged_adapters, *names])
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        self.set_base_weight(merged.to(weight.dtype))
        self._original_weight = original
        self.merged_adapters.extend(names)
        if self.quantization_backend is not None:
            self.requantization_error = requantization_error(self, merged)

    def unmerge(self) -> None:
        """Restore the weight from before the merges, bit for bit."""
        if self._original_weight is None:
            return
        self._original_weight.restore(self)
        self._original_weight = self.requantization_error = None
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer, merged if asked; called by `merge_and_unload`, after which nothing is kept."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            self._original_weight = None
        base: nn.Module = self.get_base_layer()
        return base

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return ``W' - W`` of one adapter on the current weight, in the layout and dtype of the weight."""
        weight = self.get_base_weight()
        delta = self.adapters[adapter_name].delta(at_least_float32(self.layout.rows(weight))).dense()
        return self.layout.stored(delta, weight).to(weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def _frozen_rows(self) -> Tensor:
        """Return the (m, n) weight without what is merged into it, in float32 or more."""
        with loaded(self.get_base_layer()):
            original = self._original_weight
            weight = self.get_base_weight() if original is None else original.read(self.held.weight.device)
            return at_least_float32(self.layout.rows(weight))

    @torch.no_grad()
    def _merged_weight(self, weight: Tensor, names: list[str]) -> Tensor:
        """Return the merged weight in the layout of ``weight``, in float32 or more."""
        rows = at_least_float32(self.layout.rows(weight))
        for name in names:
            rows = self.adapters[name].merged(rows)
        return self.layout.stored(rows, weight).contiguous()
