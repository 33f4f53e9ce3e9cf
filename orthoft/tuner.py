"""The PEFT model of every adapter, and what is asked of all adapters of a model at once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from torch import Tensor, nn

from orthoft.config import OrthoConfig
from orthoft.errors import unknown
from orthoft.experts import are_experts
from orthoft.layer import OrthoLayer
from orthoft.layouts import CONVOLUTIONS, ConvLayout, LinearLayout, layout_of, loaded
from orthoft.quantization import check_mergeable, keep_unpacked, quantization_kwargs, requantization_summary


class OrthoModel(BaseTuner):
    """A model whose layers carry adapters of one method."""

    linear_layer_cls: type[OrthoLayer]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject as PEFT does, and warn of fused experts that the first adapter to be trained leaves out."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for module in model.modules():
            keep_unpacked(module)  # of layers without an adapter, too: gradients of those before them go through
        if len(self.peft_config) > 1 or self.peft_config[adapter_name].inference_mode:
            return
        if stacks := list(_stacks_of_matrices(model)):
            count = "1 parameter stays" if len(stacks) == 1 else f"{len(stacks)} such parameters stay"
            key = stacks[0].rpartition(".")[0]
            ours = are_experts(model.get_submodule(key))
            way = f"target_modules may name {key.rpartition('.')[2]!r}" if ours else "of LoRA, target_parameters may"
            warnings.warn(
                f"{stacks[0]} holds several matrices in one parameter, as fused experts do, and no adapter sits on "
                f"it: {count} as in the base model ({way})",
                stacklevel=2,
            )

    def _create_and_replace(
        self,
        peft_config: OrthoConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        layout = layout_of(base)
        if base is not target and isinstance(layout, ConvLayout):
            raise ValueError(
                f"{current_key!r} carries adapters of another model: merge those before these are put on top"
            )
        layer_cls = self.linear_layer_cls if isinstance(layout, LinearLayout) else self.tuner_layer_cls
        layer = layer_cls(target, quantization_kwargs(self.model))
        layer.train(target.training)
        layer.update_layer(adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained until it is made active
        with loaded(base):  # PEFT moves the adapter to where the weight is
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replace as PEFT does; experts that come back have no ``weight`` that it could hand over."""
        if are_experts(new_module):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter that combines others in their own geometry: rotations as sums of generators.

        It sits on every layer that one of them adapts; one that a layer does not have counts as the identity there.

        Raises:
            ValueError: an unknown or taken name, numbers that differ, a weight that is not finite, adapters without a
                common geometry.
        """
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(f"one weight per adapter is needed: {len(adapters)} adapters, {len(weights)} weights")
        weights = [float(weight) for weight in weights]
        if not all(map(math.isfinite, weights)):
            raise ValueError(f"the weights of a combination are finite numbers, got {weights}")
        if missing := [name for name in adapters if name not in self.peft_config]:
            raise unknown("adapter", missing[0], self.peft_config)
        if adapter_name in self.peft_config:
            raise ValueError(f"the model has an adapter {adapter_name!r} already: choose another name or delete it")
        layers = {
            key: layer
            for key, layer in self.model.named_modules()
            if isinstance(layer, self.tuner_layer_cls) and any(name in layer.adapters for name in adapters)
        }
        first, *others = (self.peft_config[name] for name in adapters)
        config = first.combined(others, list(layers))
        self.peft_config[adapter_name] = config
        try:
            for key, layer in layers.items():
                layer.update_layer(adapter_name, config, key)
                present = [
                    (layer.adapters[n], w) for n, w in zip(adapters, weights, strict=True) if n in layer.adapters
                ]
                made = layer.adapters[adapter_name].to(next(present[0][0].parameters()).dtype)
                with torch.no_grad():
                    made.combine([a for a, _ in present], [w for _, w in present])
        except Exception:
            self.delete_adapter(adapter_name)
            raise
        self.set_adapter(self.active_adapters)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge into every layer; where one of them cannot be merged into, into none."""
        with self._requantization_reported(adapter_names):
            super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merge as `merge_adapter` does, and return the base model."""
        with self._requantization_reported(adapter_names):
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)  # type: ignore[no-any-return]

    @contextmanager
    def _requantization_reported(self, adapter_names: list[str] | None) -> Iterator[None]:
        """Check that all layers can be merged into, and warn once of what requantising them has changed."""
        named = ((key, module) for key, module in self.model.named_modules() if isinstance(module, OrthoLayer))
        wanted = adapter_names or self.active_adapters
        layers = {key: layer for key, layer in named if any(name in layer.adapters for name in wanted)}
        for layer in layers.values():
            check_mergeable(layer.held, layer.quantization_backend)
        _check_own_weights(layers)
        merged = {key: len(layer.merged_adapters) for key, layer in layers.items()}
        yield
        errors = {
            key: error
            for key, layer in layers.items()
            if (error := layer.requantization_error) is not None and len(layer.merged_adapters) > merged[key]
        }
        if errors:
            warnings.warn(requantization_summary(errors), stacklevel=4)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand ``adapter_names`` (one adapter per row of the batch) down to the layers for one forward pass."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if isinstance(names, str):
            raise ValueError(f"adapter_names is a list of one name per row of the batch, got {names!r}")
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        missing = sorted(set(names) - {"__base__"} - set(self.peft_config))
        if missing:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(missing)}. Choose from: "
                f"{', '.join(self.peft_config)}, __base__"
            )
        beams = kwargs.get("num_beams")
        if isinstance(beams, int) and beams > 1:
            names = [name for name in names for _ in range(beams)]
        layers = [m for m in self.modules() if isinstance(m, (self.tuner_layer_cls, AuxiliaryTrainingWrapper))]
        hook = partial(_pass_adapter_names, names=names)
        handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def penalty(model: nn.Module) -> Tensor | None:
    """Return the sum of the regularisers of the active adapters in ``model``, or None if none has one."""
    layers = [m for m in model.modules() if isinstance(m, OrthoLayer) and not m.disable_adapters]
    adapters = [layer.adapters[n] for layer in layers for n in layer.active_adapters if n in layer.adapters]
    terms = [term for adapter in adapters if (term := adapter.penalty()) is not None]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else None


def _stacks_of_matrices(model: nn.Module) -> Iterator[str]:
    """Yield the names of parameters with three dimensions, such as experts, that are neither trained nor a layer's."""
    reached = [key for key, m in model.named_modules() if isinstance(m, (OrthoLayer, AuxiliaryTrainingWrapper))]
    for key, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn.") or isinstance(module, CONVOLUTIONS):
            continue
        if any(key == root or key.startswith(f"{root}.") for root in reached):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape) > 1:
                yield f"{key}.{name}".lstrip(".")


def _check_own_weights(layers: Mapping[str, OrthoLayer]) -> None:
    """Check that no merge into one of these layers goes through to what another computes.

    Raises:
        ValueError: a layer sits on adapters of another model that are not merged, or two layers share one weight.
    """
    owners: dict[int, str] = {}
    for key, layer in layers.items():
        inner = layer.base_layer
        if isinstance(inner, BaseTunerLayer) and not inner.merged:
            raise ValueError(f"{key!r} sits on adapters of another model: merge those before these are put on top")
        owner = owners.setdefault(id(getattr(layer.held, "weight", layer)), key)
        if owner != key and not key.startswith(f"{owner}."):
            raise ValueError(
                f"{owner!r} and {key!r} share one weight, which cannot hold both adapters: adapt one of them"
            )


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: Any, names: list[str]) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": names}
