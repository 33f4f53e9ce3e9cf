"""The entrywise and the geometric methods: what the contract suite cannot say, worked by hand or against oracles."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import reference_entrywise as oracles
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_cases import relative
from peft.utils import merge_utils
from torch import Tensor

from orthoft.delta import Dense
from orthoft.merging import METHODS, merge_deltas
from orthoft.merging.methods import get_method
from orthoft.merging.methods.della import keep_probability
from orthoft.merging.methods.entrywise import kth_largest, kth_magnitude, uniform

GEOMETRIC = ("slerp", "multislerp", "karcher")


def some_tasks(tasks: int = 3, shape: tuple[int, int] = (12, 10), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tasks, *shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)


def merge(name: str, x: Tensor, weights: list[float] | None = None, seed: int = 0, **params: Any) -> Tensor:
    """Call the method itself, on all of ``x`` at once."""
    found = get_method(name)
    extras = {"base": params.pop("base")} if "base" in params else {}
    if found.needs("generator"):
        extras["generator"] = torch.Generator().manual_seed(seed)
    return found.merge(x, torch.tensor(weights or [1.0] * len(x)), **found.bind(params), **extras)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=40), st.data(), st.booleans())
def test_selection_is_exact_among_equals(numbers: list[int], data: st.DataObject, double: bool) -> None:
    k = data.draw(st.integers(1, len(numbers)))
    x = torch.tensor(numbers, dtype=torch.float64 if double else torch.float32)
    before = x.clone()
    assert kth_largest(x, k) == sorted(numbers, reverse=True)[k - 1]
    assert kth_magnitude(x, k) == sorted(map(abs, numbers), reverse=True)[k - 1]
    assert torch.equal(x, before)


def test_selection_takes_any_layout() -> None:
    x = some_tasks(1, (300, 40))[0].mT[::3]
    assert kth_magnitude(x, 100) == x.abs().flatten().sort(descending=True).values[99]
    assert kth_magnitude(x[:0], 1) == 0


@pytest.mark.parametrize("name", ["ties", "magnitude", "breadcrumbs", "dare", "della"])
def test_slices_of_rows_give_the_whole(name: str) -> None:
    """Each slice with what was prepared of whole tasks, and random numbers in order: the same numbers exactly."""
    found, x, weights = METHODS[name], some_tasks(), torch.tensor([1.0, -0.5, 2.0])
    params = found.bind({"consensus": "mean"} if name != "magnitude" else {})
    extras: dict[str, Any] = {}
    if found.prepare is not None:
        extras["prepared"] = torch.stack([found.prepare(task, **params) for task in x])
    if found.needs("generator"):
        extras["generator"] = torch.Generator().manual_seed(0)
    slices = [found.merge(rows, weights, **params, **extras) for rows in torch.split(x, [5, 1, 6], dim=1)]
    assert torch.equal(torch.cat(slices), merge(name, x, weights.tolist(), **params))


TWO_OF_THREE = [[[4.0, 1.0, -2.0, 0.0]], [[2.0, -3.0, 2.0, 0.0]], [[-3.0, -1.0, 0.0, 0.0]]]


@pytest.mark.parametrize(
    ("consensus", "weights", "want"),
    [
        ("mean", [1, 1, 1], [3.0, -2.0, 0.0, 0.0]),
        ("sum", [1, 1, 1], [6.0, -4.0, 0.0, 0.0]),
        ("weighted_mean", [1, 1, 1], [3.0, -2.0, 0.0, 0.0]),
        ("mean", [1, 2, 1], [4.0, -3.5, 4.0, 0.0]),
        ("weighted_mean", [1, 2, 1], [8 / 3, -7 / 3, 2.0, 0.0]),
        ("mean", [1, 0, 2], [-6.0, -2.0, -2.0, 0.0]),
        ("weighted_mean", [1, 0, 2], [-3.0, -1.0, -2.0, 0.0]),
    ],
)
def test_ties_elects_by_the_weighted_sum(consensus: str, weights: list[float], want: list[float]) -> None:
    got = merge("ties", torch.tensor(TWO_OF_THREE), weights, density=1.0, consensus=consensus)
    torch.testing.assert_close(got, torch.tensor([want]))


def test_ties_keeps_all_that_equal_the_smallest_kept() -> None:
    x = torch.tensor([[[3.0, -1.0, 1.0, 0.5, -1.0]]])
    assert merge("ties", x, density=0.4).tolist() == [[3.0, -1.0, 1.0, 0.0, -1.0]]
    assert merge("ties", x, density=0.2).tolist() == [[3.0, 0.0, 0.0, 0.0, 0.0]]
    assert torch.equal(merge("ties", x, density=0.01), merge("ties", x, density=0.2))


@pytest.mark.parametrize("consensus", ["weighted_mean", "sum"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 1.5], [0.0, 1.0, 3.0]])
def test_consensus_equals_the_oracle(consensus: str, weights: list[float]) -> None:
    x = some_tasks()
    trimmed = oracles.scaled([oracles.trimmed(task.double(), 0.4) for task in x], weights)
    got = merge("ties", x, weights, density=0.4, consensus=consensus)
    assert relative(got, oracles.agreed(trimmed, weights, consensus)) < 1e-6


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9])
def test_dare_divides_by_exactly_what_is_kept_on_average(drop: float) -> None:
    x = some_tasks(1, (200, 300))
    got = merge("dare", x, drop=drop)
    kept = got != 0
    assert torch.equal(got[kept], x[0][kept] / (1 - drop))
    assert abs(kept.double().mean() - (1 - drop)) < 5 * math.sqrt(drop * (1 - drop) / x.numel())


@pytest.mark.parametrize(("name", "params"), [("dare", {"drop": 0.7}), ("della", {"consensus": None})])
def test_pruning_at_random_keeps_the_expectation(name: str, params: dict[str, Any]) -> None:
    x, weights, draws = some_tasks(2, (6, 5), torch.float64), [2.0, -1.0], 4000
    total = sum(merge(name, x, weights, seed, **params) for seed in range(draws))
    want = oracles.scaled(x, weights)
    variance = sum(task.square() / 0.3 for task in want)  # at least: the smallest probability is 0.3 or more
    assert ((total / draws - sum(want)).abs() < 5 * (variance / draws).sqrt()).all()


@pytest.mark.parametrize("name", ["dare", "della"])
def test_draws_depend_on_the_seed_alone(name: str) -> None:
    x = some_tasks()
    first = merge(name, x, seed=1)
    torch.rand(3)  # the global generator plays no part
    assert torch.equal(merge(name, x, seed=1), first)
    assert not torch.equal(merge(name, x, seed=2), first)
    assert torch.equal(merge(name, x.double(), seed=1) != 0, first != 0)


def test_draws_of_the_tasks_are_independent() -> None:
    numbers = uniform(torch.empty(2, 100, 100), torch.Generator().manual_seed(0)).flatten(1)
    assert abs(torch.corrcoef(numbers)[0, 1]) < 0.05


def test_della_keeps_by_rank() -> None:
    x = torch.tensor([[[3.0, -1.0, 0.0, -7.0, 2.0]]])
    want = torch.tensor([[[0.6, 0.4, 0.3, 0.7, 0.5]]])
    torch.testing.assert_close(keep_probability(x, 0.5, 0.2), want)
    torch.testing.assert_close(keep_probability(x[..., :1], 0.5, 0.2), torch.tensor([[[0.5]]]))
    got = merge("della", x, epsilon=0.2, seed=1)
    assert got.any()
    torch.testing.assert_close(got[got != 0], (x / want)[0][got != 0])


def test_breadcrumbs_drops_both_ends() -> None:
    x = torch.tensor([[[9.0, -8.0, 7.0, -6.0, 5.0, -4.0, 3.0, -2.0, 1.0, 0.5]]])
    assert merge("breadcrumbs", x, density=0.5, gamma=0.2).tolist() == [[0, 0, 7, -6, 5, -4, 3, 0, 0, 0]]
    assert merge("breadcrumbs", x, density=0.9, gamma=0.5).tolist() == [[0, -8, 7, -6, 5, -4, 3, -2, 1, 0.5]]
    assert torch.equal(merge("breadcrumbs", torch.ones(1, 2, 5), density=0.1, gamma=0.1), torch.ones(2, 5))


def test_sce_weighs_tasks_by_their_energy() -> None:
    x = torch.tensor([[[3.0, 1.0, 0.0]], [[1.0, -2.0, 0.0]]])  # energies 10 : 5
    torch.testing.assert_close(merge("sce", x), torch.tensor([[35 / 15, -2.0, 0.0]]))
    torch.testing.assert_close(merge("sce", x, density=0.5), torch.tensor([[0.0, -2.0, 0.0]]))  # 1 of 2 that vary
    same = torch.cat([x, torch.ones(2, 1, 3)], 2)  # the share is of the entries that vary, two of six
    torch.testing.assert_close(merge("sce", same, density=0.5), torch.tensor([[0.0, -2.0, 0.0, 0.0, 0.0, 0.0]]))
    x = some_tasks(1)
    for tasks in (x, x.expand(7, -1, -1)):  # nothing varies: all are equally good
        torch.testing.assert_close(merge("sce", tasks, density=0.1), x[0])


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_pcb_merges_as_many_entries_as_said(density: float) -> None:
    x = some_tasks(1, (10, 20))
    want = torch.where(x[0].abs() >= kth_magnitude(x, int(200 * density)), x[0], 0.0)
    if density == 1.0:
        want[want.abs() == want.abs().min()] = 0.0  # has the score 0
    assert relative(merge("pcb", x, density=density, clip=0.0), want) < 1e-6


def test_pcb_of_single_numbers() -> None:
    numbers = torch.tensor([2.0, 4.0, 0.0]).reshape(3, 1, 1)
    assert merge("pcb", numbers).item() == 3.0
    assert merge("pcb", torch.zeros(2, 1, 1)).item() == 0.0


def test_slerp_of_a_right_angle() -> None:
    x = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]])
    third = torch.tensor([[math.sqrt(3), 1.0]])  # 30 of 90 degrees
    torch.testing.assert_close(merge("slerp", x, t=1 / 3), third)
    torch.testing.assert_close(merge("slerp", x, [2.0, 1.0]), third)
    torch.testing.assert_close(merge("slerp", x), torch.full((1, 2), math.sqrt(2)))
    torch.testing.assert_close(merge("slerp", x, t=1.0), x[1])


@pytest.mark.parametrize("other", [[[0.0, 0.0]], [[3.0, 1e-4]], [[-3.0, 1e-4]]], ids=["zero", "parallel", "opposite"])
def test_slerp_is_a_line_where_there_is_no_arc(other: list[list[float]]) -> None:
    x = torch.tensor([[[1.0, 0.0]], other])
    torch.testing.assert_close(merge("slerp", x, t=0.25), 0.75 * x[0] + 0.25 * x[1])


@pytest.mark.parametrize("name", GEOMETRIC)
@pytest.mark.parametrize("size", [1.0, 0.02])
def test_on_weights_equals_the_oracle(name: str, size: float) -> None:
    x, weights = size * some_tasks(2), [0.5, 2.0]
    base = torch.randn(12, 10, generator=torch.Generator().manual_seed(1))
    tasks = [task.double() for task in x]
    want = getattr(oracles, name)(tasks, weights, on="weights", base=base.double())
    assert relative(merge(name, x, weights, on="weights", base=base), want) < 1e-5
    merged = merge_deltas([Dense(task) for task in x], method=name, on="weights", base=base, weights=weights)
    assert relative(merged.dense(), want) < 1e-5


@pytest.mark.parametrize("name", GEOMETRIC)
def test_weights_of_directions_are_relative(name: str) -> None:
    x = some_tasks(2)
    torch.testing.assert_close(merge(name, x, [1.0, 3.0]), merge(name, x, [2.0, 6.0]))
    torch.testing.assert_close(merge(name, x, [1.0, 0.0]), x[0])


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
def test_directions(name: str) -> None:
    x = some_tasks(2)
    equal = torch.stack([task / task.norm() for task in x])
    torch.testing.assert_close(merge(name, equal), merge("slerp", equal))  # half way on one arc
    zero = torch.zeros_like(x[:1])
    torch.testing.assert_close(merge(name, torch.cat([x, zero])), 2 / 3 * merge(name, x))  # a norm, no direction
    torch.testing.assert_close(merge(name, torch.stack([x[0], -x[0]]), [3.0, 1.0]), x[0])
    opposite = torch.stack([2 * x[0], -x[0]])
    torch.testing.assert_close(merge(name, opposite), 0.5 * x[0])  # no mean direction: the mean
    assert not merge(name, torch.zeros(2, 3, 3)).any()


def test_karcher_is_where_the_pulls_balance() -> None:
    """The mean of the logarithms is zero there, and not at the mean direction, where Multi-SLERP stays."""
    units = torch.stack([task / task.norm() for task in some_tasks(3, dtype=torch.float64).abs()])
    units[2] = units[2] - 1.5 * units[0]
    units[2] /= units[2].norm()

    def pull(mean: Tensor) -> float:
        cosines = [(unit * mean).sum() for unit in units]
        logs = [(unit - c * mean) * (c.acos() / c.acos().sin()) for unit, c in zip(units, cosines, strict=True)]
        return (sum(logs[1:], logs[0]) / 3).norm().item()

    assert pull(merge("karcher", units)) < 1e-6
    assert pull(merge("multislerp", units)) > 1e-3
    assert pull(merge("karcher", units, max_iter=1)) > 1e-6


def test_model_stock_at_sixty_degrees() -> None:
    x = torch.tensor([[[2.0, 0.0]], [[1.0, math.sqrt(3)]]])
    torch.testing.assert_close(merge("model_stock", x), 2 / 3 * x.mean(0))
    torch.testing.assert_close(merge("model_stock", torch.cat([x, torch.zeros(1, 1, 2)])), 4 / 9 * x.mean(0))
    assert not merge("model_stock", x, [1.0, -1.0]).any()
    assert not merge("model_stock", torch.stack([x[0], -x[0]])).any()
    torch.testing.assert_close(merge("model_stock", x[:1], [0.5]), 0.5 * x[0])


def test_model_stock_of_rows_is_that_of_each_row() -> None:
    x = some_tasks(3, (130, 4))
    want = torch.cat([merge("model_stock", x[:, i : i + 1]) for i in range(130)])
    torch.testing.assert_close(merge("model_stock", x, filter_wise=True), want)


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_agrees_with_peft(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT elects before it weighs: the weights of its TIES are 1 here. Its random masks are made to be ours."""
    x, ones, weights = some_tasks(), [1.0] * 3, [0.5, 2.0, -1.5]
    ties = merge_utils.ties(list(x), torch.ones(3), density)
    torch.testing.assert_close(merge("ties", x, density=density), ties, rtol=1e-6, atol=1e-7)
    pruned = merge_utils.magnitude_prune(list(x), torch.tensor(weights), density)
    torch.testing.assert_close(merge("magnitude", x, weights, density=density), pruned, rtol=1e-6, atol=1e-7)
    pairs = ((merge_utils.dare_linear, weights, None), (merge_utils.dare_ties, ones, "mean"))
    for theirs, factors, consensus in pairs:
        numbers = iter(uniform(x, torch.Generator().manual_seed(0)))
        monkeypatch.setattr(torch, "bernoulli", lambda keep, numbers=numbers: (next(numbers) >= 1 - keep).float())
        got = merge("dare", x, factors, drop=1 - density, consensus=consensus)
        torch.testing.assert_close(got, theirs(list(x), torch.tensor(factors), density), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("magnitude", {"density": 1.5}, "density is the share of entries kept, in (0, 1], got 1.5"),
        ("sce", {"density": 0}, "density is the share of entries kept, in (0, 1], got 0"),
        ("ties", {"consensus": "meen"}, "unknown value of parameter 'consensus' of method 'ties' 'meen'"),
        ("ties", {"consensus": "weighted_mean", "weights": [1, -1]}, "needs weights of 0 or more, got [1.0, -1.0]"),
        ("dare", {"drop": 1.0}, "drop is the probability with which an entry is dropped, in [0, 1), got 1.0"),
        ("della", {"density": 0.1}, "in (0, 1], got density 0.1 and epsilon 0.15"),
        ("della", {"density": 0.9}, "in (0, 1], got density 0.9 and epsilon 0.15"),
        ("breadcrumbs", {"gamma": 1.0}, "gamma is the share of the largest entries dropped, in [0, 1), got 1.0"),
        ("pcb", {"clip": 0.5}, "clip is the share of entries clipped at either end, in [0, 0.5), got 0.5"),
        ("slerp", {"tasks": 3}, "method 'slerp' takes two sources, got 3: take 'multislerp' or 'karcher' for others"),
        ("slerp", {"t": 2.0}, "t is the place between the two sources, in [0, 1], got 2.0"),
        ("slerp", {"t": 0.5, "weights": [1, 2]}, "t and weights both say how far to go to the second source"),
        ("slerp", {"on": "weights"}, "on='weights' needs the weight itself: give base, or take on='deltas'"),
        ("multislerp", {"weights": [1, -1]}, "method 'multislerp' takes relative weights, 0 or more and not all zero"),
        ("karcher", {"weights": [0, 0]}, "method 'karcher' takes relative weights, 0 or more and not all zero"),
        ("karcher", {"tol": 0.0}, "karcher takes max_iter from 1 on and tol (in radians) above 0, got 100 and 0.0"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(name: str, params: dict[str, Any], message: str) -> None:
    tasks, others = params.get("tasks", 2), {key: params[key] for key in params if key != "tasks"}
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        merge_deltas([Dense(task) for task in some_tasks(tasks)], method=name, **others)
    assert "\n" not in str(caught.value)
