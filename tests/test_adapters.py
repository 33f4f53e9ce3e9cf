"""The contract of adapters: a new one is one more row of CASES."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import reference_adapters as reference
import torch
from peft import get_peft_model
from reference_goft import goft
from reference_psoft import psoft
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from orthoft import GOFTConfig, HRAConfig, OFTv2Config, PSOFTConfig, penalty
from orthoft.adapter import InputRotation
from orthoft.config import OrthoConfig
from orthoft.layer import OrthoLayer

OUT, IN, ROWS = 10, 24, 7


@dataclass
class Case:
    config: OrthoConfig
    oracle: Callable[[Tensor, Mapping[str, Tensor], Any], Tensor]
    exact: bool  # orthogonal to rounding
    rank: int | None = None  # of the update, where it has one


CASES = {
    "oftv2 series": Case(OFTv2Config(block_size=4), reference.oftv2, exact=False),
    "oftv2 series, degree 3": Case(OFTv2Config(block_size=6, degree=3), reference.oftv2, exact=False),
    "oftv2 cayley": Case(OFTv2Config(block_size=8, map="cayley"), reference.oftv2, exact=True),
    "oftv2 block_share": Case(OFTv2Config(block_size=6, block_share=True), reference.oftv2, exact=False),
    "oftv2 cayley block_share": Case(OFTv2Config(block_size=4, map="cayley", block_share=True), reference.oftv2, True),
    "oftv2 radius": Case(OFTv2Config(block_size=8, map="cayley", radius=0.5), reference.oftv2, exact=True),
    "hra": Case(HRAConfig(r=4), reference.hra, exact=True, rank=4),
    "hra orthonormal": Case(HRAConfig(r=3, orthonormal=True), reference.hra, exact=True, rank=6),
    "goft": Case(GOFTConfig(block_size=4), goft, exact=True),
    "goft scale": Case(GOFTConfig(scale=True), goft, exact=False),
    "goft quasi": Case(GOFTConfig(mode="quasi", block_size=8), goft, exact=False),
    "psoft": Case(PSOFTConfig(r=5), psoft, exact=False, rank=5),
    "psoft strict": Case(PSOFTConfig(r=4, relax=False), psoft, exact=True, rank=4),
    "psoft series": Case(PSOFTConfig(r=4, relax=False, map="series", svd="lowrank"), psoft, exact=False, rank=4),
}
DROPPING = {"own blocks": OFTv2Config(block_size=4, dropout=0.5)}
DROPPING["shared block"] = replace(DROPPING["own blocks"], block_share=True)


@pytest.fixture(params=CASES, ids=lambda name: name.replace(", ", " ").replace(" ", "-"))
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return CASES[request.param]


class Net(nn.Module):
    def __init__(self, out: int = OUT, features: int = IN, bias: bool = True) -> None:
        super().__init__()
        self.lin = nn.Linear(features, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def adapted(config: OrthoConfig, *shape: int, start: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """Return a PEFT model of one layer; away from the identity unless ``start``."""
    config = replace(config, target_modules=["lin"], init_weights=start)
    return get_peft_model(Net(*shape).to(dtype), config)


def layer_of(model: Any) -> OrthoLayer:
    return model.base_model.model.lin


def adapter_of(model: Any, name: str = "default") -> InputRotation:
    return layer_of(model).adapters[name]


def adapter(case: Case, out: int = OUT, features: int = IN, dtype: torch.dtype = torch.float64) -> InputRotation:
    made = case.config.make_adapter("lin", features, out)
    made.adopt(lambda: torch.randn(out, features, dtype=dtype))
    made.reset_parameters(identity=False)
    return made.to(dtype)


def state_of(adapter: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().double().requires_grad_() for k, v in adapter.state_dict().items()}


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def distance(got: Tensor, wanted: Tensor) -> float:
    return (got.double() - wanted.double()).abs().max().item()


# What it computes


def test_starts_as_the_identity(case: Case) -> None:
    model = adapted(case.config, start=True)
    x = torch.randn(ROWS, IN)
    assert distance(model(x), layer_of(model).base_layer(x)) <= 1e-6
    with torch.no_grad():
        for parameter in adapter_of(model).parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert distance(model(x), layer_of(model).base_layer(x)) > 1e-2


@pytest.mark.parametrize("training", [True, False])
def test_forward_is_the_layer_with_the_dense_weight(case: Case, training: bool) -> None:
    model = adapted(case.config).double().train(training)
    base = layer_of(model).base_layer
    weight = case.oracle(base.weight, state_of(adapter_of(model)), case.config)
    x = torch.randn(2, ROWS, IN, dtype=torch.float64)
    assert error(model(x), nn.functional.linear(x, weight, base.bias)) < 1e-13
    assert error(weight, base.weight) > 1e-2


SHAPES = [((1, 24), (24,)), ((31, 48), (3, 1, 48)), ((2, 24), (0, 24)), ((24, 24), (2, 3, 2, 24))]


@pytest.mark.parametrize(("weight", "input"), SHAPES, ids=str)
def test_odd_shapes(case: Case, weight: tuple[int, int], input: tuple[int, ...]) -> None:
    if case.rank is not None and weight[0] < case.rank and isinstance(case.config, PSOFTConfig):
        pytest.skip("has fewer singular vectors")
    one = adapter(case, *weight)
    W, x = torch.randn(weight, dtype=torch.float64), torch.randn(input, dtype=torch.float64)
    y = one(x, lambda x: x @ W.mT)
    assert y.shape == (*input[:-1], weight[0])
    torch.testing.assert_close(y, x @ case.oracle(W, state_of(one), case.config).mT, atol=1e-12, rtol=1e-12)


def test_strided_input(case: Case) -> None:
    one = adapter(case)
    x = torch.randn(IN, 5, ROWS, dtype=torch.float64).permute(2, 1, 0)
    torch.testing.assert_close(one.rotate(x), one.rotate(x.contiguous()), atol=1e-14, rtol=0)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotation_flags(case: Case, transpose: bool, inverse: bool) -> None:
    one = adapter(case)
    eye = torch.eye(IN, dtype=torch.float64)
    Q = case.oracle(eye, state_of(one), case.config).mT
    Q = torch.linalg.inv(Q) if inverse else Q
    assert distance(one.rotate(eye, transpose=transpose, inverse=inverse), Q.mT if transpose else Q) < 1e-12


def test_orthogonality(case: Case) -> None:
    if not case.exact:
        pytest.skip("obeys the law of the series instead")
    Q = adapter(case, dtype=torch.float32).rotate(torch.eye(IN)).detach().double()
    assert torch.linalg.matrix_norm(Q.mT @ Q - torch.eye(IN), 2) <= 2e-6
    assert torch.linalg.det(Q) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("degree", [1, 3, 5, 7, 9])
def test_defect_of_the_series_follows_its_law(degree: int) -> None:
    torch.manual_seed(degree)
    one = adapter(Case(OFTv2Config(block_size=8, degree=degree), reference.oftv2, exact=False), features=8)
    S = torch.zeros(8, 8, dtype=torch.float64)
    S[tuple(torch.triu_indices(8, 8, 1))] = one.skew.detach()[0]
    Q = one.rotate(torch.eye(8, dtype=torch.float64)).detach()
    size = torch.linalg.matrix_norm(S - S.mT, 2)
    defect = torch.linalg.matrix_norm(Q.mT @ Q - torch.eye(8), 2)
    assert defect.item() == pytest.approx((size ** (2 * degree)).item(), rel=1e-6, abs=1e-14)


def test_reflections_along_equal_and_parallel_vectors() -> None:
    torch.manual_seed(0)
    one = adapter(CASES["hra"], dtype=torch.float32)
    a, b = torch.randn(2, IN)
    eye = torch.eye(IN)
    for rows in ([a, a, b, b], [a, -3 * a, b, 1e-3 * b], [a, b, b, a]):
        one.load_state_dict({"u": torch.stack(rows)})
        assert distance(one.rotate(eye), eye) <= 1e-6
    one.load_state_dict({"u": torch.stack([a, a, a, b])})
    H = reference.reflected(reference.reflected(eye, a[None]), b[None])
    assert distance(one.rotate(eye, transpose=True), H) <= 1e-6


# Merging


@pytest.mark.parametrize("bias", [True, False])
def test_merge_equals_forward(case: Case, bias: bool) -> None:
    model = adapted(case.config, 30, IN, bias)
    x = torch.randn(ROWS, IN)
    wanted = model(x)
    model.merge_adapter()
    assert error(model(x), wanted) <= 1e-5
    assert error(layer_of(model).base_layer(x), wanted) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_restores_every_bit(case: Case, dtype: torch.dtype) -> None:
    model = adapted(case.config, dtype=dtype)
    base = layer_of(model).base_layer
    weight = base.weight.detach().clone()
    for _ in range(2):
        model.merge_adapter()
        assert not torch.equal(base.weight, weight)
        model.unmerge_adapter()
        assert torch.equal(base.weight, weight)
        assert base.weight.dtype == dtype


def test_bfloat16_weight_is_rounded_once(case: Case) -> None:
    model = adapted(case.config, dtype=torch.bfloat16)
    base = layer_of(model).base_layer
    weight = case.oracle(base.weight.double(), state_of(adapter_of(model)), case.config)
    model.merge_adapter()
    wanted = weight.to(torch.bfloat16)
    assert base.weight.dtype == torch.bfloat16
    assert (base.weight != wanted).float().mean() < 0.01  # a tie may fall otherwise in float32
    assert error(base.weight, wanted) < 1e-3


def test_merged_has_an_inverse(case: Case) -> None:
    one, W = adapter(case), torch.randn(OUT, IN, dtype=torch.float64)
    assert error(one.merged(one.merged(W), inverse=True), W) < 1e-12
    assert error(one.merged(one.merged(W, inverse=True)), W) < 1e-12


def test_delta_is_what_merging_adds(case: Case) -> None:
    one, W = adapter(case), torch.randn(OUT, IN, dtype=torch.float64)
    delta = one.delta(W)
    assert delta.shape == (OUT, IN)
    assert delta.rank() == case.rank
    assert error(delta.dense(), one.merged(W) - W) < 1e-12
    if factors := delta.factors():
        B, A = factors
        assert (B.shape, A.shape) == ((OUT, case.rank), (case.rank, IN))
        assert error(B @ A, one.merged(W) - W) < 1e-12


# Gradients


def test_gradients_equal_those_of_the_dense_oracle(case: Case) -> None:
    model = adapted(case.config).double().train()
    base, one = layer_of(model).base_layer, adapter_of(model)
    x = torch.randn(ROWS, IN, dtype=torch.float64, requires_grad=True)
    towards = torch.randn(ROWS, OUT, dtype=torch.float64)
    state = state_of(one)
    weight = case.oracle(base.weight.detach(), state, case.config)
    names = [name for name, _ in one.named_parameters()]
    wanted = torch.autograd.grad(
        (nn.functional.linear(x, weight, base.bias) * towards).sum(), [x, *(state[name] for name in names)]
    )
    got = torch.autograd.grad((model(x) * towards).sum(), [x, *one.parameters()])
    for mine, theirs in zip(got, wanted, strict=True):
        assert distance(mine, theirs) <= 1e-9
        assert theirs.abs().max() > 1e-3


class Rotate(nn.Module):
    """``rotate`` as a forward, for functional_call."""

    def __init__(self, adapter: InputRotation, transpose: bool, inverse: bool) -> None:
        super().__init__()
        self.adapter, self.flags = adapter, {"transpose": transpose, "inverse": inverse}

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter.rotate(x, **self.flags)


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize(("transpose", "inverse"), [(False, False), (True, False), (False, True)])
def test_gradcheck(case: Case, start: bool, transpose: bool, inverse: bool) -> None:
    one = adapter(case)
    one.reset_parameters(identity=start)
    module = Rotate(one, transpose, inverse)
    names = [name for name, _ in module.named_parameters()]

    def rotated(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(2, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rotated, (x, *module.parameters()), fast_mode=True)


# Precision and memory


def saved_for_backward(model: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the output, and the tensors with distinct storages of the input's size that wait for backward."""
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours and tensor.numel() * 2 > x.numel():
            saved[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = model(x)
    return y, list(saved.values())


class Made(TorchDispatchMode):
    """Notes the dtypes of all tensors with at least ``size`` elements that operations return."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.dtypes = size, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() >= self.size:
            self.dtypes.add(out.dtype)
        return out


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("wants_input_gradient", [True, False])
def test_bfloat16_input_is_neither_upcast_nor_saved_twice(
    case: Case, autocast: bool, wants_input_gradient: bool
) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    model = adapted(case.config, dtype=dtype).train()
    assert all(p.dtype == torch.float32 for p in adapter_of(model).parameters())
    x = torch.randn(2, 400, IN, dtype=dtype, requires_grad=wants_input_gradient)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Made(x.numel()) as made:
        y, saved = saved_for_backward(model, x)
    assert y.dtype == torch.bfloat16
    assert [t.dtype for t in saved] in ([torch.bfloat16], [])
    assert made.dtypes == {torch.bfloat16}
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter_of(model).parameters())


def test_bfloat16_forward_is_as_good_as_its_dtype(case: Case) -> None:
    model = adapted(case.config, dtype=torch.bfloat16)
    base = layer_of(model).base_layer
    x = torch.randn(64, IN, dtype=torch.bfloat16)
    weight = case.oracle(base.weight.double(), state_of(adapter_of(model)), case.config)
    assert error(model(x), nn.functional.linear(x.double(), weight, base.bias.double())) < 6e-3


def test_small_matrices_do_not_feel_autocast(case: Case) -> None:
    made = adapter_of(adapted(case.config).train())
    plain = made.matrices()
    with torch.autocast("cpu", torch.bfloat16):
        cast = made.matrices()
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


@pytest.mark.parametrize("step", [1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.rank is not None])
def test_factors_of_a_small_change_keep_their_digits_in_bfloat16(name: str, step: float) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    model = adapted(case.config, start=True)
    with torch.no_grad():
        for parameter in adapter_of(model).parameters():
            parameter.add_(step * torch.randn_like(parameter) * (parameter.std() or 1))
    weight = layer_of(model).base_layer.weight.detach().bfloat16()
    wanted = case.oracle(weight.double(), state_of(adapter_of(model)), case.config) - weight.double()
    factors = adapter_of(model).delta(weight).factors()
    assert factors is not None
    assert error(factors[0].double() @ factors[1].double(), wanted) < 1e-2


# The cache of evaluation mode


def in_place(parameter: nn.Parameter, new: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(new)


def by_data(parameter: nn.Parameter, new: Tensor) -> None:
    parameter.data = new


def in_place_by_data(parameter: nn.Parameter, new: Tensor) -> None:
    parameter.data.copy_(new)


CHANGES = {"in place": in_place, "by data": by_data, "in place by data": in_place_by_data}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_cache_notices_changed_parameters(case: Case, change: Callable[[nn.Parameter, Tensor], None]) -> None:
    one = adapter(case).eval()
    x = torch.randn(ROWS, IN, dtype=torch.float64)
    assert torch.equal(one.rotate(x), one.rotate(x))
    before = one.rotate(x)
    for parameter in one.parameters():
        change(parameter, torch.randn_like(parameter) * 0.1)
    after = one.rotate(x)
    assert distance(after, x @ case.oracle(torch.eye(IN, dtype=x.dtype), state_of(one), case.config).mT) < 1e-12
    assert distance(after, before) > 1e-3


@torch.no_grad()
def test_cache_notices_load_state_dict_and_to(case: Case) -> None:
    one, other = adapter(case).eval(), adapter(case).eval()
    x = torch.randn(ROWS, IN, dtype=torch.float64)
    assert distance(one.rotate(x), other.rotate(x)) > 1e-3
    one.load_state_dict(other.state_dict())
    assert torch.equal(one.rotate(x), other.rotate(x))
    one.float()
    assert torch.equal(one.rotate(x.float()), adapter_like(case, one).rotate(x.float()))


def adapter_like(case: Case, one: nn.Module) -> InputRotation:
    made = adapter(case, dtype=torch.float32).eval()
    made.load_state_dict(one.state_dict())
    return made


def test_evaluation_builds_once_and_training_each_time(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    one, built = adapter(case), []
    build = one.build
    monkeypatch.setattr(one, "build", lambda: built.append(1) or build())
    x = torch.randn(ROWS, IN, dtype=torch.float64)
    with torch.no_grad():
        one.eval()
        for _ in range(3):
            one.rotate(x)
        assert len(built) == 1
        one.train()
        for _ in range(3):
            one.rotate(x)
    assert len(built) == 4


def test_cached_matrices_do_not_cut_gradients(case: Case) -> None:
    one = adapter(case).eval()
    x = torch.randn(ROWS, IN, dtype=torch.float64)
    with torch.no_grad():
        one.rotate(x)
    one.rotate(x).square().sum().backward()
    assert all(p.grad is not None for p in one.parameters())


def test_inference_mode(case: Case) -> None:
    with torch.inference_mode():
        model = adapted(case.config).eval()
        x = torch.randn(ROWS, IN)
        assert torch.equal(model(x), model(x))
    model = adapted(case.config).eval()
    with torch.inference_mode():
        wanted = model(x)
    assert torch.equal(model(x.clone()), wanted)


# Dropout


@pytest.mark.parametrize("config", DROPPING.values(), ids=DROPPING)
def test_dropout_replaces_blocks_by_the_identity(config: OrthoConfig) -> None:
    torch.manual_seed(0)
    model = adapted(config, OUT, 400).double()
    rotate, x = adapter_of(model), torch.randn(ROWS, 400, dtype=torch.float64)
    model.train()
    dropped = rotate(x, lambda x: x).reshape(ROWS, 100, 4)
    rotated, plain = rotate.rotate(x).reshape(ROWS, 100, 4), x.reshape(ROWS, 100, 4)
    out = (dropped == plain).all(-1).all(0)
    assert 30 < out.sum() < 70
    torch.testing.assert_close(dropped[:, ~out], rotated[:, ~out])
    assert distance(rotated[:, ~out], plain[:, ~out]) > 1e-3


@pytest.mark.parametrize("config", DROPPING.values(), ids=DROPPING)
def test_dropout_only_in_training(config: OrthoConfig) -> None:
    torch.manual_seed(0)
    model, x = adapted(config), torch.randn(ROWS, IN)
    model.train()
    assert not torch.equal(model(x), model(x))
    wanted = model.eval()(x)
    assert torch.equal(model(x), wanted)
    model.train().merge_adapter()
    assert error(model(x), wanted) <= 1e-5


# The regulariser


def test_penalty_of_hra_is_its_formula() -> None:
    torch.manual_seed(0)
    model = adapted(HRAConfig(r=4, orthogonality_weight=0.3))
    got = penalty(model)
    assert got is not None
    assert got.item() == pytest.approx(reference.hra_penalty(adapter_of(model).u, 0.3).item(), rel=1e-5)
    got.backward()
    assert adapter_of(model).u.grad.abs().max() > 0


def test_penalty_counts_active_adapters_only() -> None:
    torch.manual_seed(0)
    config = HRAConfig(r=4, orthogonality_weight=0.3, target_modules=["lin"], init_weights=False)
    model = adapted(config)
    model.add_adapter("strong", replace(config, orthogonality_weight=5.0))
    model.add_adapter("none", replace(config, orthogonality_weight=0.0))

    def expected(name: str, weight: float) -> float:
        return reference.hra_penalty(adapter_of(model, name).u, weight).item()

    assert penalty(model).item() == pytest.approx(expected("default", 0.3), rel=1e-5)
    model.set_adapter("strong")
    assert penalty(model).item() == pytest.approx(expected("strong", 5.0), rel=1e-5)
    model.base_model.set_adapter(["strong", "default", "none"])
    both = expected("default", 0.3) + expected("strong", 5.0)
    assert penalty(model).item() == pytest.approx(both, rel=1e-5)
    model.set_adapter("none")
    assert penalty(model) is None
    model.set_adapter("default")
    with model.disable_adapter():
        assert penalty(model) is None


@pytest.mark.parametrize("config", [OFTv2Config(block_size=4), HRAConfig(r=4, orthonormal=True)], ids=["oftv2", "hra"])
def test_no_penalty_where_the_paper_has_none(config: OrthoConfig) -> None:
    assert penalty(adapted(config)) is None


# Several adapters


@pytest.fixture
def two(case: Case) -> Any:
    """A model with adapters 1 and 2 whose rotations are large and do not commute."""
    model = get_peft_model(
        Net().double(), replace(case.config, target_modules=["lin"], init_weights=False), adapter_name="1"
    )
    model.add_adapter("2", replace(case.config, target_modules=["lin"], init_weights=False))
    return model.double().eval()


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("order", [["1", "2"], ["2", "1"]], ids="".join)
def test_several_adapters_act_in_the_order_given(case: Case, two: Any, order: list[str]) -> None:
    base = layer_of(two).base_layer
    weight = original = base.weight.detach().clone()
    for name in order:
        weight = case.oracle(weight, state_of(adapter_of(two, name)), case.config)
    x = torch.randn(ROWS, IN, dtype=torch.float64)
    wanted = nn.functional.linear(x, weight, base.bias)
    two.base_model.set_adapter(order)
    assert error(two(x), wanted) < 1e-13
    two.merge_adapter()
    assert error(base.weight, weight) < 1e-13
    two.unmerge_adapter()
    for name in order:
        two.merge_adapter([name])
    assert error(two(x), wanted) < 1e-13
    assert error(base.weight, weight) < 1e-13
    two.unmerge_adapter()
    assert torch.equal(base.weight, original)
    two.base_model.set_adapter(order[::-1])
    assert error(two(x), wanted) > 1e-2


# The constrained variant


def test_radius_bounds_the_generator_and_frees_what_is_inside() -> None:
    tight, free = (OFTv2Config(block_size=4, map="cayley", radius=r) for r in (0.1, 1e3))
    torch.manual_seed(0)
    one = tight.make_adapter("lin", IN, OUT)
    one.reset_parameters(identity=False)
    norms = one.generators().norm(dim=1) * 2**0.5
    assert norms.max().item() == pytest.approx(0.1 / 6**0.5, rel=1e-5)
    other = free.make_adapter("lin", IN, OUT)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.generators(), other.skew)
    with pytest.raises(ValueError, match="radius must be positive"):
        OFTv2Config(radius=0.0)


@pytest.mark.parametrize("config", [OFTv2Config(block_size=8), PSOFTConfig(r=8, map="series")], ids=["oftv2", "psoft"])
def test_large_steps_do_not_overflow_the_series(config: OrthoConfig) -> None:
    torch.manual_seed(0)
    one = config.make_adapter("lin", IN, IN)
    one.adopt(lambda: torch.randn(IN, IN))
    one.reset_parameters()
    with torch.no_grad():
        one.skew.copy_(1e8 * torch.randn_like(one.skew))
    one.rotate(torch.randn(ROWS, IN)).sum().backward()
    assert torch.isfinite(one.rotate(torch.eye(IN))).all()
    assert one.skew.grad is not None
    assert torch.isfinite(one.skew.grad).all()
