"""Every method in every space, against dense float64 oracles and against what must be true of any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merging_cases import (
    CASES,
    FACTORED,
    KINDS,
    SETTINGS,
    M,
    N,
    base,
    commutes,
    low_rank,
    merged,
    relative,
    some_deltas,
    tasks_of,
    works_in,
)
from torch import Tensor

from orthoft.delta import Dense, LowRank
from orthoft.merging import METHODS, SPACES, merge_deltas, method
from orthoft.merging.methods.opcm import opcm
from orthoft.merging.statistics import STATISTICS_OF
from orthoft.merging.weightwise import weight_generator

Params = dict[str, Any]
EXACT = [name for name, space in SPACES.items() if space.isometric]
by_method = pytest.mark.parametrize(("name", "params"), SETTINGS, ids=lambda value: str(value))
by_setting = pytest.mark.parametrize(
    ("name", "params", "space"),
    [(name, params, space) for name, params in SETTINGS for space in EXACT if works_in(name, params, space)],
    ids=lambda value: str(value),
)


def test_every_method_has_a_case() -> None:
    assert set(CASES) == set(METHODS)


@by_method
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.5]], ids=["ones", "weights"])
def test_full_space_equals_the_oracle(name: str, params: Params, kind: str, weights: list[float] | None) -> None:
    if kind == "same task" and params.get("alpha") == 1.0:
        pytest.skip("S stays D_1 up to rounding: see test_opcm_adds_nothing_known")
    case, deltas = CASES[name], tasks_of(name, kind)
    weights = weights and weights[: len(deltas)]
    words = {"base": base((M, N), torch.float64)} if METHODS[name].needs("base") else {}
    if METHODS[name].needs("generator"):
        words["generator"] = weight_generator(0, "")
    want = case.oracle([delta.dense().double() for delta in deltas], weights or [1.0] * len(deltas), **params, **words)
    assert relative(merged(name, deltas, "full", params, weights=weights), want) < case.tolerance


@by_method
@pytest.mark.parametrize("kind", FACTORED)
def test_other_spaces_equal_full_exactly_where_the_method_commutes(name: str, params: Params, kind: str) -> None:
    deltas = tasks_of(name, kind)
    full = merged(name, deltas, "full", params)
    auto = merge_deltas(deltas, method=name, **params)
    assert (auto.rank() is not None) == commutes(name, params)
    for space in set(EXACT) - {"full"} if commutes(name, params) else ():
        got = merge_deltas(deltas, method=name, space=space, **params)
        assert got.rank() is not None
        assert got.rank() <= min(M, N, sum(delta.rank() or 0 for delta in deltas))
        assert relative(got.dense(), full) < CASES[name].tolerance
    if not commutes(name, params) and works_in(name, params, "core") and kind != "same task":
        assert relative(merged(name, deltas, "core", params), full) > 1e-2


@by_method
def test_a_change_of_basis_commutes_where_claimed(name: str, params: Params) -> None:
    if STATISTICS_OF.get(name):
        pytest.skip("without statistics it is a mean, which commutes")
    deltas = [low_rank(2, seed, torch.float64) for seed in range(CASES[name].tasks or 3)]
    U, V = (torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q for size in (M, N))
    turned = [LowRank(U @ delta.B, delta.A @ V) for delta in deltas]
    got, want = merged(name, turned, "full", params), U @ merged(name, deltas, "full", params) @ V
    assert (relative(got, want) < 1e-9) == commutes(name, params)


@by_setting
def test_one_source_gives_itself(name: str, params: Params, space: str) -> None:
    idempotent = CASES[name].idempotent
    if params or idempotent is None:
        pytest.skip("once per method and space, with the parameters that make it so")
    delta = low_rank(3, 0)
    assert relative(merged(name, [delta], space, idempotent), delta.dense()) < 2e-6


@by_setting
def test_zeros_merge_to_zero(name: str, params: Params, space: str) -> None:
    zeros = [LowRank(torch.zeros(M, rank), torch.zeros(rank, N)) for rank in (2, 0, 1)]
    assert merged(name, zeros[: CASES[name].tasks], space, params).abs().max() == 0


@by_setting
def test_order_matters_only_where_it_should(name: str, params: Params, space: str) -> None:
    deltas = tasks_of(name, "mixed ranks")
    weights = [1.0, 2.0, 3.0][: len(deltas)]
    there = merged(name, deltas, space, params, weights=weights)
    back = merged(name, deltas[::-1], space, params, weights=weights[::-1])
    assert (relative(back, there) < 1e-4) == CASES[name].symmetric


@by_setting
@pytest.mark.parametrize("scale", [-3.0, 0.01])
def test_scaling_all_deltas_scales_the_result(name: str, params: Params, space: str, scale: float) -> None:
    if not CASES[name].homogeneous:
        pytest.skip("the method is not homogeneous")
    deltas = tasks_of(name, "mixed ranks")
    want = scale * merged(name, deltas, space, params)
    assert relative(merged(name, [delta.scaled(scale) for delta in deltas], space, params), want) < 1e-4


@by_setting
def test_weights_scale_the_tasks(name: str, params: Params, space: str) -> None:
    if not CASES[name].weights_scale:
        pytest.skip("the weights are relative to each other")
    if space != "full" and not commutes(name, params):
        pytest.skip("scaled factors have other bases, which such a method sees")
    deltas = tasks_of(name, "mixed ranks")
    weights = [2.0, 0.5, 1.0][: len(deltas)]
    scaled = [delta.scaled(weight) for delta, weight in zip(deltas, weights, strict=True)]
    got = merged(name, deltas, space, params, weights=weights)
    assert relative(got, merged(name, scaled, space, params)) < 1e-4


@by_method
def test_vectors_merge(name: str, params: Params) -> None:
    """A bias is one row: every method has a rule for it, which a zero task does not turn into NaN."""
    vectors = [Dense(torch.randn(1, 8, generator=torch.Generator().manual_seed(seed))) for seed in range(2)]
    for deltas in (vectors, [vectors[0], Dense(torch.zeros(1, 8))]):
        got = merge_deltas(deltas, method=name, base=torch.ones(1, 8), **params).dense()
        assert got.shape == (1, 8)
        assert torch.isfinite(got).all()
        assert got.abs().max() > 0


@by_method
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (3, 40), (40, 3)], ids=str)
def test_any_shape_will_do(name: str, params: Params, shape: tuple[int, int]) -> None:
    random = torch.Generator().manual_seed(2)
    rank = min(2, *shape)
    deltas = [
        LowRank(torch.randn(shape[0], rank, generator=random), torch.randn(rank, shape[1], generator=random))
        for _ in range(CASES[name].tasks or 3)
    ]
    for space in EXACT:
        if works_in(name, params, space):
            got = merged(name, deltas, space, params)
            assert got.shape == shape
            assert torch.isfinite(got).all()
    if commutes(name, params):
        assert relative(merged(name, deltas, "core", params), merged(name, deltas, "full", params)) < 1e-4


def test_a_large_weight_goes_through_in_slices_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slices change nothing: a method draws on where the slice before it ended."""
    for name in (name for name, found in METHODS.items() if found.rowwise):
        deltas = tasks_of(name, "mixed kinds")
        want = merged(name, deltas, "full", {})
        with monkeypatch.context() as patch:
            patch.setattr("orthoft.merging.weightwise.SLICE", 5 * N)
            got = merged(name, deltas, "full", {})
        assert got.shape == want.shape
        assert relative(got, want) < 1e-6, name


def test_what_follows_the_method() -> None:
    deltas = some_deltas("mixed ranks")
    plain = merge_deltas(deltas, method="task_arithmetic").dense()
    U, s, Vh = torch.linalg.svd(plain.double(), full_matrices=False)
    rank = int((s > 1e-5 * s[0]).sum())
    flat = U[:, :rank] * s[:rank].mean() @ Vh[:rank]
    length = sum(delta.norm() for delta in deltas) / 3
    for space in EXACT:
        words: Params = {"method": "task_arithmetic", "space": space}
        assert relative(merge_deltas(deltas, isotropise=True, **words).dense(), flat) < 1e-5
        assert relative(merge_deltas(deltas, scale=-0.5, **words).dense(), -0.5 * plain) < 1e-6
        for over in ("weight", "model"):
            got = merge_deltas(deltas, rescale=over, scale=2.0, **words).dense()
            assert relative(got, plain * 2 * length / plain.norm()) < 1e-5
    with pytest.raises(ValueError, match="unknown rescale 'modle', did you mean 'model'"):
        merge_deltas(deltas, method="mean", rescale="modle")  # type: ignore[arg-type]


def test_half_precision_is_computed_in_float32() -> None:
    deltas = [low_rank(3, seed, torch.bfloat16) for seed in range(2)]
    for space in EXACT:
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


def test_the_guide_names_every_method_and_parameter_with_its_default() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "merging.md").read_text(encoding="utf-8")
    owners = [*((name, found.parameters) for name, found in METHODS.items())]
    owners += [(f"space `{name}`", found.parameters) for name, found in SPACES.items() if found.parameters.types]
    for name, parameters in owners:
        rows = [line for line in guide.splitlines() if line.startswith("| ") and name in line.split("|")[1]]
        assert any(
            all(f"{key}={default_of(value)}" in row for key, value in parameters.defaults.items()) for row in rows
        ), name


def default_of(value: object) -> str:
    return "none" if value is None else f'"{value}"' if isinstance(value, str) else str(value)
