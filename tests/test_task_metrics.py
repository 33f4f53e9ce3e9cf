"""Scores of predictions against oracles and by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kind_cases import naive_f1

from orthoft.recipes.metrics import entities, entity_f1, exact_match, is_bio, token_f1

TAGS = st.lists(st.sampled_from(["O", "B-x", "I-x", "B-y", "I-y"]), min_size=1, max_size=12)


@given(st.lists(st.tuples(TAGS, TAGS), min_size=1, max_size=4))
def test_the_f1_of_entities_is_that_of_runs(pairs: list[tuple[list[str], list[str]]]) -> None:
    found = [mine[: len(theirs)] + ["O"] * (len(theirs) - len(mine)) for mine, theirs in pairs]
    labels = [theirs for _, theirs in pairs]
    assert entity_f1(found, labels) == pytest.approx(naive_f1(found, labels))


def test_entities_by_hand() -> None:
    tags = ["B-x", "I-x", "B-x", "I-y", "O", "I-x", "I-x"]
    assert entities(tags) == {("x", 0, 2), ("x", 2, 3), ("y", 3, 4), ("x", 5, 7)}
    labels = ["B-x", "I-x", "O", "B-y", "O", "B-x", "O"]
    assert entity_f1([tags], [labels]) == pytest.approx(2 * 2 / (4 + 3))
    assert (is_bio(["O", "B-x", "I-x"]), is_bio(["NOUN", "B-x"]), is_bio(["O", "I"])) == (True, False, False)


@pytest.mark.parametrize(
    ("found", "target", "same", "f1"),
    [
        ("The Cat, sat!", "cat sat", 1.0, 1.0),
        ("the black cat", "a cat", 0.0, 2 / 3),
        ("dog dog", "dog", 0.0, 2 / 3),
        ("dog", "cat", 0.0, 0.0),
        ("", "the", 1.0, 1.0),
    ],
)
def test_answers_are_compared_as_squad_does(found: str, target: str, same: float, f1: float) -> None:
    assert exact_match(found, target) == same
    assert token_f1(found, target) == pytest.approx(f1)
