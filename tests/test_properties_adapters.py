"""What must be true of any adapter on a linear layer, over shapes, settings and dtypes that nobody chose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn

from orthoft import ADAPTERS, GOFTConfig, HRAConfig, OFTv2Config, PSOFTConfig, SVFTConfig
from orthoft.config import OrthoConfig

EXAMPLES = 5
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 3e-2}  # parameters and bases are float32


def fit(least: int, most: int, *wanted: int) -> list[int]:
    """Return those of the wanted sizes, and the largest, that are possible."""
    return sorted({size for size in (*wanted, most) if least <= size <= most})


# By adapter, the configurations that fit a weight (m, n); none where it says that it cannot be.
FITTING: dict[str, Callable[[int, int], list[OrthoConfig]]] = {
    "oftv2": lambda m, n: [
        OFTv2Config(block_size=size, map=map, block_share=share)
        for size, map, share in product((s for s in range(2, n + 1) if n % s == 0), ("series", "cayley"), (False, True))
    ],
    "hra": lambda m, n: [
        *(HRAConfig(r=r) for r in fit(2, n - n % 2, 2, 4)),
        *(HRAConfig(r=r, orthonormal=True) for r in fit(1, n, 1, 3)),
    ],
    "goft": lambda m, n: [
        GOFTConfig(block_size=size, mode=mode, scale=scale)
        for size, mode, scale in product((2, 8), ("strict", "quasi"), (False, True))
        if n > 1
    ],
    "psoft": lambda m, n: [
        *(PSOFTConfig(r=r) for r in fit(1, min(m, n), 1, 3)),
        *(PSOFTConfig(r=r, relax=False, map="series") for r in fit(2, min(m, n), 2)),
    ],
    "svft": lambda m, n: [
        *(SVFTConfig(pattern=pattern, schedule=way) for pattern in ("plain", "banded", "random") for way in WAYS),
        *(SVFTConfig(pattern="banded", off_diagonals=1, rank=1, gate=True, schedule=way) for way in WAYS),
    ],
}
WAYS = ("activations", "weight")


@dataclass(frozen=True)
class Problem:
    """A linear layer (m, n), an adapter of it, and inputs (rows, n)."""

    config: OrthoConfig
    m: int
    n: int
    rows: int
    bias: bool
    dtype: torch.dtype
    seed: int

    def model(self, start: bool) -> Any:
        """Return the layer in a PEFT model; away from the identity unless ``start``."""
        torch.manual_seed(self.seed)
        net = nn.Sequential()
        net.add_module("lin", nn.Linear(self.n, self.m, bias=self.bias))
        config = replace(self.config, target_modules=["lin"], init_weights=start)
        return get_peft_model(net.to(self.dtype), config).eval()

    def x(self) -> Tensor:
        return torch.randn(self.rows, self.n, generator=torch.Generator().manual_seed(self.seed)).to(self.dtype)


@st.composite
def problems(draw: st.DrawFn, name: str) -> Problem:
    sides = st.one_of(st.just(1), st.integers(1, 9), st.sampled_from([17, 24, 40]))
    m, n = draw(sides), draw(sides)
    fitting = FITTING[name](m, n)
    assume(fitting)
    config, dtype = draw(st.sampled_from(fitting)), draw(st.sampled_from(list(ROUNDING)))
    return Problem(config, m, n, draw(st.integers(0, 5)), draw(st.booleans()), dtype, draw(st.integers(0, 99)))


def near(got: Tensor, want: Tensor, size: float = 1.0) -> bool:
    """Say whether two tensors of one shape and dtype are the same up to the rounding of numbers of this size."""
    bound = ROUNDING[want.dtype] * (size + float(want.double().norm()))
    return got.shape == want.shape and got.dtype == want.dtype and float((got.double() - want.double()).norm()) <= bound


def test_every_adapter_is_here() -> None:
    assert set(FITTING) == set(ADAPTERS)


@pytest.mark.parametrize("name", ADAPTERS)
@given(data=st.data())
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@torch.no_grad()
def test_it_starts_as_the_layer_itself(name: str, data: st.DataObject) -> None:
    problem = data.draw(problems(name))
    model, x = problem.model(start=True), problem.x()
    layer = model.base_model.model.lin
    want = layer.base_layer(x)
    assert near(model(x), want)
    assert near(layer.adapters["default"].merged(layer.base_layer.weight), layer.base_layer.weight)
    model.merge_adapter()
    assert near(model(x), want)


@pytest.mark.parametrize("name", ADAPTERS)
@given(data=st.data())
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@torch.no_grad()
def test_it_is_the_layer_with_the_merged_weight(name: str, data: st.DataObject) -> None:
    problem = data.draw(problems(name))
    model, x = problem.model(start=False), problem.x()
    layer = model.base_model.model.lin
    base, adapter = layer.base_layer, layer.adapters["default"]
    weight, y = base.weight.clone(), model(x)
    merged, size = adapter.merged(weight), float(weight.double().norm() * x.double().norm())
    assert near(y, nn.functional.linear(x, merged, base.bias), size)
    assert near(weight + adapter.delta(weight).dense(), merged)
    model.merge_adapter()
    assert near(base.weight, merged)
    assert near(model(x), y, size)
    model.unmerge_adapter()
    assert base.weight.equal(weight)
    assert model(x).equal(y)
