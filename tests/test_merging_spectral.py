"""Singular values on the numerical range, and what the contract suite cannot say of the spectral methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from merging_cases import relative
from torch import Tensor

from orthoft.delta import Dense, LowRank
from orthoft.merging import METHODS, merge_deltas
from orthoft.merging.spectra import (
    isotropised,
    joint_rank,
    leading_svd,
    numerical_rank,
    polar,
    range_svd,
    whitened_product,
)

SPECTRAL = ["tsv", "iso_c", "iso_cts", "cart"]  # those with a parameter `range`
SHAPES = [(40, 40), (60, 25), (25, 60), (30, 1)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(s: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    """A float64 matrix (m, n) with the given singular values."""
    U, V = (torch.linalg.qr(normal(size, len(s), seed=seed + size)).Q for size in (m, n))
    return U * s @ V.mT


def loras(ranks: list[int], m: int = 48, n: int = 40, dtype: torch.dtype = torch.float32) -> list[LowRank]:
    return [
        LowRank(normal(m, rank, seed=i, dtype=dtype), normal(rank, n, seed=i + 100, dtype=dtype))
        for i, rank in enumerate(ranks)
    ]


def dense(count: int, m: int = 12, n: int = 9) -> list[Dense]:
    return [Dense(normal(m, n, seed=i, dtype=torch.float32)) for i in range(count)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_range_svd_is_the_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    X = normal(*shape, dtype=dtype)
    U, s, Vh = range_svd(X)
    assert U.dtype == s.dtype == Vh.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-9
    assert relative(s, torch.linalg.svdvals(X)) < tolerance
    assert relative(U * s @ Vh, X) < tolerance
    for frame in (U.mT @ U, Vh @ Vh.mT):
        assert relative(frame, torch.eye(len(s))) < tolerance


def test_range_svd_is_exact_to_the_end_of_the_range() -> None:
    """The error at a relative size c is 1e-16 / c^2; what is below 1e-5 is left out."""
    s = torch.logspace(0, -7.1, 29, dtype=torch.float64)
    X = with_spectrum(s, 40, 33)
    U, got, Vh = range_svd(X)
    assert len(got) == 20 == numerical_rank(X)
    assert ((got - s[:20]).abs() / s[:20]).max() < 1e-5
    exact = torch.linalg.svd(X, full_matrices=False)
    assert relative(U @ Vh, exact.U[:, :20] @ exact.Vh[:20]) < 1e-6


def test_a_zero_or_empty_matrix_has_no_range() -> None:
    for shape in [(3, 4), (4, 3), (3, 0), (0, 3)]:
        U, s, Vh = range_svd(torch.zeros(shape))
        assert (U.shape, len(s), Vh.shape) == ((shape[0], 0), 0, (0, shape[1]))
        assert polar(torch.zeros(shape)).equal(torch.zeros(shape))
        assert isotropised(torch.zeros(shape)).equal(torch.zeros(shape))
        assert numerical_rank(torch.zeros(shape)) == 0
    assert joint_rank([]) == joint_rank([torch.zeros(2, 3)]) == 0


def test_the_floor_leaves_out_rounding_of_something_larger() -> None:
    X = with_spectrum(torch.tensor([1.0, 1e-3, 1e-4], dtype=torch.float64), 9, 7)
    assert [len(range_svd(X, floor)[1]) for floor in (0.0, 2e-4, 2.0)] == [3, 2, 0]
    assert len(leading_svd(X, 1, floor=2.0)[1]) == 0


STEEP = torch.logspace(0, -4, 64, dtype=torch.float64)
FLAT = torch.linspace(1, 0.5, 64, dtype=torch.float64)


@pytest.mark.parametrize("spectrum", [FLAT, STEEP], ids=["flat", "steep"])
@pytest.mark.parametrize("shape", [(64, 64), (100, 64), (64, 100)])
@pytest.mark.parametrize("count", [3, 16, 40])
def test_leading_triplets_are_those_of_the_svd(spectrum: Tensor, shape: tuple[int, int], count: int) -> None:
    X = with_spectrum(spectrum, *shape)
    exact = torch.linalg.svd(X, full_matrices=False)
    U, s, Vh = leading_svd(X.float(), count)
    assert len(s) == count
    assert relative(s, exact.S[:count]) < 1e-6
    assert relative(U * s @ Vh, exact.U[:, :count] * exact.S[:count] @ exact.Vh[:count]) < 5e-5
    assert relative(U @ Vh, exact.U[:, :count] @ exact.Vh[:count]) < (5e-5 if count < 40 else 2e-3)
    assert relative(U.mT @ U, torch.eye(count)) < 1e-6


def test_there_are_no_more_triplets_than_the_rank() -> None:
    X = with_spectrum(torch.tensor([3.0, 2.0], dtype=torch.float64), 30, 20)
    for matrix in (X, X.float()):
        assert len(leading_svd(matrix, 5)[1]) == 2
        assert relative(polar(matrix), polar(X)) < 1e-6
    P = polar(X)
    assert relative(P @ P.mT @ P, P) < 1e-12
    assert numerical_rank(P) == 2


def test_isotropised_has_the_mean_of_the_range() -> None:
    X = with_spectrum(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), 12, 9)
    values = torch.linalg.svdvals(isotropised(X))
    assert (values[:3] - 2).abs().max() < 1e-12
    assert values[3:].max() < 1e-12
    assert relative(isotropised(isotropised(X)), isotropised(X)) < 1e-12
    assert (torch.linalg.svdvals(isotropised(X, "full")) - 6 / 9).abs().max() < 1e-12


def test_joint_rank_counts_directions_whatever_their_size() -> None:
    a, b, c = (task.dense() for task in loras([2, 3, 4]))
    assert joint_rank([a, b, c]) == 9
    assert joint_rank([a, a, 2 * a]) == 2
    assert joint_rank([a, 1e-7 * b, torch.zeros_like(a)]) == 5
    assert joint_rank([a, normal(48, 40, dtype=torch.float32)]) == 40
    assert joint_rank([a, a[:, torch.randperm(40, generator=torch.Generator().manual_seed(0))]]) == 2  # columns alone
    U, V = torch.linalg.qr(normal(90, 48)).Q.float(), torch.linalg.qr(normal(70, 40)).Q.float()
    assert joint_rank([U @ task @ V.mT for task in (a, b, c)]) == 9


def test_orthonormal_parts_are_multiplied_out() -> None:
    X = with_spectrum(torch.tensor([5.0, 4.0, 2.0, 1.0], dtype=torch.float64), 12, 9)
    U, s, Vh = range_svd(X)
    parts = [(U[:, :1], s[:1], Vh[:1]), (U[:, 1:], s[1:], Vh[1:])]
    assert relative(whitened_product(parts), X) < 1e-12


@pytest.mark.parametrize("name", SPECTRAL)
def test_the_published_form_is_the_same_on_full_rank(name: str) -> None:
    deltas = dense(3)
    want = merge_deltas(deltas, method=name, range="full").dense()
    assert relative(merge_deltas(deltas, method=name).dense(), want) < 1e-5


@pytest.mark.parametrize("name", SPECTRAL)
def test_the_published_form_is_taken_in_full_space_only(name: str) -> None:
    assert merge_deltas(loras([2, 3]), method=name).rank() == 5
    assert merge_deltas(loras([2, 3]), method=name, range="full").rank() is None
    assert METHODS[name].entries({"range": "full"})
    assert not METHODS[name].entries({"range": "numerical"})
    with pytest.raises(
        ValueError, match=r"unknown value of parameter 'range' of method '.*' 'ful', did you mean 'full'"
    ):
        merge_deltas(loras([2, 3]), method=name, range="ful")


@pytest.mark.parametrize("name", [*SPECTRAL, "wudi", "opcm"])
def test_low_rank_tasks_merge_within_their_span_in_any_precision(name: str) -> None:
    """The published codes differ by up to 132 % of the norm here, and leave the span of the tasks."""
    single, double = (
        [Dense(task.dense().to(dtype)) for task in loras([4] * 5)] for dtype in (torch.float32, torch.float64)
    )
    got = merge_deltas(single, method=name, space="full").dense()
    assert relative(got, merge_deltas(double, method=name, space="full").dense()) < 1e-4
    assert relative(got, merge_deltas(loras([4] * 5), method=name, space="core").dense()) < 1e-4
    assert numerical_rank(got) <= 20


@pytest.mark.parametrize("space", ["full", "core"])
@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts", "wudi", "opcm"])
def test_a_task_that_changes_nothing_has_no_influence(name: str, space: str) -> None:
    deltas, absent = loras([1, 4, 2]), LowRank(torch.zeros(48, 3), torch.zeros(3, 40))
    want = merge_deltas(deltas, method=name, space=space).dense()
    want = want / want.norm()  # OPCM has the mean norm of all tasks
    for more in ([*deltas, absent], [absent, absent, *deltas]):
        got = merge_deltas(more, method=name, space=space).dense()
        assert relative(got / got.norm(), want) < 2e-6


@pytest.mark.parametrize("name", ["tsv", "iso_c", "wudi"])
def test_equal_singular_values_are_no_trouble(name: str) -> None:
    """Any basis of the singular vectors will do: the results do not depend on which."""
    frames = [[torch.linalg.qr(normal(size, 3, seed=i + size)).Q.float() for size in (48, 40)] for i in range(3)]
    turn = torch.linalg.qr(normal(3, 3)).Q.float()
    deltas = [LowRank(B, A.mT) for B, A in frames]
    want = merge_deltas(deltas, method=name, space="full").dense()
    assert relative(merge_deltas(deltas, method=name, space="core").dense(), want) < 1e-5
    turned = [LowRank(B @ turn, (A @ turn).mT) for B, A in frames]
    assert relative(merge_deltas(turned, method=name, space="core").dense(), want) < 1e-5


@pytest.mark.parametrize("name", ["tsv", "cart", "wudi"])
@pytest.mark.parametrize("space", ["full", "core"])
def test_the_same_task_twice(name: str, space: str) -> None:
    """TSV-M shares the room out and adds what is the same; CART and WUDI give the task itself."""
    task = loras([4])[0]
    got = merge_deltas([task, task], method=name, space=space).dense()
    want = task.dense()
    if name == "tsv":
        U, s, Vh = torch.linalg.svd(want.double())
        want = U[:, :2] * s[:2] @ Vh[:2]  # k = 4 / 2 of each, twice s / 2
    assert relative(got, want) < 1e-5


def test_tsv_shares_the_room_out() -> None:
    deltas = dense(2)
    merged = merge_deltas(deltas, method="tsv").dense()
    assert numerical_rank(merged) == 8  # 2 int(9 / 2)
    many = dense(2, 3, 2) + dense(5, 3, 2)
    assert numerical_rank(merge_deltas(many, method="tsv").dense()) == 2  # more tasks than directions: one each


def test_iso_cts_takes_common_and_specific_directions() -> None:
    a, b = (with_spectrum(torch.tensor([4.0, 1.0], dtype=torch.float64), 12, 9, seed) for seed in (0, 50))
    deltas = [Dense(a), Dense(b)]
    values = torch.linalg.svdvals(merge_deltas(deltas, method="iso_cts", common_fraction=0.5).dense())
    assert (values[:4] - values[0]).abs().max() < 1e-12 * values[0]
    assert values[4:].max() < 1e-12
    common = merge_deltas(deltas, method="iso_cts", common_fraction=1.0).dense()
    assert relative(common, merge_deltas(deltas, method="iso_c").dense()) < 1e-12


def test_iso_cts_has_no_common_directions_where_the_tasks_cancel() -> None:
    """Their sum is rounding, in arbitrary directions."""
    d, e = (task.dense() for task in loras([3, 3]))
    tasks = [d, e, -d - e]
    single, double = (
        merge_deltas([Dense(task.to(dtype)) for task in tasks], method="iso_cts").dense()
        for dtype in (torch.float32, torch.float64)
    )
    assert double.norm() > 1
    assert relative(single, double) < 1e-4


def test_iso_cts_adds_nothing_of_a_task_that_is_all_common() -> None:
    """What is left of it is rounding: 6 common directions, and the second task's first."""
    X = with_spectrum(torch.tensor([9.0, 8, 7, 6, 5, 4, 2, 1], dtype=torch.float64), 30, 24)
    U, s, Vh = (part[..., :8] if i < 2 else part[:8] for i, part in enumerate(torch.linalg.svd(X)))
    tasks = [Dense((U[:, part] * s[part] @ Vh[part]).float()) for part in (slice(0, 6), slice(6, 8))]
    merged = merge_deltas(tasks, method="iso_cts").dense()
    want = (s[:7].mean() * U[:, :7]) @ Vh[:7]
    assert relative(merged, want) < 1e-5


def test_cart_adds_what_differs_from_the_mean() -> None:
    deltas = dense(3)
    centre = merge_deltas(deltas, method="mean").dense()
    apart = merge_deltas(deltas, method="cart", rank_fraction=0.1, scaling=2.0).dense() - centre
    leading = [torch.linalg.svd(delta.d - centre) for delta in deltas]
    assert relative(apart, 2 * sum(U[:, :1] * s[:1] @ Vh[:1] for U, s, Vh in leading)) < 1e-5
    assert relative(merge_deltas(deltas, method="cart", rank_fraction=0.0).dense(), centre) < 1e-6


def test_cart_does_not_count_the_rounding_of_a_task_at_the_mean() -> None:
    """The last task is the mean up to rounding, whose full rank would let ten times as many triplets in."""
    a, d, e = (task.dense() for task in loras([3, 3, 3]))
    tasks = [a + d, a + e, a - d - e, a]
    got = merge_deltas([Dense(task) for task in tasks], method="cart", rank_fraction=0.1, scaling=1.0).dense()
    leading = [torch.linalg.svd(rest.double(), full_matrices=False) for rest in (d, e, -d - e)]
    assert relative(got - a, sum(U[:, :1] * s[:1] @ Vh[:1] for U, s, Vh in leading)) < 1e-4


def wudi_loss(X: Tensor, tasks: list[Tensor]) -> float:
    return sum((((X - task) @ task.mT).norm() / task.norm()).item() ** 2 for task in tasks)


def test_wudi_disturbs_no_task_with_inputs_of_its_own() -> None:
    tasks = [delta.dense() for delta in loras([3, 4, 5], dtype=torch.float64)]
    merged = merge_deltas([Dense(task) for task in tasks], method="wudi").dense()
    assert wudi_loss(merged, tasks) < 1e-20 * wudi_loss(sum(tasks, torch.zeros(48, 40)), tasks)


def test_wudi_is_the_minimum() -> None:
    tasks = [delta.d.double() for delta in dense(3)]
    merged = merge_deltas([Dense(task) for task in tasks], method="wudi").dense().requires_grad_()
    loss = sum((((merged - task) @ task.mT).norm() / task.norm()) ** 2 for task in tasks)
    (slope,) = torch.autograd.grad(torch.as_tensor(loss), merged)
    assert wudi_loss(merged.detach(), tasks) > 1e-3
    assert slope.norm() < 1e-10


@pytest.mark.parametrize("name", [*SPECTRAL, "wudi"])
def test_vectors_are_averaged(name: str) -> None:
    vectors = dense(3, 1, 8)
    want = merge_deltas(vectors, method="mean").dense()
    assert relative(merge_deltas(vectors, method=name).dense(), want) < 1e-6


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("iso_cts", {"common_fraction": 1.5}, "common_fraction is a share of the rank, in [0, 1], got 1.5"),
        ("cart", {"rank_fraction": -1}, "rank_fraction is a share of the rank, in [0, 1], got -1"),
    ],
)
def test_wrong_values_are_told_in_one_line(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        merge_deltas(dense(2), method=name, **params)
    assert str(caught.value) == message
