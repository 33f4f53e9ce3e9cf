"""Every adapter on every kind of layer: a new adapter is a row of CASES, a new layer a row of LAYERS."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from orthoft import ADAPTERS
from orthoft.layer import OrthoLayer

BATCH = 4


def image(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(BATCH, *shape, dtype=torch.float64)


def ids() -> Tensor:
    return torch.randint(0, 20, (BATCH, 7))


class Fused(nn.Module):
    """Experts as transformers fuses them: each reads all rows, and their outputs stand side by side."""

    has_gate = True

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        weight = torch.randn(3, 10, 12) / 12**0.5
        self.gate_up_proj = nn.Parameter((weight.mT if transposed else weight).contiguous())
        self.down_proj = nn.Parameter(torch.randn(3, 12, 5))

    def forward(self, x: Tensor) -> Tensor:
        stack = self.gate_up_proj if self.is_transposed else self.gate_up_proj.mT  # (E, n, m)
        return torch.cat([x @ weight for weight in stack], dim=-1)


# All of them have 12 inputs: channels per group times kernel.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear": (lambda: nn.Linear(12, 10), image(5, 12)),
    "Conv1D": (lambda: Conv1D(10, 12), image(5, 12)),
    "Embedding": (lambda: nn.Embedding(20, 12), ids),
    "Embedding with padding": (lambda: nn.Embedding(20, 12, padding_idx=3), ids),
    "Conv1d": (lambda: nn.Conv1d(4, 10, 3, stride=2, padding=1), image(4, 11)),
    "Conv1d in groups": (lambda: nn.Conv1d(8, 10, 3, groups=2, dilation=2), image(8, 11)),
    "Conv2d": (lambda: nn.Conv2d(2, 10, (3, 2)), image(2, 9, 7)),
    "Conv2d strided": (
        lambda: nn.Conv2d(2, 10, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        image(2, 9, 8),
    ),
    "Conv2d in groups": (lambda: nn.Conv2d(4, 10, (2, 3), groups=2, padding="same"), image(4, 9, 7)),
    "Conv2d reflected": (
        lambda: nn.Conv2d(2, 10, (3, 2), padding=2, padding_mode="reflect", bias=False),
        image(2, 6, 8),
    ),
    "Conv2d depthwise": (lambda: nn.Conv2d(6, 6, (3, 4), groups=6), image(6, 9, 7)),
    "Experts": (lambda: Fused(False), image(12)),
    "Experts turned": (lambda: Fused(True), image(12)),
    "Conv3d": (lambda: nn.Conv3d(1, 10, (2, 2, 3), padding=1), image(1, 4, 5, 6)),
}


@dataclass
class Case:
    method: str
    changes: dict[str, Any]
    starts_exactly: bool = False  # the untrained adapter changes no bit
    powers: bool = True  # half an adapter twice is the adapter

    def config(self, **more: Any) -> Any:
        return ADAPTERS[self.method](**{"target_modules": ["layer"], "init_weights": False, **self.changes, **more})


CASES = {
    "oftv2": Case("oftv2", {"block_size": 3}, starts_exactly=True, powers=False),
    "oftv2 cayley": Case("oftv2", {"block_size": 6, "map": "cayley"}, starts_exactly=True),
    "oftv2 shared": Case("oftv2", {"block_size": 4, "map": "cayley", "block_share": True}, starts_exactly=True),
    "hra": Case("hra", {"r": 4}),
    "hra orthonormal": Case("hra", {"r": 2, "orthonormal": True}),
    "goft": Case("goft", {}, starts_exactly=True, powers=False),
    "goft quasi": Case("goft", {"mode": "quasi", "scale": True}, starts_exactly=True, powers=False),
    "psoft": Case("psoft", {"r": 4}, powers=False),
    "psoft orthogonal": Case("psoft", {"r": 4, "relax": False}),
    "svft": Case("svft", {}),
    "svft banded": Case("svft", {"pattern": "banded", "gate": True}),
}
CASES = {name: case for name, case in CASES.items() if case.method in ADAPTERS}


def test_each_adapter_is_tested() -> None:
    assert {case.method for case in CASES.values()} == set(ADAPTERS)


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(params=LAYERS, ids=lambda name: name.replace(" ", "-"))
def layer(request: pytest.FixtureRequest, case: Case) -> str:
    if request.param.startswith("Experts") and case.method == "svft":
        pytest.skip("is refused: it changes weights, not inputs")
    torch.manual_seed(0)
    return request.param


one_of_each_kind = pytest.mark.parametrize(
    "layer", ["Linear", "Conv1D", "Embedding", "Conv2d in groups", "Experts"], indirect=True
)


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def base_of(layer: str) -> nn.Module:
    torch.manual_seed(7)
    return Net(LAYERS[layer][0]()).double().eval()


def adapted(case: Case, layer: str, *names: str, **changes: Any) -> Any:
    """Return a model with the adapters of these names, each away from the identity and from the others."""
    torch.manual_seed(1)
    first, *others = names or ("default",)
    model = get_peft_model(base_of(layer), case.config(**changes), adapter_name=first)
    for name in others:
        model.add_adapter(name, case.config(**changes))
    return model.double().eval()


def ours(model: Any) -> OrthoLayer:
    return model.base_model.model.layer


def distance(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


def outputs(model: Any, x: Tensor, *names: str) -> Tensor:
    model.base_model.set_adapter(list(names))
    return model(x).detach()


def test_starts_as_the_layer(case: Case, layer: str) -> None:
    model, x = adapted(case, layer, init_weights=True), LAYERS[layer][1]()
    got, wanted = model(x), base_of(layer)(x)
    assert torch.equal(got, wanted) if case.starts_exactly else distance(got, wanted) < 1e-6
    assert distance(adapted(case, layer)(x), wanted) > 1e-2


def test_merged_weight_gives_the_same_outputs(case: Case, layer: str) -> None:
    model, x = adapted(case, layer), LAYERS[layer][1]()
    weight, wanted = ours(model).held.weight.clone(), model(x)
    model.merge_adapter()
    assert distance(model(x), wanted) < 1e-10
    assert distance(ours(model).base_layer(x), wanted) < 1e-10
    assert ours(model).held.weight.shape == weight.shape
    model.unmerge_adapter()
    assert torch.equal(ours(model).held.weight, weight)
    assert torch.equal(model(x), wanted)


def test_delta_is_what_merging_adds(case: Case, layer: str) -> None:
    model = adapted(case, layer)
    held = ours(model).held
    weight, delta = held.weight.detach().clone(), ours(model).get_delta_weight("default")
    model.merge_adapter()
    assert distance(delta, held.weight.detach() - weight) < 1e-10


def test_gradients_are_those_of_the_merged_weight(case: Case, layer: str) -> None:
    model, x = adapted(case, layer).train(), LAYERS[layer][1]()
    base, held, adapter = ours(model).base_layer, ours(model).held, ours(model).adapters["default"]
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    y = model(x)
    towards = torch.randn_like(y)
    got = torch.autograd.grad((y * towards).sum(), parameters)
    rows = adapter.merged(ours(model).layout.rows(held.weight))
    weight = {getattr(held, "name", "weight"): ours(model).layout.stored(rows, held.weight)}
    wanted = torch.autograd.grad((torch.func.functional_call(base, weight, (x,)) * towards).sum(), parameters)
    for mine, theirs in zip(got, wanted, strict=True):
        assert distance(mine, theirs) < 1e-9
        assert theirs.abs().max() > 1e-4


def test_two_adapters_nest(case: Case, layer: str) -> None:
    model, x = adapted(case, layer, "red", "blue"), LAYERS[layer][1]()
    weight = ours(model).held.weight.clone()
    orders = [("red", "blue"), ("blue", "red")]
    wanted = {order: outputs(model, x, *order) for order in orders}
    assert min(distance(outputs(model, x, name), y) for name in orders[0] for y in wanted.values()) > 1e-3
    if case.method != "svft":  # updates in fixed bases add up, in any order
        assert distance(*wanted.values()) > 1e-4
    for order in wanted:
        model.base_model.set_adapter(list(order))
        model.merge_adapter()
        assert distance(model(x), wanted[order]) < 1e-10
        model.unmerge_adapter()
        assert torch.equal(ours(model).held.weight, weight)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(case: Case, layer: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model, x = adapted(case, layer), LAYERS[layer][1]()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_of(layer), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).double().eval()
    assert distance(again(x), model(x)) < 1e-6
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_one_adapter_per_row(case: Case, layer: str) -> None:
    model, x = adapted(case, layer, "red", "blue"), LAYERS[layer][1]()
    names = ["blue", "__base__", "red", "blue"]
    alone = {name: outputs(model, x, name) for name in ("red", "blue")} | {"__base__": base_of(layer)(x)}
    got = model(x, adapter_names=names)
    for row, name in enumerate(names):
        assert distance(got[row], alone[name][row]) < 1e-12
        assert all(distance(got[row], y[row]) > 1e-3 for other, y in alone.items() if other != name)


def test_weighted_combinations(case: Case, layer: str) -> None:
    model, x = adapted(case, layer, "red", "blue"), LAYERS[layer][1]()
    wanted, plain = outputs(model, x, "red"), base_of(layer)(x)
    combine = model.base_model.add_weighted_adapter
    combine(["red"], [1.0], "same")
    combine(["red", "blue"], [0.0, 0.0], "none")
    combine(["red", "blue"], [1.0, 0.0], "first")
    near = (
        1e-3 if case.method == "oftv2" and "map" not in case.changes else 1e-6
    )  # of the rotation nearest to the series
    assert distance(outputs(model, x, "same"), wanted) < near
    assert distance(outputs(model, x, "first"), wanted) < near
    assert distance(outputs(model, x, "none"), plain) < 1e-6
    assert distance(outputs(model, x, "red"), wanted) == 0
    combine(["red", "blue"], [0.5, 0.5], "mean")
    assert min(distance(outputs(model, x, "mean"), y) for y in (wanted, plain, outputs(model, x, "blue"))) > 1e-3


def test_an_adapter_and_its_inverse_cancel(case: Case, layer: str) -> None:
    model, x = adapted(case, layer, "red"), LAYERS[layer][1]()
    wanted, plain = outputs(model, x, "red"), base_of(layer)(x)
    combine = model.base_model.add_weighted_adapter
    combine(["red", "red"], [0.7, -0.7], "none")
    assert distance(outputs(model, x, "none"), plain) < 1e-6
    if case.powers:
        combine(["red"], [0.5], "root")
        combine(["red"], [0.5], "other root")
        assert distance(outputs(model, x, "root", "other root"), wanted) < 1e-5
        assert distance(outputs(model, x, "root"), wanted) > 1e-3


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Embedding(20, 12), nn.Linear(12, 20, bias=False)
        self.head.weight = self.layer.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layer(ids))


def test_a_tied_head_keeps_the_frozen_weight(case: Case) -> None:
    torch.manual_seed(0)
    frozen = Tied().double().eval()
    model = get_peft_model(frozen, case.config()).double().eval()
    weight, x = frozen.head.weight, ids()
    assert ours(model).held.weight is weight
    rows = ours(model).adapters["default"].merged(weight)
    assert distance(model(x), rows[x] @ weight.mT) < 1e-10
    assert distance(model(x), weight[x] @ weight.mT) > 1e-2
    assert distance(frozen.head(weight[x]), weight[x] @ weight.mT) == 0


@one_of_each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers(case: Case, layer: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = get_peft_model(base_of(layer).to(dtype), case.config()).eval()
    x = LAYERS[layer][1]()
    wanted = copy.deepcopy(model).double()(x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.float32}
    given = x.to(dtype) if x.is_floating_point() else x
    y = model(given)
    assert y.dtype == dtype
    assert distance(y.double(), wanted) < 0.03
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
    model.merge_adapter()
    assert distance(model(given).double(), wanted) < 0.03


@one_of_each_kind
def test_compiled_without_graph_breaks(case: Case, layer: str) -> None:
    model, x = adapted(case, layer).train(), LAYERS[layer][1]()
    parameters = [p for p in model.parameters() if p.requires_grad]
    y = model(x)
    towards = torch.randn_like(y)
    wanted = torch.autograd.grad((y * towards).sum(), parameters)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    got = torch.autograd.grad((compiled(x) * towards).sum(), parameters)
    for mine, theirs in zip(got, wanted, strict=True):
        assert distance(mine, theirs) < 1e-10


@one_of_each_kind
def test_autocast(case: Case, layer: str) -> None:
    model, x = adapted(case, layer).float(), LAYERS[layer][1]()
    x = x.float() if x.is_floating_point() else x
    wanted = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    assert distance(got.float(), wanted) < 0.03
    got.float().square().sum().backward()
    assert all(p.grad is not None for p in ours(model).adapters.parameters() if p.requires_grad)


def test_patterns_choose_the_size_of_convolutions_too() -> None:
    config = ADAPTERS["oftv2"](block_size=5, block_size_pattern={"layer": 3}, target_modules=["layer"])
    model = get_peft_model(base_of("Conv2d"), config)
    assert ours(model).adapters["default"].block_size == 3
    with pytest.raises(ValueError, match="block_size 5 does not divide the 12 inputs"):
        get_peft_model(base_of("Conv2d"), replace(config, block_size_pattern={}))


def test_sums_of_series_are_those_of_the_nearest_rotations() -> None:
    """Two adapters of 60 degrees or so, doubled: the series of the sum would be far from orthogonal."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(OrderedDict(layer=nn.Linear(24, 10))), CASES["oftv2"].config(degree=3))
    model.add_adapter("other", CASES["oftv2"].config(degree=3))
    adapters = model.double().base_model.model.layer.adapters
    for adapter in adapters.values():
        nn.init.normal_(adapter.skew, std=0.15)
    model.base_model.add_weighted_adapter(["default", "other"], [2.0, 2.0], "sum")
    eye = torch.eye(24, dtype=torch.float64)
    total = torch.zeros(24, 24, dtype=torch.complex128)
    for name in ("default", "other"):
        U, _, Vh = torch.linalg.svd(adapters[name].rotate(eye).detach())
        values, vectors = torch.linalg.eig(U @ Vh)
        total += 2 * vectors @ torch.diag(values.log()) @ torch.linalg.inv(vectors)
    assert distance(adapters["sum"].rotate(eye), torch.linalg.matrix_exp(total).real) < 1e-6
