"""The base's weights in a model that may carry PEFT adapters: their names, their parameters, their layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

WRAPPERS = re.compile(r"\.(base_layer|modules_to_save\.[^.]+)(?=\.|$)")


def base_name(name: str) -> str:
    """Return the name that a parameter or module of a PEFT model has in the base."""
    return WRAPPERS.sub("", name.removeprefix("base_model.model."))


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Give the base's name and the parameter of each floating weight, without those of adapters.

    Of a module that is trained whole beside an adapter (``modules_to_save``) it is the trained one.
    """
    tuned = dict(_tuner_layers(model))
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        owner = next((o for end in range(len(parts)) if (o := ".".join(parts[:end])) in tuned), None)
        of_adapter = owner is not None and not name.startswith(f"{owner}.base_layer.")
        if parameter.is_floating_point() and not of_adapter and ".original_module." not in name:
            yield base_name(name), parameter


def linear_layers(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, bool]]]:
    """Give the base's name of the weight, the module that is called, and whether the inputs come first (Conv1D).

    The module is the adapted layer where there is an adapter: its inputs are those of the adapted weight.
    """
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        adapted = isinstance(module, BaseTunerLayer)
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        inside = f"{name}." if adapted else None
        if isinstance(layer, nn.Linear | Conv1D):
            yield f"{base_name(name)}.weight", (module, isinstance(layer, Conv1D))


@contextmanager
def adapters_merged(model: nn.Module) -> Iterator[None]:
    """Merge the active adapters into their layers for the block; afterwards the weights are as before, bit for bit."""
    with ExitStack() as stack:
        for _, layer in _tuner_layers(model):
            if not layer.merged:
                stack.enter_context(_merged(layer))
        yield


@contextmanager
def _merged(layer: BaseTunerLayer) -> Iterator[None]:
    base = layer.get_base_layer()
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    layer.merge()
    try:
        yield
    finally:
        layer.unmerge()
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                parameter.copy_(before[name])  # what PEFT subtracts is not always what it added


def _tuner_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Give the outermost adapted layers by name."""
    inside: str | None = None
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not (inside is not None and name.startswith(inside)):
            inside = f"{name}."
            yield name, module
