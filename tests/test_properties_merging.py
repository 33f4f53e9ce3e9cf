"""What must be true of any merge, over shapes, ranks, numbers and dtypes that nobody chose."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from merging_cases import CASES, SETTINGS, base, commutes, works_in
from torch import Tensor

from orthoft.delta import Delta, Dense, LowRank
from orthoft.merging import METHODS, SPACES, merge_deltas
from orthoft.merging.weightwise import weight_generator

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
EXAMPLES = 5
EXACT = [name for name, space in SPACES.items() if space.isometric]
by_method = pytest.mark.parametrize("name", METHODS)
often = settings(max_examples=EXAMPLES, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Problem:
    """Tasks of one weight: of each its rank, or None if it is dense; entries are normal, or few and small integers."""

    m: int
    n: int
    ranks: tuple[int | None, ...]
    weights: tuple[float, ...]
    seed: int
    integers: bool

    def deltas(self, dtype: torch.dtype = torch.float64) -> list[Delta]:
        random = torch.Generator().manual_seed(self.seed)

        def drawn(*shape: int) -> Tensor:
            if self.integers:
                return torch.randint(-2, 3, shape, generator=random).to(dtype)
            return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

        return [
            Dense(drawn(self.m, self.n)) if rank is None else LowRank(drawn(self.m, rank), drawn(rank, self.n))
            for rank in self.ranks
        ]

    def merged(
        self, deltas: list[Delta], name: str, params: dict[str, Any], space: str = "full", **words: Any
    ) -> Tensor:
        given = {"weights": self.weights, "base": base((self.m, self.n), torch.float64)} | words
        return merge_deltas(deltas, method=name, space=space, **given, **params).dense()


sides = st.one_of(st.just(1), st.integers(1, 9), st.sampled_from([2, 17]))


@st.composite
def problems(draw: st.DrawFn, tasks: int | None, factored: bool = False) -> Problem:
    m, n = draw(sides), draw(sides)
    count = tasks or draw(st.integers(1, 3))
    ranks = st.integers(0, min(m, n) + 1)
    return Problem(
        m,
        n,
        tuple(draw(st.lists(ranks if factored else st.none() | ranks, min_size=count, max_size=count))),
        tuple(draw(st.lists(st.sampled_from([1.0, 0.5, 1.5, 2.0]), min_size=count, max_size=count))),
        draw(st.integers(0, 99)),
        draw(st.booleans()),
    )


def exact(deltas: list[Delta]) -> list[Delta]:
    """Return the same changes, dense and in float64."""
    return [Dense(delta.upcast(torch.float64).dense()) for delta in deltas]


def near(got: Tensor, want: Tensor, deltas: list[Delta], tolerance: float = 1e-8) -> bool:
    """Say whether two results differ by no more than a share of the largest task, before its factors cancel."""
    parts = [delta.factors() or (delta.dense(),) for delta in deltas]
    size = max(math.prod(float(part.norm()) for part in own) for own in parts)
    return got.shape == want.shape and float((got.double() - want.double()).norm()) <= tolerance * size


def settings_of(name: str) -> list[dict[str, Any]]:
    return [params for other, params in SETTINGS if other == name]


def spaces_of(name: str, params: dict[str, Any], problem: Problem) -> list[str]:
    """Return the spaces in which this can be merged."""
    without = {"core"} if None in problem.ranks else set()
    return [space for space in EXACT if works_in(name, params, space) and space not in without]


@by_method
@given(data=st.data())
@often
def test_in_float64_it_is_the_oracle(name: str, data: st.DataObject) -> None:
    problem, params = data.draw(problems(CASES[name].tasks)), data.draw(st.sampled_from(settings_of(name)))
    problem = replace(problem, integers=False)
    assume(min(problem.m, problem.n) > 1 and 0 not in problem.ranks)  # the oracles know no zeros and no ties
    deltas = exact(problem.deltas())
    words: dict[str, Any] = {"base": base((problem.m, problem.n), torch.float64)} if METHODS[name].needs("base") else {}
    if METHODS[name].needs("generator"):
        words["generator"] = weight_generator(0, "")
    want = CASES[name].oracle([delta.dense() for delta in deltas], list(problem.weights), **params, **words)
    got = problem.merged(deltas, name, params)
    assert got.dtype == torch.float64
    assert got.isfinite().all()
    assert near(got, want, deltas, 1e-6)


@by_method
@given(data=st.data())
@often
def test_factors_and_dtypes_change_nothing_but_the_rounding(name: str, data: st.DataObject) -> None:
    problem, params = data.draw(problems(CASES[name].tasks)), data.draw(st.sampled_from(settings_of(name)))
    deltas = problem.deltas(data.draw(st.sampled_from(DTYPES)))
    want = problem.merged(exact(deltas), name, params)
    for space in spaces_of(name, params, problem) if commutes(name, params) else ["full"]:
        assert near(problem.merged(deltas, name, params, space), want, deltas, 1e-4), space


@by_method
@given(data=st.data())
@often
def test_it_is_homogeneous_in_deltas_and_weights(name: str, data: st.DataObject) -> None:
    problem, params = data.draw(problems(CASES[name].tasks)), data.draw(st.sampled_from(settings_of(name)))
    deltas, c = problem.deltas(), data.draw(st.sampled_from([2.0, 2.0**-40, 2.0**40]))
    for space in spaces_of(name, params, problem):
        want = problem.merged(deltas, name, params, space)
        assert near(problem.merged([d.scaled(c) for d in deltas], name, params, space) / c, want, deltas), space
        got = problem.merged(deltas, name, params, space, weights=[c * w for w in problem.weights])
        assert near(got / c if CASES[name].weights_scale else got, want, deltas), space


@by_method
@given(data=st.data())
@often
def test_zeros_merge_to_zero_and_one_source_to_itself(name: str, data: st.DataObject) -> None:
    problem, params = data.draw(problems(CASES[name].tasks)), data.draw(st.sampled_from(settings_of(name)))
    deltas, idempotent = problem.deltas(), CASES[name].idempotent
    for space in spaces_of(name, params, problem):
        assert not problem.merged([d.scaled(0.0) for d in deltas], name, params, space).any(), space
        if idempotent is not None:
            got = problem.merged(deltas[:1], name, idempotent, space, weights=[1.0])
            assert near(got, deltas[0].dense(), deltas[:1]), space


@by_method
@given(data=st.data())
@often
def test_order_and_the_form_of_zeros_do_not_matter(name: str, data: st.DataObject) -> None:
    problem, params = data.draw(problems(CASES[name].tasks)), data.draw(st.sampled_from(settings_of(name)))
    deltas = problem.deltas()
    for space in spaces_of(name, params, problem):
        want = problem.merged(deltas, name, params, space)
        if CASES[name].symmetric:
            assert near(problem.merged(deltas[::-1], name, params, space, weights=problem.weights[::-1]), want, deltas)
        if space != "core":
            same = [Dense(delta.dense()) if delta.rank() == 0 else delta for delta in deltas]
            assert near(problem.merged(same, name, params, space), want, deltas), space
