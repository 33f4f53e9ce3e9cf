"""What is special to GOFT: the tree at any width, blocks that change nothing, gradients, the formulas of v1."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from reference_goft import goft, goft_penalty
from torch import Tensor, nn

from orthoft import penalty
from orthoft.adapters.goft import GOFTConfig, TreeRotation
from orthoft.givens import plane_rotations, tree_blocks, tree_flops, tree_product

WIDTHS = [2, 3, 5, 24, 64, 96, 100, 130, 200]
KINDS = {
    "strict": GOFTConfig(),
    "quasi": GOFTConfig(mode="quasi"),
    "strict scaled": GOFTConfig(scale=True),
    "quasi scaled": GOFTConfig(mode="quasi", scale=True),
}
KIND = pytest.mark.parametrize("config", KINDS.values(), ids=[name.replace(" ", "-") for name in KINDS])
WIDTH = pytest.mark.parametrize("n", WIDTHS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tree(config: GOFTConfig, n: int, dtype: torch.dtype = torch.float64) -> TreeRotation:
    made = config.make_adapter("lin", n, 1)
    made.reset_parameters(identity=False)
    return made.to(dtype)


def state_of(one: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double() for name, p in one.named_parameters()}


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def distance(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def model(config: GOFTConfig, n: int, out: int = 8, start: bool = False) -> Any:
    base = nn.Sequential(nn.Linear(n, out))
    return get_peft_model(base, replace(config, target_modules=["0"], init_weights=start))


# What it computes


@KIND
@WIDTH
@pytest.mark.parametrize("block_size", [4, 64])
def test_equals_the_dense_stages(config: GOFTConfig, n: int, block_size: int) -> None:
    one = tree(replace(config, block_size=block_size), n)
    W = torch.randn(7, n, dtype=torch.float64)
    wanted = goft(W, state_of(one), config)
    assert distance(one.merged(W), wanted) < 1e-13
    assert distance(W + one.delta(W).dense(), wanted) < 1e-13
    assert distance(W, wanted) > 1e-2


@KIND
@pytest.mark.parametrize("n", [2, 5, 24, 130, 200])
def test_blocks_change_nothing_but_speed(config: GOFTConfig, n: int) -> None:
    state = tree(config, n).state_dict()
    x = torch.randn(3, n, dtype=torch.float64)
    results = []
    for block_size in (2, 4, 8, 32, 128, 1024):
        one = tree(replace(config, block_size=block_size), n)
        one.load_state_dict(state)
        results.append(one.rotate(x))
        size = one.build().shape[-1]
        assert size == min(block_size, 2 ** math.ceil(math.log2(n)))
    assert max(distance(result, results[0]) for result in results) < 1e-13


@KIND
@WIDTH
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotation_flags(config: GOFTConfig, n: int, transpose: bool, inverse: bool) -> None:
    one = tree(replace(config, block_size=8), n)
    Q = goft(eye(n), state_of(one), config).T
    Q = torch.linalg.inv(Q) if inverse else Q
    assert distance(one.rotate(eye(n), transpose=transpose, inverse=inverse), Q.T if transpose else Q) < 1e-12


@pytest.mark.parametrize("n", [3, 100, 768])
def test_strict_is_orthogonal(n: int) -> None:
    one = tree(GOFTConfig(), n, torch.float32)
    with torch.no_grad():
        one.angles.mul_(30)  # as exact far from the identity
    Q = one.rotate(torch.eye(n)).detach().double()
    assert torch.linalg.matrix_norm(Q.T @ Q - eye(n), 2) < 2e-6
    assert torch.linalg.det(Q).item() == pytest.approx(1.0, abs=1e-5)


def test_small_angles_survive_float32() -> None:
    """The update of an angle of 1e-5 has a diagonal of -5e-11, which a cosine in float32 rounds to nothing."""
    angles = torch.full((7,), 1e-5)
    update = tree_blocks(plane_rotations(angles), 8)
    wanted = tree_blocks(plane_rotations(angles.double()), 8)
    torch.testing.assert_close(update.double(), wanted, rtol=1e-6, atol=0)
    assert wanted.diagonal(dim1=1, dim2=2).abs().max() > 1e-11


@pytest.mark.parametrize("n", [2, 5, 24, 100])
def test_quasi_of_rotations_is_strict(n: int) -> None:
    strict, quasi = tree(GOFTConfig(), n), tree(GOFTConfig(mode="quasi"), n)
    with torch.no_grad():
        quasi.planes.copy_(plane_rotations(strict.angles) + eye(2))
    x = torch.randn(3, n, dtype=torch.float64)
    assert distance(quasi.rotate(x), strict.rotate(x)) < 1e-14


def official(x: Tensor, angles: Tensor | None, planes: Tensor | None, scale: Tensor | None) -> Tensor:
    """``x P_L ... P_1 S`` as the authors' first file walks the tree: a count of live coordinates that halves, and byes.

    ``angles`` are its parameters, bounded by ``pi tanh``; ``planes`` its free matrices, ``scale`` its diagonal.
    """
    n = x.shape[1]
    product = eye(n) if scale is None else torch.diag(scale)
    live, stride, used = n, 1, 0
    while live > 1:
        pairs = live // 2
        P = eye(n)
        for k in range(pairs):
            i, j = 2 * stride * k, 2 * stride * k + stride
            if planes is None:
                theta = torch.pi * torch.tanh(angles[used + k])
                P[i, i] = P[j, j] = torch.cos(theta)
                P[i, j], P[j, i] = -torch.sin(theta), torch.sin(theta)
            else:
                P[[[i, i], [j, j]], [[i, j], [i, j]]] = planes[used + k]
        product = P @ product
        live, stride, used = live - pairs, 2 * stride, used + pairs
    return x @ product


@KIND
@WIDTH
def test_equals_the_official_formulas(config: GOFTConfig, n: int) -> None:
    one = tree(config, n)
    theirs = one.angles.detach().clone() if config.mode == "strict" else None
    if theirs is not None:
        one.load_state_dict({**one.state_dict(), "angles": torch.pi * torch.tanh(theirs)})
    state = state_of(one)
    x = torch.randn(7, n, dtype=torch.float64)
    assert distance(one.rotate(x), official(x, theirs, state.get("planes"), state.get("scale"))) < 1e-13


# Gradients and memory


@KIND
@pytest.mark.parametrize("n", [2, 3, 11, 20])
@pytest.mark.parametrize("leaders_first", [True, False])
def test_gradients_and_their_gradients(config: GOFTConfig, n: int, leaders_first: bool) -> None:
    one = tree(config, n)
    blocks = tree_blocks(torch.randn(n - 1, 2, 2, dtype=torch.float64) / 3, 4, one.scale).detach().requires_grad_()
    x = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    product = lambda x, blocks: tree_product(x, blocks, leaders_first)  # noqa: E731
    assert torch.autograd.gradcheck(product, (x, blocks), fast_mode=True)
    assert torch.autograd.gradgradcheck(product, (x, blocks), fast_mode=True)


@KIND
@WIDTH
def test_parameter_gradients_equal_those_of_the_dense_stages(config: GOFTConfig, n: int) -> None:
    one = tree(replace(config, block_size=8), n)
    x = torch.randn(5, n, dtype=torch.float64)
    towards = torch.randn(5, n, dtype=torch.float64)
    got = torch.autograd.grad((one.rotate(x) * towards).sum(), list(one.parameters()))
    Q = goft(eye(n), dict(one.named_parameters()), config).T
    wanted = torch.autograd.grad((x @ Q * towards).sum(), list(one.parameters()))
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-11)
        assert theirs.abs().max() > 1e-3


@KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saves_little_more_than_the_input(config: GOFTConfig, dtype: torch.dtype) -> None:
    adapted = model(replace(config, block_size=16), 512).to(dtype).train()
    for parameter in adapted.base_model.model[0].adapters["default"].parameters():
        parameter.data = parameter.data.float()
    own = {p.untyped_storage().data_ptr() for p in adapted.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(2048, 512, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        adapted(x)
    assert x.nbytes <= sum(saved.values()) <= 1.15 * x.nbytes


@pytest.mark.parametrize(("kind", "n"), [("strict", 24), ("quasi scaled", 33)])
def test_compiles_to_one_graph(kind: str, n: int) -> None:
    adapted = model(replace(KINDS[kind], block_size=8), n).train()
    x = torch.randn(6, n, requires_grad=True)
    parameters = [x, *adapted.base_model.model[0].adapters["default"].parameters()]
    wanted = torch.autograd.grad((y := adapted(x)).square().sum(), parameters)
    torch._dynamo.reset()
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad((z := compiled(x)).square().sum(), parameters)
    for mine, theirs in zip([z, *got], [y, *wanted], strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


def test_flops_are_those_of_two_levels() -> None:
    assert tree_flops(4096, 64) == 2 * 64 * 4096 + 2 * 64 * 64 + 2 * 4096
    assert tree_flops(5, 4) == (2 * 16 + 2) + 2 * 4 + 2 * 5  # a block of 4, its neighbour of 1, two leaders


# The regulariser, combinations, the configuration


def test_penalty_is_its_formula() -> None:
    adapted = model(GOFTConfig(mode="quasi", orthogonality_weight=0.3), 24)
    planes = adapted.base_model.model[0].adapters["default"].planes
    got = penalty(adapted)
    assert got.item() == pytest.approx(goft_penalty(planes.double(), 0.3).item(), rel=1e-5)
    got.backward()
    assert planes.grad.abs().max() > 0


@KIND
def test_no_penalty_without_a_weight(config: GOFTConfig) -> None:
    assert penalty(model(config, 24)) is None


def test_penalty_vanishes_for_scaled_rotations() -> None:
    one = GOFTConfig(mode="quasi", orthogonality_weight=1.0).make_adapter("lin", 24, 1)
    rotations = plane_rotations(torch.randn(23)) + torch.eye(2)
    one.load_state_dict({"planes": rotations * torch.rand(23, 1, 2)})  # norms of columns stay free
    assert one.penalty().item() < 1e-10


@KIND
@torch.no_grad()
def test_combination(config: GOFTConfig) -> None:
    first, second, made = tree(config, 24), tree(config, 24), tree(config, 24)
    made.combine([first, second], [1.0, 0.0])
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(parameter, first.get_parameter(name), atol=1e-15, rtol=0)
    made.combine([first, second], [0.0, 0.0])
    assert distance(made.rotate(eye(24)), eye(24)) == 0.0
    made.combine([first, second], [0.5, -0.25])
    for name, parameter in made.named_parameters():
        start = {"angles": 0.0, "scale": 1.0, "planes": eye(2)}[name]
        a, b = first.get_parameter(name), second.get_parameter(name)
        torch.testing.assert_close(parameter - start, 0.5 * (a - start) - 0.25 * (b - start), atol=1e-14, rtol=0)


def test_combination_of_other_block_sizes() -> None:
    adapted = model(GOFTConfig(block_size=8), 24).double().eval()
    config = GOFTConfig(block_size=16, target_modules=["0"], init_weights=False)
    adapted.add_adapter("other", config)
    adapted.double().add_weighted_adapter(["default", "other"], [0.0, 1.0], "both")
    x = torch.randn(3, 24, dtype=torch.float64)
    adapted.set_adapter("other")
    wanted = adapted(x)
    adapted.set_adapter("both")
    assert distance(adapted(x), wanted) < 1e-6  # combinations are kept in float32
    adapted.add_adapter("quasi", replace(config, mode="quasi"))
    with pytest.raises(ValueError, match="must agree in mode"):
        adapted.add_weighted_adapter(["default", "quasi"], [0.5, 0.5], "never")


REFUSED = {
    "mode": ({"mode": "strickt"}, "value of mode 'strickt'.*strict"),
    "block of 48": ({"block_size": 48}, "power of two"),
    "block of 1": ({"block_size": 1}, "power of two"),
    "negative weight": ({"mode": "quasi", "orthogonality_weight": -1.0}, "not be negative"),
    "weight in strict mode": ({"orthogonality_weight": 0.1}, "exactly orthogonal.*mode='quasi'"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=[name.replace(" ", "-") for name in REFUSED])
def test_refused_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GOFTConfig(**fields)


def test_one_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'a\.lin' has 1 input"):
        GOFTConfig().make_adapter("a.lin", 1, 5)
