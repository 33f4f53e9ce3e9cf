"""Every method in every space, against dense float64 oracles and against what must be true of any of them."""

from __future__ import annotations

import pytest
import reference
import torch
from torch import Tensor

from orthoft.delta import Delta, Dense, LowRank, Rotated
from orthoft.merging import METHODS, SPACES, merge_deltas, method
from orthoft.merging.methods.opcm import opcm

M, N = 12, 9
SYMMETRIC = {"task_arithmetic", "mean", "ties"}  # the order of the tasks does not matter
IDEMPOTENT = {"task_arithmetic": {}, "mean": {}, "ties": {"density": 1.0}, "opcm": {}}  # one source gives itself
SETTINGS = [("ties", {"density": 0.5}), ("ties", {"density": 1.0})]
SETTINGS += [("opcm", {"alpha": alpha}) for alpha in (0.0, 0.2, 0.8, 1.0)] + [(name, {}) for name in METHODS]
by_method = pytest.mark.parametrize(("name", "params"), SETTINGS, ids=lambda value: str(value))


def low_rank(rank: int, seed: int, dtype: torch.dtype = torch.float32) -> LowRank:
    random = torch.Generator().manual_seed(seed)
    B = torch.randn(M, rank, generator=random, dtype=torch.float64)
    A = torch.randn(rank, N, generator=random, dtype=torch.float64)
    return LowRank(B.to(dtype), A.to(dtype))


def some_deltas(kind: str) -> list[Delta]:
    """Three tasks of one kind: few and equal ranks, mixed ranks, more than the matrix has, dense, rotated, or all."""
    random = torch.Generator().manual_seed(5)
    dense = [Dense(torch.randn(M, N, generator=random)) for _ in range(3)]
    skew = torch.randn(3, 3, 3, generator=random)
    rotated = Rotated(torch.randn(M, N, generator=random), 0.3 * (skew - skew.mT))
    return {
        "equal ranks": [low_rank(2, seed) for seed in range(3)],
        "mixed ranks": [low_rank(rank, rank) for rank in (1, 4, 2)],
        "excess rank": [low_rank(rank, rank) for rank in (5, 6, 7)],
        "same task": [low_rank(3, 1)] * 3,
        "dense": dense,
        "mixed kinds": [low_rank(2, 1), dense[0], rotated],
    }[kind]


KINDS = ["equal ranks", "mixed ranks", "excess rank", "same task", "dense", "mixed kinds"]
FACTORED = KINDS[:4]


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


@by_method
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.5]])
def test_full_space_equals_the_oracle(name: str, params: dict, kind: str, weights: list[float] | None) -> None:
    if kind == "same task" and params.get("alpha") == 1.0:
        pytest.skip("S stays D_1 up to rounding: see test_opcm_adds_nothing_known")
    deltas = some_deltas(kind)
    want = getattr(reference, name)([delta.dense().double() for delta in deltas], weights or [1.0] * 3, **params)
    got = merge_deltas(deltas, method=name, space="full", weights=weights, **params).dense()
    assert relative(got, want) < 2e-5


@by_method
@pytest.mark.parametrize("kind", FACTORED)
def test_core_equals_full_exactly_where_the_method_commutes(name: str, params: dict, kind: str) -> None:
    deltas = some_deltas(kind)
    core = merge_deltas(deltas, method=name, space="core", **params)
    full = merge_deltas(deltas, method=name, space="full", **params)
    auto = merge_deltas(deltas, method=name, **params)
    assert core.rank() == min(M, N, sum(delta.rank() or 0 for delta in deltas))
    if METHODS[name].commutes:
        assert relative(core.dense(), full.dense()) < 1e-5
        assert auto.rank() == core.rank()
    elif kind != "same task":
        assert relative(core.dense(), full.dense()) > 1e-2
    if not METHODS[name].commutes:
        assert auto.rank() is None


@by_method
def test_a_change_of_basis_commutes_where_claimed(name: str, params: dict) -> None:
    deltas = [low_rank(2, seed, torch.float64) for seed in range(3)]
    U, V = (torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q for size in (M, N))
    turned = [LowRank(U @ delta.B, delta.A @ V) for delta in deltas]
    got = merge_deltas(turned, method=name, space="full", **params).dense()
    want = U @ merge_deltas(deltas, method=name, space="full", **params).dense() @ V
    assert (relative(got, want) < 1e-10) == METHODS[name].commutes


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", METHODS)
def test_one_source_gives_itself(name: str, space: str) -> None:
    delta = low_rank(3, 0)
    assert relative(merge_deltas([delta], method=name, space=space, **IDEMPOTENT[name]).dense(), delta.dense()) < 1e-6


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", METHODS)
def test_zeros_merge_to_zero(name: str, space: str) -> None:
    zeros = [LowRank(torch.zeros(M, rank), torch.zeros(rank, N)) for rank in (2, 0)]
    assert merge_deltas(zeros, method=name, space=space).dense().abs().max() == 0


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", ["task_arithmetic", "ties"])
def test_a_zero_source_changes_nothing(name: str, space: str) -> None:
    deltas = some_deltas("mixed ranks")
    absent = LowRank(torch.zeros(M, 0), torch.zeros(0, N))
    want = merge_deltas(deltas, method=name, space=space).dense()
    assert relative(merge_deltas([*deltas, absent], method=name, space=space).dense(), want) < 1e-6


@by_method
@pytest.mark.parametrize("space", SPACES)
def test_order_matters_only_where_it_should(name: str, params: dict, space: str) -> None:
    deltas = some_deltas("mixed ranks")
    there = merge_deltas(deltas, method=name, space=space, weights=[1, 2, 3], **params).dense()
    back = merge_deltas(deltas[::-1], method=name, space=space, weights=[3, 2, 1], **params).dense()
    assert (relative(back, there) < 1e-5) == (name in SYMMETRIC)


@by_method
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("scale", [-3.0, 0.01])
def test_scaling_all_deltas_scales_the_result(name: str, params: dict, space: str, scale: float) -> None:
    deltas = some_deltas("mixed ranks")
    want = scale * merge_deltas(deltas, method=name, space=space, **params).dense()
    got = merge_deltas([delta.scaled(scale) for delta in deltas], method=name, space=space, **params).dense()
    assert relative(got, want) < 1e-5


@by_method
@pytest.mark.parametrize("space", SPACES)
def test_weights_scale_the_tasks(name: str, params: dict, space: str) -> None:
    if space == "core" and not METHODS[name].commutes:
        pytest.skip("scaled factors have other bases, which such a method sees")
    deltas, weights = some_deltas("mixed ranks"), [2.0, 0.5, 1.0]
    got = merge_deltas(deltas, method=name, space=space, weights=weights, **params).dense()
    scaled = [delta.scaled(weight) for delta, weight in zip(deltas, weights, strict=True)]
    want = merge_deltas(scaled, method=name, space=space, **params).dense()
    want = want * 3 / sum(weights) if name == "mean" else want
    assert relative(got, want) < 1e-5


def test_half_precision_is_computed_in_float32() -> None:
    deltas = [low_rank(3, seed, torch.bfloat16) for seed in range(2)]
    for space in SPACES:
        merged = merge_deltas(deltas, method="task_arithmetic", space=space)
        want = sum(delta.B.double() @ delta.A.double() for delta in deltas)
        assert merged.dense().dtype == torch.float32
        assert relative(merged.dense(), want) < 1e-6


def test_opcm_adds_nothing_known() -> None:
    """With alpha = 1 a task within the range of the merge so far is removed, not kept."""
    first = low_rank(3, 0, torch.float64)
    within = LowRank(first.B @ torch.randn(3, 3, dtype=torch.float64), first.A)
    x = torch.stack([first.dense(), within.dense()])
    assert relative(opcm(x, torch.ones(2), alpha=1.0), first.dense()) < 1e-12
    assert relative(opcm(x, torch.ones(2), alpha=0.0), first.dense()) > 1e-2


def test_opcm_keeps_the_mean_norm_of_the_tasks() -> None:
    deltas = some_deltas("mixed ranks")
    merged = merge_deltas(deltas, method="opcm")
    want = sum(delta.norm() for delta in deltas) / 3
    assert abs(merged.norm() - want) < 1e-5 * want


def test_opcm_sums_vectors() -> None:
    vectors = [Dense(torch.randn(1, 8)) for _ in range(3)]
    total = sum(vector.d for vector in vectors)
    merged = merge_deltas(vectors, method="opcm").dense()
    assert relative(merged / merged.norm(), total / total.norm()) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "tiess"}, ValueError, "unknown merge method 'tiess', did you mean 'ties'? Choose from:"),
        (
            {"method": "ties", "densty": 1},
            ValueError,
            "unknown parameter of method 'ties' 'densty', did you mean 'density'?",
        ),
        ({"method": "mean", "density": 1}, ValueError, "method 'mean' has no parameters, got 'density'"),
        ({"method": "ties", "density": "0.2"}, TypeError, "parameter 'density' of method 'ties' is a float, got '0.2'"),
        ({"method": "ties", "density": 0.0}, ValueError, "density is the share of entries kept, in (0, 1], got 0.0"),
        ({"method": "opcm", "alpha": 2}, ValueError, "alpha is a share of the singular values, in [0, 1], got 2"),
        (
            {"method": "mean", "space": "cor"},
            ValueError,
            "unknown space 'cor', did you mean 'core'? Choose from: auto,",
        ),
        ({"method": "mean", "weights": [1.0]}, ValueError, "1 weights were given for 2 sources: give one each"),
        ({"method": "mean", "weights": [1, -1]}, ValueError, "divides by the sum of the weights, which is zero"),
        ({"method": "mean", "weights": [1, float("nan")]}, ValueError, "weights must be finite numbers"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        merge_deltas([low_rank(2, 0), low_rank(2, 1)], **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_deltas_are_told_in_one_line() -> None:
    good = low_rank(2, 0)
    with pytest.raises(ValueError, match=r"^delta 1 has shape \(9, 12\), delta 0 has \(12, 9\)$"):
        merge_deltas([good, good.transposed()], method="mean")
    with pytest.raises(ValueError, match=r"^delta 1 contains NaN or Inf$"):
        merge_deltas([good, LowRank(good.B / 0, good.A)], method="mean")
    with pytest.raises(ValueError, match=r"^space 'core' needs low-rank factors, which not all sources have"):
        merge_deltas([good, Dense(good.dense())], method="mean", space="core")
    with pytest.raises(ValueError, match=r"^there is nothing to merge"):
        merge_deltas([], method="mean")


def test_a_new_method_is_a_decorated_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registering is all it takes; parameters without default are asked for, generators are seeded by the engine."""
    monkeypatch.setattr("orthoft.merging.methods.registry.METHODS", METHODS.copy())
    before = set(METHODS)

    @method("random_half")
    def random_half(x: Tensor, weights: Tensor, *, keep: float, generator: torch.Generator) -> Tensor:
        return x.sum(0) * (torch.rand(x.shape[1:], generator=generator) < keep)

    deltas = some_deltas("dense")
    first, second = (merge_deltas(deltas, method="random_half", keep=0.5).dense() for _ in range(2))
    assert torch.equal(first, second)
    assert 0 < (first == 0).float().mean() < 1
    with pytest.raises(TypeError, match="needs the parameter 'keep'"):
        merge_deltas(deltas, method="random_half")
    with pytest.raises(ValueError, match="unknown parameter of method 'random_half' 'generator'"):
        merge_deltas(deltas, method="random_half", keep=1, generator=3)
    assert set(METHODS) == before
