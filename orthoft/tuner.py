"""The PEFT host, written once for every adapter: configuration, layer and model."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, cast

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper, PeftType
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from orthoft.adapter import Adapter, Linear
from orthoft.errors import unknown
from orthoft.linalg import at_least_float32
from orthoft.peft_compat import peft_type_name, quantization_backend, saves_biases, write_load_hint


@dataclass
class OrthoConfig(PeftConfig):
    """What every orthoft adapter has in common with LoRA: where it goes, and what else is trained.

    Args:
        target_modules: names (suffixes), a regular expression, or "all-linear"; by the model's architecture if None.
        exclude_modules: names or a regular expression of what to leave out.
        layers_to_transform: indices of the layers to adapt, all if None.
        layers_pattern: name of the list of layers the indices refer to.
        modules_to_save: modules that are trained and saved whole, such as a new head.
        bias: "none", "all", or "ortho_only" (of the adapted layers).
        init_weights: start as the identity; False draws a random start, for tests.
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of adapted layers."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    bias: str = field(default="none", metadata={"help": "'none', 'all' or 'ortho_only'."})
    init_weights: bool = field(default=True, metadata={"help": "Start as the identity."})

    method: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(peft_type_name(self.method))
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # PEFT's own habit
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self._check_choice("bias", ("none", "all", "ortho_only"))
        if self.bias != "none" and not saves_biases():
            raise ValueError("bias needs PEFT 0.21 or newer: PEFT 0.20 trains biases but does not save them")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern names the list that layers_to_transform indexes: give both")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform needs target_modules as a list, not as a regular expression")

    @abstractmethod
    def make_adapter(self, key: str, in_features: int, out_features: int) -> Adapter:
        """Return the adapter of the layer named ``key``, not yet initialised."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        write_load_hint(save_directory)

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise unknown(f"value of {name}", getattr(self, name), choices)

    @staticmethod
    def _by_pattern(pattern: dict[str, int], key: str, default: int) -> int:
        """Look ``key`` up the way PEFT does: the first pattern that matches the end of the module name."""
        return next((v for p, v in pattern.items() if re.match(rf"(.*\.)?({p})$", key)), default)


class OrthoLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer (nn.Linear, Conv1D or a quantised one) and its named adapters.

    Active adapters nest in the order given: each adapts the layer that those before it have made, in forward as in
    merge. While merged, the original weight is kept in host memory, so that `unmerge` restores it bit for bit.
    """

    # PEFT is untyped: what this class takes from it.
    adapter_layer_names: tuple[str, ...]
    active_adapters: list[str]
    disable_adapters: bool
    get_base_layer: Callable[[], Any]
    get_base_weight: Callable[[], Tensor]
    set_base_weight: Callable[[Tensor], None]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        self.merged_adapters: list[str] = []
        self._original_weight: Tensor | None = None
        base = self.get_base_layer()
        self.transposed = isinstance(base, Conv1D)  # stores (in, out)
        self.in_features, self.out_features = _features(base)
        self.quantization_backend = quantization_backend(base)

    @property
    def adapters(self) -> MutableMapping[str, Adapter]:
        """The adapters by name (a ModuleDict)."""
        return cast(MutableMapping[str, Adapter], getattr(self, self.adapter_layer_names[0]))

    def update_layer(self, adapter_name: str, config: OrthoConfig, key: str) -> None:
        """Add an adapter."""
        adapter = config.make_adapter(key, self.in_features, self.out_features)
        adapter.reset_parameters(identity=config.init_weights)
        self.adapters[adapter_name] = adapter.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

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
        return self._adapted(base, self.active_adapters)(x)

    def _adapted(self, linear: Linear, names: list[str]) -> Linear:
        for name in names:
            if name in self.adapters:
                linear = partial(self.adapters[name], linear=linear)
        return linear

    def _forward_by_row(self, x: Tensor, base: Linear, names: list[str]) -> Tensor:
        """One adapter per row of the batch; "__base__" stands for none."""
        if self.merged:
            raise ValueError("adapter_names cannot be used while adapters are merged: call unmerge_adapter() first")
        if len(names) != len(x):
            raise ValueError(f"adapter_names needs one name per row of the batch: {len(names)} names, {len(x)} rows")
        rows = {name: [i for i, n in enumerate(names) if n == name] for name in dict.fromkeys(names)}
        parts = [self._adapted(base, [name])(x[index]) for name, index in rows.items()]
        order = torch.tensor([i for index in rows.values() for i in index], device=x.device)
        return torch.cat(parts)[torch.argsort(order)]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the weight: computed in float32 from the original, rounded once.

        Raises:
            ValueError: with ``safe_merge``, if the merged weight is not finite (nothing has changed then).
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.adapters]
        if not names:
            return
        stored = self.get_base_layer().weight if self.quantization_backend is None else self.get_base_weight()
        original = stored.detach().cpu().clone() if self._original_weight is None else self._original_weight
        merged = self._merged_weight(original.to(stored.device), [*self.merged_adapters, *names])
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"merging {', '.join(names)} gives NaN or Inf in the weight: the adapter seems broken")
        self.set_base_weight(merged)
        self._original_weight = original
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the weight from before the merges, bit for bit."""
        if self._original_weight is None:
            return
        weight = self.get_base_layer().weight
        self.set_base_weight(self._original_weight.to(weight.device))
        self._original_weight = None
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
        delta = self.adapters[adapter_name].delta(at_least_float32(self._rows(weight))).dense()
        return self._rows(delta).to(weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    @torch.no_grad()
    def _merged_weight(self, weight: Tensor, names: list[str]) -> Tensor:
        rows = at_least_float32(self._rows(weight))
        for name in names:
            rows = self.adapters[name].merged(rows)
        return self._rows(rows).to(weight.dtype).contiguous()

    def _rows(self, weight: Tensor) -> Tensor:
        """Turn the stored layout into (out, in), or back."""
        return weight.mT if self.transposed else weight


class OrthoModel(BaseTuner):
    """A model whose linear layers carry adapters of one method."""

    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

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
        layer = self.tuner_layer_cls(target)
        layer.train(target.training)
        layer.update_layer(adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained until it is made active
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand ``adapter_names`` (one adapter per row of the batch) down to the layers for one forward pass."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names works in evaluation mode only: call model.eval() first")
        missing = sorted(set(names) - {"__base__"} - set(self.peft_config))
        if missing:
            raise unknown("adapter", missing[0], [*self.peft_config, "__base__"])
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
    layers = [m for m in model.modules() if isinstance(m, OrthoLinear) and not m.disable_adapters]
    adapters = [layer.adapters[n] for layer in layers for n in layer.active_adapters if n in layer.adapters]
    terms = [term for adapter in adapters if (term := adapter.penalty()) is not None]
    return torch.stack(terms).sum() if terms else None


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: Any, names: list[str]) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": names}


def _features(base: nn.Module) -> tuple[int, int]:
    if isinstance(base, Conv1D):
        return base.weight.shape[0], base.weight.shape[1]
    if isinstance(base, nn.Linear):
        return base.in_features, base.out_features
    raise ValueError(f"{type(base).__name__} is not supported: target nn.Linear or Conv1D layers (or exclude this one)")
