"""KnOTS and the rotation space against dense float64 oracles, and what must be true of any merge in them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import reference
import reference_spaces as oracle
import torch
from torch import Tensor

from orthoft.delta import Delta, Dense, LowRank, Rotated, SubspaceRotated, Transposed
from orthoft.linalg import rotation_update, series_update, skew
from orthoft.merging import merge_deltas
from orthoft.merging.lie_algebra import procrustes
from orthoft.merging.methods.ties import ties
from orthoft.merging.spaces.knots import knots
from orthoft.merging.spaces.rotation import rotation
from orthoft.reflections import householder_factors

M, N = 10, 12
WEIGHTS = [0.5, 2.0, 1.5]


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BASE = numbers(M, N, seed=0)


def low_rank(rank: int, seed: int, m: int = M, n: int = N) -> LowRank:
    return LowRank(numbers(m, rank, seed=seed), numbers(rank, n, seed=seed + 100))


def rotated(size: int, seed: int, base: Tensor = BASE, blocks: int | None = None) -> Rotated:
    entries = 0.4 * numbers(blocks or base.shape[1] // size, size * (size - 1) // 2, seed=seed)
    return Rotated(base, rotation_update(entries, size, "cayley"))


def subspace(rank: int, seed: int, base: Tensor = BASE) -> SubspaceRotated:
    basis = torch.linalg.qr(numbers(base.shape[1], rank, seed=seed)).Q.mT
    entries = 0.4 * numbers(rank * (rank - 1) // 2, seed=seed)
    return SubspaceRotated(base, basis, rotation_update(entries, rank, "cayley"))


def reflections(count: int, seed: int, base: Tensor = BASE) -> SubspaceRotated:
    U, H = householder_factors(numbers(count, N, seed=seed))
    basis = torch.linalg.qr(U.mT).Q.mT
    return SubspaceRotated(base, basis, -basis @ U.mT @ H @ basis.mT)


def absent() -> LowRank:
    return LowRank(torch.zeros(M, 0, dtype=torch.float64), torch.zeros(0, N, dtype=torch.float64))


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()


def turn_of(delta: Delta) -> Tensor:
    """The n x n matrix with ``W + delta = W C``, for an invertible or tall W of the delta's own."""
    if isinstance(delta, SubspaceRotated):
        return torch.eye(N, dtype=torch.float64) + delta.basis.mT @ delta.update @ delta.basis
    assert isinstance(delta, Rotated)
    eye = torch.eye(delta.update.shape[-1], dtype=torch.float64)
    blocks = list(delta.update + eye)
    return torch.block_diag(*(blocks * (N // (len(blocks) * len(eye)))))


MATRICES: dict[str, list[Delta]] = {
    "equal ranks": [low_rank(2, seed) for seed in range(3)],
    "mixed ranks": [low_rank(rank, rank) for rank in (1, 4, 2)],
    "excess rank": [low_rank(rank, rank) for rank in (5, 6, 7)],
    "dense": [Dense(numbers(M, N, seed=seed)) for seed in range(3)],
    "mixed kinds": [low_rank(2, 1), Dense(numbers(M, N, seed=1)), rotated(4, 3)],
    "tall and dense": [Dense(numbers(40, 6, seed=seed)) for seed in range(3)],
}


def rotations(base: Tensor) -> dict[str, list[Delta]]:
    subspaces = [subspace(rank, rank, base) for rank in (2, 3, 4)]
    common = subspaces[2].basis
    return {
        "blocks": [rotated(4, seed, base) for seed in range(3)],
        "sizes that divide": [rotated(2, 1, base), rotated(4, 2, base), rotated(4, 3, base, blocks=1)],
        "sizes that do not": [rotated(4, 1, base), rotated(6, 2, base), rotated(3, 3, base)],
        "one block": [rotated(N, seed, base) for seed in range(3)],
        "subspaces": [*subspaces],
        "equal subspaces": [SubspaceRotated(base, common, subspace(4, seed).update) for seed in range(3)],
        "more than the inputs": [subspace(rank, rank, base) for rank in (5, 6, 7)],
        "reflections": [reflections(2, 1, base), reflections(4, 2, base), subspace(3, 3, base)],
        "blocks and subspaces": [rotated(4, 1, base), subspace(3, 2, base), reflections(2, 3, base)],
    }


ROTATIONS = rotations(BASE)
ANYTHING = {
    **ROTATIONS,
    "matrices": MATRICES["mixed kinds"],
    "with a rotation": [low_rank(2, 1), rotated(4, 1), subspace(2, 2)],
}
in_charts = pytest.mark.parametrize("chart", ["cayley", "log"])


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize(("name", "params"), [("ties", {"density": 0.4}), ("mean", {}), ("task_arithmetic", {})])
def test_knots_equals_the_concatenated_svd(kind: str, name: str, params: dict[str, Any]) -> None:
    deltas = MATRICES[kind]
    want = oracle.knots([delta.dense() for delta in deltas], WEIGHTS, partial(getattr(reference, name), **params))
    got = merge_deltas(deltas, method=name, space="knots", weights=WEIGHTS, **params)
    assert relative(got.dense(), want) < 1e-7
    m, n = got.shape
    assert got.rank() == min(m, n, sum(delta.rank() or n for delta in deltas))


@pytest.mark.parametrize("kind", MATRICES)
def test_knots_coordinates_keep_norms_and_deltas(kind: str) -> None:
    deltas = MATRICES[kind]
    x, decode = knots(deltas, None, torch.ones(3))
    for task, delta in zip(x, deltas, strict=True):
        assert relative(decode(task).dense(), delta.dense()) < 1e-10
        assert task.norm() == pytest.approx(delta.norm().item())


def test_knots_drops_what_is_below_the_range_at_any_scale() -> None:
    for scale in (1e-6, 1.0, 1e6):
        tiny = low_rank(1, 5).scaled(1e-9)
        x, _ = knots([low_rank(3, 1).scaled(scale), tiny.scaled(scale)], None, torch.ones(2))
        assert x.shape == (2, 3, N)


def test_knots_of_one_direction_is_no_vector() -> None:
    """A single row would mean a bias to the method."""
    delta = low_rank(1, 1)
    x, decode = knots([delta, delta], None, torch.ones(2))
    assert x.shape == (2, 2, N)
    assert relative(decode(x[0]).dense(), delta.dense()) < 1e-12


def test_knots_keeps_directions_down_to_the_end_of_the_range() -> None:
    """Its eigenvalues are squares of the singular values that count."""
    frames = [torch.linalg.qr(numbers(size, 3, seed=size)).Q for size in (M, N)]
    delta = LowRank(frames[0] * torch.tensor([1.0, 1e-4, 1e-6], dtype=torch.float64), frames[1].mT)
    x, _ = knots([delta], None, torch.ones(1))
    assert relative(torch.linalg.vector_norm(x[0], dim=1), torch.tensor([1.0, 1e-4], dtype=torch.float64)) < 1e-9


def test_core_of_one_direction_is_no_vector() -> None:
    """A single row would mean a bias to the method, and spectral methods average these."""
    delta = low_rank(1, 1)
    got = merge_deltas([delta, absent()], method="iso_c", space="core").dense()
    assert relative(got, delta.dense()) < 1e-12


def test_signs_of_singular_vectors_do_not_matter_to_ties() -> None:
    x = numbers(3, 5, 7, seed=1)
    signs = torch.tensor([1.0, -1, 1, -1, -1], dtype=torch.float64)[:, None]
    assert torch.equal(ties(signs * x, torch.ones(3)), signs * ties(x, torch.ones(3)))


@in_charts
@pytest.mark.parametrize("kind", ROTATIONS)
def test_generators_are_summed_at_their_mean_length(kind: str, chart: str) -> None:
    deltas = ROTATIONS[kind]
    want = BASE @ oracle.averaged([turn_of(delta) for delta in deltas], WEIGHTS, chart) - BASE
    got = merge_deltas(deltas, method="task_arithmetic", space="rotation", weights=WEIGHTS, base=BASE, chart=chart)
    assert relative(got.dense(), want) < 1e-9
    assert isinstance(got, Dense if kind == "blocks and subspaces" else type(deltas[0]))


@in_charts
@pytest.mark.parametrize("kind", ROTATIONS)
def test_a_negative_weight_turns_back(kind: str, chart: str) -> None:
    delta = ROTATIONS[kind][0]
    got = merge_deltas([delta], method="task_arithmetic", space="rotation", weights=[-1.0], base=BASE, chart=chart)
    assert relative(got.dense(), BASE @ turn_of(delta).mT - BASE) < 1e-9


def test_rotations_of_different_kinds_leave_no_residual() -> None:
    """Not even rounding, which a method would merge as if it were a change."""
    x, _ = rotation([rotated(3, 1), subspace(4, 2)], BASE, torch.ones(2))
    assert x.shape == (2, M, N)
    assert not x.any()


@pytest.mark.parametrize("kind", ["blocks", "one block"])
def test_entrywise_methods_see_the_entries_of_oft(kind: str) -> None:
    """TIES on OFT's own parameters, the entries above the diagonals, then the length."""
    deltas = ROTATIONS[kind]
    size = deltas[0].update.shape[-1]  # type: ignore[attr-defined]
    rows, cols = torch.triu_indices(size, size, 1)
    own = [skew(0.4 * numbers(N // size, size * (size - 1) // 2, seed=seed), size)[:, rows, cols] for seed in range(3)]
    merged = reference.ties(own, [1.0] * 3, density=0.3)
    merged = merged * sum(x.norm() for x in own) / 3 / merged.norm()
    want = Rotated(BASE, rotation_update(merged, size, "cayley")).dense()
    got = merge_deltas(deltas, method="ties", space="rotation", base=BASE, density=0.3)
    assert relative(got.dense(), want) < 1e-9


@pytest.mark.parametrize("method", ["task_arithmetic", "mean", "ties"])
@in_charts
@pytest.mark.parametrize("kind", ROTATIONS)
def test_rotations_stay_orthogonal(kind: str, chart: str, method: str) -> None:
    square = numbers(N, N, seed=4)
    got = merge_deltas(rotations(square)[kind], method=method, space="rotation", base=square, chart=chart)
    turned = torch.linalg.solve(square, square + got.dense())
    assert (turned.mT @ turned - torch.eye(N)).norm() < (1e-10 if kind != "blocks and subspaces" else 1e-9)


@pytest.mark.parametrize("conflict", [False, True])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_other_changes_are_decoupled(method: str, conflict: bool) -> None:
    """The plain Procrustes rotation, on a weight that sees all inputs well."""
    base = numbers(60, N, seed=1)
    deltas = [low_rank(3, seed, 60).scaled(0.2) for seed in range(3)]
    merge = getattr(reference, method)
    want = oracle.decoupled(base, [delta.dense() for delta in deltas], WEIGHTS, merge, conflict)
    got = merge_deltas(deltas, method=method, space="rotation", weights=WEIGHTS, base=base, conflict=conflict)
    assert relative(got.dense(), want) < 1e-9


def test_residuals_have_a_scale_of_their_own() -> None:
    deltas = MATRICES["mixed ranks"]
    at = {
        scale: merge_deltas(deltas, method="mean", space="rotation", base=BASE, residual_scale=scale).dense()
        for scale in (0.0, 0.2, 1.0)
    }
    assert relative(at[0.2], 0.8 * at[0.0] + 0.2 * at[1.0]) < 1e-12
    assert relative(at[0.0], at[1.0]) > 1e-2


@pytest.mark.parametrize("shape", [(64, 64), (40, 64), (90, 64)])
@pytest.mark.parametrize("size", [0.003, 0.1, 0.5])
def test_unseen_inputs_are_not_reflected(shape: tuple[int, int], size: float) -> None:
    """All turns stay below 90 degrees, where the plain solution turns by 180, and the residual is hardly larger."""
    base, change = numbers(*shape, seed=1), numbers(*shape, seed=2)
    change = change * size * base.norm() / change.norm()
    eye = torch.eye(shape[1], dtype=torch.float64)
    R = eye + procrustes(base.T @ base, base.T @ change)
    assert (R.T @ R - eye).norm() < 1e-10
    assert torch.linalg.eigvals(R).angle().abs().max() < math.pi / 2
    plain = oracle.procrustes(base, base + change)
    left = [(base + change - base @ rotation).norm() / change.norm() for rotation in (R, plain)]
    assert left[1] <= left[0] + 1e-12 < left[1] + 0.05
    if shape == (40, 64):
        assert torch.linalg.eigvals(plain).angle().abs().max() > 0.9 * math.pi


def test_a_weight_of_zeros_does_not_turn() -> None:
    zeros = torch.zeros(4, 6, dtype=torch.float64)
    assert procrustes(zeros.T @ zeros, zeros.T @ zeros).abs().max() == 0


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_the_number_of_threads_does_not_matter(threads: int) -> None:
    base, deltas = numbers(100, 160, seed=1).float(), [low_rank(4, seed, 100, 160).upcast() for seed in range(2)]
    deltas = [LowRank(delta.B.float(), delta.A.float()) for delta in deltas]
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(merge_deltas(deltas, method="task_arithmetic", space="rotation", base=base).dense())
    assert relative(*results) < 1e-6


@pytest.mark.parametrize("method", ["task_arithmetic", "mean", "opcm"])
@in_charts
@pytest.mark.parametrize("kind", ANYTHING)
def test_one_source_gives_itself(kind: str, chart: str, method: str) -> None:
    for delta in ANYTHING[kind]:
        got = merge_deltas([delta], method=method, space="rotation", base=BASE, chart=chart)
        assert relative(got.dense(), delta.dense()) < 1e-9


@pytest.mark.parametrize("kind", ANYTHING)
def test_a_zero_source_and_the_order_change_nothing(kind: str) -> None:
    deltas, merge = ANYTHING[kind], partial(merge_deltas, method="task_arithmetic", space="rotation", base=BASE)
    want = merge(deltas, weights=WEIGHTS).dense()
    assert relative(merge([deltas[0], absent(), *deltas[1:]], weights=[0.5, 7.0, 2.0, 1.5]).dense(), want) < 1e-9
    assert relative(merge(deltas[::-1], weights=WEIGHTS[::-1]).dense(), want) < 1e-9


def test_zeros_merge_to_zero() -> None:
    for deltas in ([absent()] * 2, [Dense(torch.zeros(M, N, dtype=torch.float64))] * 2):
        assert merge_deltas(deltas, method="ties", space="rotation", base=BASE).dense().abs().max() == 0
    still = Rotated(BASE, torch.zeros(3, 4, 4, dtype=torch.float64))
    opposite = Rotated(BASE, rotated(4, 1).update.mT)
    for deltas in ([still, still], [rotated(4, 1), opposite]):
        assert merge_deltas(deltas, method="mean", space="rotation", base=BASE).dense().abs().max() < 1e-12


@pytest.mark.parametrize("kind", ANYTHING)
def test_weights_stored_inputs_first(kind: str) -> None:
    want = merge_deltas(ANYTHING[kind], method="mean", space="rotation", base=BASE).dense().mT
    flipped = [delta.transposed() for delta in ANYTHING[kind]]
    if any(isinstance(delta, Transposed) for delta in flipped):
        got = merge_deltas(flipped, method="mean", space="rotation", base=BASE.mT)
        assert relative(got.dense(), want) < 1e-12


def test_a_series_of_even_degree_is_read_as_the_nearest_rotation() -> None:
    S = skew(0.1 * numbers(3, 6, seed=1), 4)
    even = 2 * S + 2 * S @ S + 2 * S @ S @ S + S @ S @ S @ S
    got = merge_deltas([Rotated(BASE, even)], method="mean", space="rotation", base=BASE)
    assert isinstance(got, Rotated)
    eye = torch.eye(4, dtype=torch.float64)
    turned = got.update + eye
    assert (turned.mT @ turned - eye).norm() < 1e-12
    nearest = torch.stack([oracle.procrustes(eye, eye + block) for block in even])
    assert relative(turned, nearest) < 1e-12
    far = Rotated(BASE, series_update(8 * S, 3))  # far from a rotation: its residual is kept instead
    assert relative(merge_deltas([far], method="mean", space="rotation", base=BASE).dense(), far.dense()) < 1e-9


def test_rotations_of_another_weight_are_decoupled() -> None:
    other = rotated(4, 1, base=BASE + 0.1)
    got = merge_deltas([other], method="mean", space="rotation", base=BASE)
    assert isinstance(got, Dense)
    assert relative(got.dense(), other.dense()) < 1e-9


@pytest.mark.parametrize(
    ("deltas", "arguments", "message"),
    [
        ([rotated(4, 1)], {"base": None}, r"^space 'rotation' turns the base weight, and none was given: pass base=$"),
        ([reflections(3, 1)], {}, r"^space 'rotation' has no coordinates for a reflection or a turn by 180 degrees"),
        ([rotated(4, 1), reflections(1, 1)], {}, r"an odd number of reflections, say"),
        ([rotated(4, 1)], {"chart": "lgo"}, r"unknown value of parameter 'chart' of space 'rotation' 'lgo', .* 'log'"),
        ([rotated(4, 1)], {"conflicts": True}, r"^method 'mean' has no parameters, got 'conflicts'"),
    ],
)
def test_what_cannot_be_rotated_is_told_in_one_line(deltas: list[Delta], arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        merge_deltas(deltas, **{"method": "mean", "space": "rotation", "base": BASE, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "delta", [low_rank(3, 1), Dense(numbers(M, N, seed=1)), rotated(4, 1), subspace(3, 1), subspace(3, 1).transposed()]
)
def test_deltas_by_rows_and_transposed(delta: Delta) -> None:
    assert relative(delta.rows(2, 7), delta.dense()[2:7]) < 1e-12
    assert relative(delta.transposed().dense(), delta.dense().mT) < 1e-12
    assert delta.transposed().shape == delta.shape[::-1]
    assert type(delta.transposed().transposed()) is type(delta)
    assert relative(delta.transposed().scaled(2.0).dense(), 2 * delta.dense().mT) < 1e-12
    assert delta.transposed().norm() == pytest.approx(delta.dense().norm().item())
    assert delta.transposed().rank() == delta.rank()
