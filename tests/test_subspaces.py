"""Subspaces that keep tasks apart: each against what it must minimise, maximise or leave at zero, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from orthoft.delta import LowRank, SubspaceRotated
from orthoft.linalg import cayley_update, orthonormal_rows, skew
from orthoft.merging import merge_deltas
from orthoft.merging.reports.measures import cross_talk
from orthoft.recipes.subspaces import (
    contrastive,
    mean_of_others,
    mutually_orthogonal,
    orthogonal,
    osrm,
    principal,
)

N, R = 12, 3


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(seed: int, rows: int = 40) -> Tensor:
    """Inputs of a task (rows, N): correlated, of unlike variances, and not centred."""
    return drawn(rows, N, seed=seed) @ drawn(N, N, seed=seed + 100) + drawn(N, seed=seed + 200)


def covariance(x: Tensor) -> Tensor:
    return x.mT @ x / len(x)


def frames(count: int) -> list[Tensor]:
    return [orthonormal_rows(drawn(R, N, seed=1000 + seed)) for seed in range(count)]


def is_orthonormal(rows: Tensor) -> bool:
    return torch.allclose(rows @ rows.mT, torch.eye(len(rows), dtype=rows.dtype), rtol=0, atol=1e-12)


def test_osrm_disturbs_the_others_least() -> None:
    x = inputs(0)
    A = osrm(covariance(x), R)
    assert is_orthonormal(A)
    disturbance = (x @ A.mT).square().sum() / len(x)
    singular = torch.linalg.svdvals(x).square() / len(x)
    torch.testing.assert_close(disturbance, singular[-R:].sum(), rtol=1e-9, atol=0)
    for frame in [*frames(200), *(orthonormal_rows(A + 0.01 * drawn(R, N, seed=s)) for s in range(50))]:
        assert (x @ frame.mT).square().sum() / len(x) >= disturbance


def test_osrm_leaves_alone_what_the_others_do_not_use() -> None:
    x = inputs(0) @ orthonormal_rows(drawn(N - R, N)).mT @ orthonormal_rows(drawn(N - R, N))
    assert (x @ osrm(covariance(x), R).mT).abs().max() < 1e-6 * x.abs().max()


def quotient(A: Tensor, own: Tensor, M: Tensor) -> float:
    return float(torch.linalg.solve(A @ M @ A.mT, A @ own @ A.mT).trace())


@pytest.mark.parametrize("ridge", [1e-3, 1e-2, 1.0])
def test_contrastive_maximises_the_quotient(ridge: float) -> None:
    own, others = covariance(inputs(0)), covariance(inputs(1))
    A = contrastive(own, others, R, ridge)
    M = others + ridge * torch.linalg.eigvalsh(others).mean() * torch.eye(N, dtype=torch.float64)
    best = quotient(A, own, M)
    generalised = torch.linalg.eigvals(torch.linalg.solve(M, own)).real.sort(descending=True).values
    assert best == pytest.approx(float(generalised[:R].sum()), rel=1e-8)
    for frame in [*frames(200), *(A + 0.01 * A.norm() * drawn(R, N, seed=s) for s in range(50))]:
        assert quotient(frame, own, M) <= best * (1 + 1e-10)


def test_contrastive_rows_are_orthogonal_and_read_with_unit_rms() -> None:
    x = inputs(0)
    A = contrastive(covariance(x), covariance(inputs(1)), R)
    assert (x @ A.mT).square().mean() == pytest.approx(1, rel=1e-12)
    gram = A @ A.mT
    assert is_orthonormal(A / gram[0, 0].sqrt())


def test_contrastive_does_not_depend_on_the_scales_of_the_inputs() -> None:
    own, others = covariance(inputs(0)), covariance(inputs(1))
    A, B = contrastive(own, others, R), contrastive(9 * own, 4 * others, R)
    torch.testing.assert_close(A, 3 * B, rtol=1e-8, atol=1e-10)


def test_more_inputs_than_rows_of_data_are_no_obstacle() -> None:
    A = contrastive(covariance(inputs(0, rows=4)), covariance(inputs(1, rows=4)), R)
    assert A.isfinite().all()
    assert (inputs(0, rows=4) @ A.mT).square().mean() == pytest.approx(1)


def test_others_are_all_but_the_task_and_general_text_is_one_of_them() -> None:
    own = [covariance(inputs(seed)) for seed in range(3)]
    torch.testing.assert_close(mean_of_others(own, 1), (own[0] + own[2]) / 2)
    torch.testing.assert_close(mean_of_others(own[:1], 0, own[1]), own[1])
    torch.testing.assert_close(mean_of_others(own[:2], 0, own[2]), (own[1] + own[2]) / 2)


def slices(ranks: list[int], n: int = N) -> list[Tensor]:
    return orthogonal(ranks, n, torch.Generator().manual_seed(7))


def test_slices_of_one_basis_have_no_cross_talk() -> None:
    rows = slices([3, 0, 4, 5])
    assert [len(part) for part in rows] == [3, 0, 4, 5]
    assert is_orthonormal(torch.cat(rows))
    talk = cross_talk([part for part in rows if len(part)])
    assert (talk - talk.diag().diag()).abs().max() < 1e-14


def test_a_slice_does_not_move_when_tasks_follow() -> None:
    first, second = slices([3, 2])
    for later in (slices([3, 2, 4]), slices([3, 2, 1, 1])):
        torch.testing.assert_close(later[0], first, rtol=0, atol=1e-13)
        torch.testing.assert_close(later[1], second, rtol=0, atol=1e-13)
    assert not torch.allclose(orthogonal([3], N, torch.Generator().manual_seed(8))[0], first)


def test_a_merge_of_slices_keeps_each_task_on_its_own_inputs() -> None:
    rows = slices([3, 4])
    deltas = [LowRank(drawn(5, len(A), seed=s).float(), A.float()) for s, A in enumerate(rows)]
    merged = merge_deltas(deltas, method="task_arithmetic").dense()
    for delta, A in zip(deltas, rows, strict=True):
        torch.testing.assert_close(merged @ A.float().mT, delta.dense() @ A.float().mT, rtol=1e-5, atol=1e-5)


def test_the_principal_subspace_is_dealt_out_in_turn() -> None:
    weight = drawn(9, N)
    V = torch.linalg.svd(weight).Vh
    first, none, second = principal([3, 0, 2], weight)
    assert none.shape == (0, N)
    for rows, places in ((first, [0, 2, 4]), (second, [1, 3])):
        torch.testing.assert_close((rows @ V[places].mT).abs(), torch.eye(len(places), dtype=torch.float64))


def test_mutually_orthogonal_rows_are_the_nearest() -> None:
    rows = [drawn(2, N, seed=1), drawn(R, N, seed=2)]
    made = torch.cat(mutually_orthogonal(rows))
    assert is_orthonormal(made)
    unit = torch.nn.functional.normalize(torch.cat(rows), dim=1)
    distance = (made - unit).norm()
    assert distance == pytest.approx(float((torch.linalg.svdvals(unit) - 1).norm()), rel=1e-9)
    for seed in range(50):
        turned = made + made @ cayley_update(skew(0.1 * drawn(N * (N - 1) // 2, seed=seed), N))
        assert (turned - unit).norm() >= distance


def turning(count: int) -> tuple[Tensor, list[SubspaceRotated], Tensor]:
    """A weight, its rotations in mutually orthogonal subspaces, and the weight that all of them have turned."""
    weight = drawn(7, N, seed=5)
    product, deltas = weight, []
    for task, V in enumerate(mutually_orthogonal([drawn(R, N, seed=task) for task in range(count)])):
        update = cayley_update(skew(0.5 * (task + 1) * drawn(R * (R - 1) // 2, seed=10 + task), R))
        deltas.append(SubspaceRotated(weight, V, update))
        product = product + product @ V.mT @ update @ V
    return weight, deltas, product


@pytest.mark.parametrize("space", ["auto", "full", "core", "knots"])
def test_rotations_of_orthogonal_subspaces_add_up_to_their_product(space: str) -> None:
    weight, deltas, product = turning(4)
    merged = merge_deltas(deltas, method="task_arithmetic", space=space, base=weight).dense()
    torch.testing.assert_close(weight + merged, product, rtol=0, atol=1e-12)
    reverse = merge_deltas(deltas[::-1], method="task_arithmetic", space=space, base=weight).dense()
    torch.testing.assert_close(reverse, merged, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chart", ["cayley", "log"])
def test_the_rotation_space_has_the_product_at_another_length(chart: str) -> None:
    """OrthoMerge scales the merged generator to the tasks' mean length; orthogonal ones add up to a longer one."""
    weight, deltas, product = turning(2)
    lengths = []
    for delta in deltas:
        angles = torch.linalg.eigvals(delta.update + torch.eye(R, dtype=torch.float64)).angle()
        lengths.append(float((angles if chart == "log" else (angles / 2).tan()).norm()))
    longer = math.hypot(*lengths) / (sum(lengths) / 2)

    def merged(weights: list[float]) -> Tensor:
        arguments = {"space": "rotation", "chart": chart, "base": weight, "weights": weights}
        return weight + merge_deltas(deltas, method="task_arithmetic", **arguments).dense()

    torch.testing.assert_close(merged([longer, longer]), product, rtol=0, atol=1e-9)
    assert (merged([1, 1]) - product).norm() > 1e-2 * product.norm()


MISTAKES = [
    (lambda: osrm(torch.eye(4), 5), "4 inputs have subspaces of 1 to 4 dimensions, not 5"),
    (lambda: osrm(torch.eye(4), 0), "of 1 to 4 dimensions, not 0"),
    (lambda: contrastive(torch.eye(4), torch.eye(4), 5), "of 1 to 4 dimensions, not 5"),
    (lambda: contrastive(torch.eye(4), torch.eye(4), 2, 0), "ridge must be positive"),
    (lambda: contrastive(torch.eye(4), torch.eye(4), 2, math.nan), "ridge must be positive"),
    (lambda: contrastive(torch.zeros(4, 4), torch.eye(4), 2), "inputs that are not all zero"),
    (lambda: contrastive(torch.eye(4), torch.zeros(4, 4), 2), "inputs that are not all zero"),
    (lambda: mean_of_others([torch.eye(4)], 0), "inputs of another task, or of general text"),
    (lambda: slices([3, 2], 4), "3 \\+ 2 orthogonal directions do not fit 4 inputs"),
    (lambda: principal([2, 2], torch.eye(3)), "2 \\+ 2 orthogonal directions do not fit 3 singular vectors"),
    (lambda: mutually_orthogonal([torch.eye(3)[:2], torch.eye(3)[1:]]), "do not fit 3 inputs"),
    (lambda: mutually_orthogonal([torch.eye(4)[:2], torch.eye(4)[1:3]]), "2 directions of 4 inputs. overlap"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_what_cannot_be_is_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert len(str(error.value).splitlines()) == 1
