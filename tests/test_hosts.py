"""Hosts that call a layer in ways of their own: replicas, hooks, offloading, no values at all, torch.func, export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import PeftModel, get_peft_model
from tiny import Net
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.nn.parallel.replicate import replicate
from torch.nn.utils.parametrizations import weight_norm

from orthoft import ADAPTERS, report


@dataclass(frozen=True)
class Case:
    method: str
    changes: dict[str, Any]

    def config(self, **more: Any) -> Any:
        return ADAPTERS[self.method](**{"target_modules": ["lin"], "init_weights": False, **self.changes, **more})


CASES = {
    "oftv2": Case("oftv2", {"block_size": 4}),
    "hra": Case("hra", {"r": 4}),
    "hra orthonormal": Case("hra", {"r": 3, "orthonormal": True}),
    "goft": Case("goft", {"block_size": 4}),
    "goft quasi": Case("goft", {"block_size": 4, "mode": "quasi", "scale": True}),
    "psoft": Case("psoft", {"r": 4}),
    "psoft fingerprint": Case("psoft", {"r": 4, "save_basis": False}),
    "svft": Case("svft", {"pattern": "banded"}),
    "svft saved": Case("svft", {"pattern": "random", "schedule": "weight", "save_basis": True}),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(12, 10), lambda: torch.randn(4, 12)),
    "embedding": (lambda: nn.Embedding(16, 12), lambda: torch.arange(4)),
    "convolution": (lambda: nn.Conv2d(4, 10, (3, 1)), lambda: torch.randn(2, 4, 6, 5)),
}


def test_each_adapter_is_tested() -> None:
    assert {case.method for case in CASES.values()} == set(ADAPTERS)


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return CASES[request.param]


every_layer = pytest.mark.parametrize("layer", LAYERS)


def adapted(case: Case, layer: str = "linear", **more: Any) -> Any:
    return get_peft_model(Net(LAYERS[layer][0]()), case.config(**more)).eval()


def evaluated(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(*args, **kwargs)


def near(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)


# nn.DataParallel


@pytest.fixture
def replica_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], nn.Module]:
    """torch's own replication, with copies on the same device in place of the broadcast to GPUs."""

    def copied(tensors: list[Tensor], devices: Any, detach: bool = False) -> list[list[Tensor]]:
        return [[tensor.clone() for tensor in tensors]] if tensors else []

    monkeypatch.setattr(import_module("torch.nn.parallel.replicate"), "_broadcast_coalesced_reshape", copied)
    return lambda model: replicate(model, [0])[0]


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_replicas_compute_as_their_model(case: Case, layer: str, training: bool, replica_of: Any) -> None:
    model, x = adapted(case, layer), LAYERS[layer][1]()
    wanted = evaluated(model, x)
    if not training:
        near(evaluated(replica_of(model), x), wanted)
        return
    got = replica_of(model.train())(x)
    near(got, wanted)
    got.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_replicas_autocast(case: Case, replica_of: Any) -> None:
    model, x = adapted(case), torch.randn(4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(evaluated(replica_of(model), x), evaluated(model, x))


def test_replicas_take_what_their_model_has(case: Case, replica_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(case)
    for name in ("spectral.find_entries", "spectral.check_fingerprint", "adapters.psoft.check_fingerprint"):
        monkeypatch.setattr(f"orthoft.{name}", None)  # so that a call fails
    replica_of(model)


# Convolutions that are more than torch's


class Standardised(nn.Conv2d):
    """As in BiT: the filters are standardised in each call, and the stride may be given with it."""

    def forward(self, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, stride)


def test_a_convolution_with_a_forward_of_its_own(case: Case) -> None:
    base, x = Standardised(4, 10, (3, 1)), torch.randn(2, 4, 6, 5)
    wanted = base(x, stride=2)
    start = get_peft_model(Net(base), case.config(init_weights=True))
    near(start.base_model.model.lin(x, stride=2), wanted)
    model = get_peft_model(start.unload(), case.config()).eval()
    away = evaluated(model, x)
    assert not torch.allclose(away, base(x), atol=1e-3)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval().merge_adapter()
    near(evaluated(model, x), away)


def test_hooks_of_a_convolution_fire(case: Case) -> None:
    seen: list[str] = []
    base, x = nn.Conv2d(4, 10, (3, 1)), LAYERS["convolution"][1]()
    model = get_peft_model(Net(base), case.config()).eval()
    wanted = evaluated(model, x)
    base.register_forward_pre_hook(lambda *_: seen.append("forward_pre"))
    base.register_forward_hook(lambda *_: seen.append("forward"))
    near(evaluated(model, x), wanted)
    assert seen == ["forward_pre", "forward"]


class Weighing(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_computed_weight_in_a_forward_of_its_own_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="ParametrizedWeighing is computed"):
        get_peft_model(Net(weight_norm(Weighing(4, 10, (3, 1)))), case.config())


@every_layer
def test_no_merge_into_a_computed_weight(case: Case, layer: str) -> None:
    base, x = weight_norm(LAYERS[layer][0]()), LAYERS[layer][1]()
    model = get_peft_model(Net(base), case.config()).eval()
    assert not torch.allclose(wanted := evaluated(model, x), base(x), atol=1e-3)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="is computed by a parametrization: remove that before merging"):
            merge()
    assert torch.equal(evaluated(model, x), wanted)


# accelerate's offloading

CPU = torch.device("cpu")


@every_layer
@pytest.mark.parametrize("hooked", [False, True])
def test_offloaded_models(case: Case, layer: str, hooked: bool) -> None:
    model, x = adapted(case, layer), LAYERS[layer][1]()
    wanted = evaluated(model, x)
    for module in model.modules() if hooked else ():  # offloading comes behind what is there
        add_hook_to_module(module, ModelHook())
    cpu_offload(model, execution_device=CPU)
    for _ in range(2):
        near(evaluated(model, x), wanted)
    assert {p.device.type for p in model.parameters()} == {"meta"}


@every_layer
def test_adapting_an_offloaded_base(case: Case, layer: str) -> None:
    net, x = Net(LAYERS[layer][0]()), LAYERS[layer][1]()
    wanted = evaluated(net, x)
    cpu_offload(net, execution_device=CPU)
    model = get_peft_model(net, case.config(init_weights=True)).eval()
    near(evaluated(model, x), wanted)


@every_layer
def test_one_adapter_per_row_while_offloaded(case: Case, layer: str) -> None:
    model, x = adapted(case, layer), LAYERS[layer][1]()
    names = ["default" if i % 2 else "__base__" for i in range(len(x))]
    wanted = evaluated(model, x, adapter_names=names)
    cpu_offload(model, execution_device=CPU)
    near(evaluated(model, x, adapter_names=names), wanted)


def test_report_while_offloaded(case: Case) -> None:
    model = adapted(case)
    wanted = report(model).to_dict()
    cpu_offload(model, execution_device=CPU)
    assert report(model).to_dict() == wanted


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_on_an_offloaded_base(case: Case, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model, x = adapted(case), LAYERS["linear"][1]()
    wanted = evaluated(model, x)
    model.save_pretrained(tmp_path / "adapter")
    base = model.unload()
    disk_offload(base, tmp_path / "base", execution_device=CPU)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage).eval()
    near(evaluated(again, x), wanted)


# Shapes without values


@every_layer
@pytest.mark.parametrize("host", ["meta", "fake"])
def test_shapes_pass_twice_and_leave_nothing_behind(case: Case, layer: str, host: str) -> None:
    model, x = adapted(case, layer), LAYERS[layer][1]()
    if host == "meta":
        shapes = adapted(case, layer).to("meta")
        assert [evaluated(shapes, x.to("meta")).shape for _ in range(2)] == [model(x).shape] * 2
        return
    with FakeTensorMode(allow_non_fake_inputs=True):
        shapes = [evaluated(model, torch.zeros_like(x)).shape for _ in range(2)]
    wanted = model(x)
    assert shapes == [wanted.shape] * 2
    near(evaluated(model, x), wanted.detach())
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert evaluated(model, torch.zeros_like(x)).shape == wanted.shape


# torch.func and torch.export


def test_gradients_per_sample(case: Case) -> None:
    model, x = adapted(case).train(), torch.randn(3, 2, 12)
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, state, (x,)).pow(2).sum()

    together = vmap(grad(loss), in_dims=(None, 0))(state, x)
    for i, row in enumerate(x):
        for name, wanted in grad(loss)(state, row).items():
            near(together[name][i], wanted)


def test_exported_with_any_number_of_rows(case: Case) -> None:
    net, shapes = adapted(case).base_model.model, ({0: torch.export.Dim("rows")},)
    with torch.no_grad():
        made = torch.export.export(net, (torch.randn(3, 12),), dynamic_shapes=shapes, strict=False)
    for rows in (2, 300):
        near(made.module()(x := torch.randn(rows, 12)).detach(), evaluated(net, x))


# Bases in one byte, copies of adapters


def test_a_base_in_float8(case: Case) -> None:
    net = Net(nn.Linear(12, 10))
    net.lin.weight.data = net.lin.weight.data.to(torch.float8_e4m3fn)
    model = get_peft_model(net, case.config(), autocast_adapter_dtype=False)
    state = list(model.base_model.model.lin.adapters["default"].state_dict().values())
    assert {t.dtype for t in state} == {torch.float32}
    assert all(t.isfinite().all() for t in state)


def test_parameters_are_all_of_an_adapter(case: Case) -> None:
    """TRL makes its reference by copying the parameters of the policy into a second adapter."""
    model, x = adapted(case, init_weights=True), LAYERS["linear"][1]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.add_adapter("reference", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default" in name:
            model.get_parameter(name.replace(".default", ".reference")).data.copy_(parameter.data)
    wanted = evaluated(model, x)
    model.set_adapter("reference")
    assert torch.equal(evaluated(model, x), wanted)
