"""Adapters on layers that are not theirs alone: on top of another model's adapters, or with a weight in common."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from orthoft import ADAPTERS, HRAConfig, OFTv2Config

SMALL: dict[str, dict[str, Any]] = {"oftv2": {"block_size": 4}, "hra": {"r": 4}, "psoft": {"r": 4}}


def away(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("method", ADAPTERS)
def test_on_top_of_a_lora_the_lora_still_counts(method: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(OrderedDict(lin=nn.Linear(8, 8)))
    lora = away(get_peft_model(net, LoraConfig(r=2, target_modules=["lin"])))
    x = torch.randn(5, 8)
    wanted: Tensor = lora(x)
    top = get_peft_model(lora, ADAPTERS[method](target_modules=["lin"], **SMALL.get(method, {})))
    assert (top(x) - wanted).abs().max() < 1e-5
    with pytest.raises(ValueError, match="merge those before"):
        top.merge_adapter()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x))
        return out


def test_two_adapted_layers_of_one_weight_refuse_to_merge() -> None:
    torch.manual_seed(0)
    net = Tied()
    before = net.one.weight.detach().clone()
    model = away(get_peft_model(net, HRAConfig(r=4, target_modules=["one", "two"])))
    with pytest.raises(ValueError, match="share one weight"):
        model.merge_adapter()
    assert torch.equal(net.one.base_layer.weight, before)


def test_a_failed_combination_leaves_nothing_behind() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(OrderedDict(lin=nn.Linear(8, 8))), OFTv2Config(block_size=4, target_modules=["lin"])
    )
    with torch.no_grad():
        next(model.base_model.model.lin.adapters["default"].parameters()).fill_(float("nan"))
    with pytest.raises((ValueError, RuntimeError)):
        model.base_model.add_weighted_adapter(["default"], [0.5], "broken")
    assert list(model.peft_config) == ["default"]
    assert list(model.base_model.model.lin.adapters) == ["default"]
    with pytest.raises(ValueError, match="finite"):
        model.base_model.add_weighted_adapter(["default"], [float("nan")], "broken")


def test_a_radius_does_not_bound_combinations() -> None:
    torch.manual_seed(0)
    config = OFTv2Config(block_size=4, map="cayley", radius=0.1, target_modules=["lin"], init_weights=False)
    model = get_peft_model(nn.Sequential(OrderedDict(lin=nn.Linear(8, 8))), config)
    model.base_model.add_weighted_adapter(["default"], [2.0], "twice")
    adapters = model.base_model.model.lin.adapters
    eye = torch.eye(8)
    once = adapters["default"].rotate(eye)
    assert (adapters["twice"].rotate(eye) - once @ once).abs().max() < 1e-5
    assert model.peft_config["twice"].radius is None
