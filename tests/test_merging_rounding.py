"""What rounding must not decide: equal values, equal scores, weights that cancel, tasks of different precision."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from merging_cases import relative
from torch import Tensor

from orthoft.delta import Delta, Dense, LowRank, Rotated
from orthoft.linalg import rotation_update
from orthoft.merging import merge_deltas
from orthoft.merging.spaces.core import _firsts, core
from orthoft.merging.spectra import leading_svd

RANK, TASKS = 8, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(columns, rows, seed=seed)).Q.mT


def inputs(kind: str) -> list[Tensor]:
    """Return the ``A`` of each task, whose stack has equal singular values."""
    apart = orthonormal(RANK * TASKS, 96).split(RANK)
    found = {
        "apart": list(apart),
        "shared": [apart[0]] * TASKS,
        "sizes": [(task + 1) * A for task, A in enumerate(apart)],
        "shared in another order": [apart[0], apart[0].flip(0), apart[1], apart[1].roll(1, 0)],
    }
    return found[kind]


def with_inputs(each: list[Tensor], noise: float = 0.0) -> list[Delta]:
    moved = [A * (1 + noise * normal(*A.shape, seed=t + 50)) for t, A in enumerate(each)]
    return [LowRank(normal(80, RANK, seed=t + 1), A) for t, A in enumerate(moved)]


@pytest.mark.parametrize("method", ["ties", "pcb", "breadcrumbs"])
@pytest.mark.parametrize("kind", ["apart", "shared", "sizes", "shared in another order"])
def test_core_has_a_basis_where_singular_values_tie(kind: str, method: str) -> None:
    """Without one of its own, noise of 1e-6 turns it by any angle, and results change by 90 %."""
    plain, moved = with_inputs(inputs(kind)), with_inputs(inputs(kind), noise=1e-6)
    words: dict[str, Any] = {"method": method, "space": "core", **({} if method == "pcb" else {"density": 0.2})}
    want = merge_deltas(plain, **words).dense()
    assert relative(merge_deltas(moved, **words).dense(), want) < 1e-3
    single = [LowRank(delta.B.float(), delta.A.float()) for delta in plain if isinstance(delta, LowRank)]
    assert relative(merge_deltas(single, **words).dense(), want) < 1e-3
    assert relative(merge_deltas(plain[::-1], **words).dense(), want) < (
        1e-3 if kind != "shared in another order" else 9
    )


def test_core_takes_orthonormal_rows_as_they_are() -> None:
    """Up to their signs, in their order; the same task coordinates as without settling, but turned."""
    A = inputs("apart")
    deltas = with_inputs(A)
    x, decode = core(deltas, None, torch.ones(TASKS))
    for task, (own, delta) in enumerate(zip(x, deltas, strict=True)):
        columns = torch.linalg.vector_norm(own, dim=0)
        assert (columns > 1e-9).nonzero().flatten().tolist() == list(range(task * RANK, (task + 1) * RANK))
        assert relative(decode(own).dense(), delta.dense()) < 1e-12


def test_core_keeps_singular_vectors_of_values_apart() -> None:
    """Those of values that differ by 1e-4 of the largest are the paper's, whatever is settled beside them."""
    values = torch.tensor([2.0, 1.0002, 1.0, 0.5, 0.5, 0.5, 0.1, 0.1], dtype=torch.float64)
    left, right = orthonormal(8, 60, seed=1).mT, orthonormal(8, 8, seed=2)
    delta = LowRank(normal(90, 8), ((left * values) @ right).mT)
    x, decode = core([delta], None, torch.ones(1))
    V = decode(torch.eye(8, dtype=torch.float64)).A.mT  # type: ignore[attr-defined]
    for place in (0, 1, 2):
        assert abs(V[:, place] @ left[:, place]) == pytest.approx(1, abs=1e-9)
    for part in (slice(3, 6), slice(6, 8)):
        assert relative(V[:, part] @ V[:, part].mT, left[:, part] @ left[:, part].mT) < 1e-9
    assert relative(decode(x[0]).dense(), delta.dense()) < 1e-12


def test_values_that_fall_slowly_are_not_all_equal() -> None:
    assert _firsts([1 - 0.6e-5 * step for step in range(6)]) == [0, 2, 4]
    assert _firsts([]) == [0]


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9, 0.0])
def test_core_bases_are_orthonormal_where_tasks_are_nearly_the_same(gap: float) -> None:
    """The Gram matrix of the factors does not resolve their difference."""
    B, A = normal(60, 4), normal(4, 50, seed=1)
    deltas = [LowRank(B, A), LowRank(B + gap * normal(60, 4, seed=2), A + gap * normal(4, 50, seed=3))]
    x, decode = core(deltas, None, torch.ones(2))
    eye = torch.eye(x.shape[1], x.shape[2], dtype=torch.float64)
    decoded = decode(eye)
    assert isinstance(decoded, LowRank)
    for frame in (decoded.B, decoded.A.mT):
        assert (frame.mT @ frame - torch.eye(frame.shape[1])).norm() < 1e-7
    for own, delta in zip(x, deltas, strict=True):
        assert relative(decode(own).dense(), delta.dense()) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("noise", [1e-4, 1e-3, 1e-2])
def test_leading_triplets_of_a_noisy_matrix_are_those_of_the_svd(noise: float, dtype: torch.dtype) -> None:
    """Nearly of low rank is not of low rank: a sketch that loses the noise is not taken."""
    left, right = orthonormal(10, 80, seed=1).mT, orthonormal(10, 70, seed=2)
    matrix = (left * torch.linspace(1.0, 0.9, 10) @ right + noise * normal(80, 70, seed=3) / 8).to(dtype)
    exact = torch.linalg.svd(matrix.double(), full_matrices=False)
    U, s, Vh = leading_svd(matrix, 3)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert relative(s, exact.S[:3]) < tolerance
    assert relative(U * s @ Vh, exact.U[:, :3] * exact.S[:3] @ exact.Vh[:3]) < 10 * tolerance


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("density", [0.005, 0.01, 0.02, 0.1])
def test_pcb_keeps_the_best_of_a_task_that_stands_alone(density: float, others: int) -> None:
    """The entries that are clipped have one score: the largest of them are the best."""
    x = normal(40, 50)
    got = merge_deltas([Dense(x), *[Dense(0 * x)] * others], method="pcb", density=density).dense()
    kept, sizes = int(density * 2000), x.abs().flatten().sort(descending=True).values
    assert torch.equal(got != 0, x.abs() >= sizes[kept - 1])
    clipped = x.sign() * x.abs().clamp(max=sizes[20])
    assert relative(got, torch.where(got != 0, clipped, 0.0)) < 1e-12


def test_pcb_keeps_all_that_tie_in_score_and_size() -> None:
    """Of two tasks with entries of one size those where they agree have the score, and the others none."""
    signs = [normal(30, 30, seed=seed).sign() for seed in range(2)]
    got = merge_deltas([Dense(0.01 * sign) for sign in signs], method="pcb", density=0.1, clip=0.0).dense()
    torch.testing.assert_close(got, torch.where(signs[0] == signs[1], 0.01 * signs[0], 0.0))


@pytest.mark.parametrize("weights", [[0.1, 0.2, -0.3], [1e6, 0.1, -1000000.1], [0.0, 0.0, 0.0]])
def test_a_mean_refuses_weights_that_cancel(weights: list[float]) -> None:
    deltas = [Dense(normal(3, 4, seed=seed)) for seed in range(3)]
    message = f"method 'mean' divides by the sum of the weights, which is zero: {weights}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        merge_deltas(deltas, method="mean", weights=weights)
    assert merge_deltas(deltas, method="mean", weights=[0.1, 0.2, -0.3 + 1e-9]).dense().isfinite().all()


def low_rank(seed: int, dtype: torch.dtype) -> LowRank:
    return LowRank(normal(40, 3, seed=seed).to(dtype), normal(3, 30, seed=seed + 9).to(dtype))


def nothing(dtype: torch.dtype) -> LowRank:
    return LowRank(torch.zeros(40, 0, dtype=dtype), torch.zeros(0, 30, dtype=dtype))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["factored", "dense", "nothing"])
@pytest.mark.parametrize("space", ["core", "knots", "full", "auto", "rotation"])
@pytest.mark.parametrize("method", ["ties", "tsv", "mean"])
def test_one_precise_task_is_not_rounded(method: str, space: str, kind: str, first: bool) -> None:
    """Among tasks in less: these are exact in float64."""
    if space == "core" and kind == "dense":
        pytest.skip("without factors")
    coarse: dict[str, LowRank] = {"nothing": nothing(torch.float32)}
    other: Delta = coarse.get(kind, low_rank(2, torch.float32))
    other = Dense(other.dense()) if kind == "dense" else other
    precise, words = low_rank(1, torch.float64), {"method": method, "space": space, "base": normal(40, 30, seed=5)}
    tasks = [other, precise] if first else [precise, other]
    got = merge_deltas(tasks, **words).dense()
    assert got.dtype == torch.float64
    assert relative(got, merge_deltas([task.upcast(torch.float64) for task in tasks], **words).dense()) < 1e-12


def test_a_rotation_stays_one_beside_a_precise_task() -> None:
    base = normal(10, 12).float()
    turn = Rotated(base, rotation_update(0.4 * normal(3, 6).float(), 4, "cayley"))
    precise = Dense(torch.zeros(10, 12, dtype=torch.float64))
    words: dict[str, Any] = {"method": "mean", "space": "rotation", "base": base}
    want = merge_deltas([turn, Dense(precise.d.float())], **words).dense()
    assert relative(merge_deltas([turn, precise], **words).dense(), want) < 1e-6


@pytest.mark.parametrize("space", ["full", "core", "knots"])
@pytest.mark.parametrize("over", ["weight", "model"])
def test_the_merge_has_the_norm_it_is_rescaled_to_after_all_else(space: str, over: str) -> None:
    deltas: list[Delta] = [low_rank(seed, torch.float64) for seed in range(3)]
    words: dict[str, Any] = {"method": "task_arithmetic", "space": space, "weights": [0.5, 2.0, -1.0]}
    merged = merge_deltas(deltas, isotropise=True, rescale=over, **words)
    want = sum(abs(w) * float(delta.norm()) for w, delta in zip(words["weights"], deltas, strict=True)) / 3
    assert float(merged.norm()) == pytest.approx(want, rel=1e-9)
    values = torch.linalg.svdvals(merged.dense())[:9]
    assert values.max() - values.min() < 1e-9 * values.max()
