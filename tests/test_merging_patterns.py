"""Regular expressions from adapters of strangers: what people write is taken, what would take for ever is refused."""

from __future__ import annotations

import re
from time import process_time

import pytest

from orthoft.merging.formats.fields import NUMBERS, check_fields
from orthoft.merging.formats.registry import by_pattern

GOOD = [
    "q",
    r".*\.layers\.\d+\.(q|v)_proj",
    r"(?:a|b)\.c",
    r"layers\.(0|1|2)\..*",
    r"model.layers.0.self_attn.q_proj",
    r"^model\.decoder\.layers\.\d+\.fc[12]$",
    r".*layers.*self_attn.*(q_proj|k_proj|v_proj).*",
    r".*\.layers\.\d+\..*\.experts\.[0-9]+\.(up|down)_proj",
    r"(?:model\.)?layers\.([0-9]|1[0-9])\.mlp",
    r"(?!lm_head).*",
    r"(?i:q_PROJ)",
    r"layers\.\d{1,2}\.x",
    r".*encoder.*layer.*attention.*(query|key|value).*",
    r"^(?!.*(visual|audio|vision)).*layers.*(q_proj|k_proj|v_proj|o_proj).*",
    r"model(?:\.[^.]+){3}\.q_proj",
    "|".join(rf"layers\.{i}\..*_proj" for i in range(80)),
]
BAD = {
    "nested deeper": "((a+))+b",
    "nested in groups that keep nothing": "(?:(?:a+))+b",
    "a branch repeated": "(a|a)*b",
    "an option repeated": "(a?){40}b",
    "nested": "(a+)+",
    "lazy": "(a+?)*?b",
    "looking ahead": "(?=(a+)+)b",
    "atomic": "(?>(?:a|ba)+)+b",
    "under a condition": "(a)?(?(1)(b+)+|c)d",
    "words": r"(\w+\s?)*$",
    "stars in a row": ".*.*.*.*.*x",
    "four stars in a row": ".*.*.*.*c",
    "stars behind letters": ".*a.*a.*a.*a.*c",
    "stars behind words that overlap": ".*aaaaa.*aaaaa.*aaaaa.*c",
    "looking ahead at each place": ".*(?!.*.*.*c)b",
    "a reference": r"(.*)\2",
    "digits in a row": r"\d*\d*\d*\d*\d*\d*x",
    "options in a row": "a?" * 40 + "a" * 40,
    "branches in a row": "(ab|a)" * 40 + "c",
    "an absurd count": "(?:^){4000000000}x",
    "absurd counts": "(?:(?:^){40}){40}x",
    "flags for the whole": "(?i)q",  # which PEFT, too, puts behind a prefix, where they are an error
}


@pytest.mark.parametrize("pattern", GOOD, ids=lambda pattern: pattern[:40])
def test_what_people_write_is_taken_and_quick(pattern: str) -> None:
    check_fields({"alpha_pattern": {pattern: 2}}, {"alpha_pattern": NUMBERS})
    for name in ("a." * 30, "model.layers.31.block_sparse_moe.experts.7.self_attn.q_proj", "1" * 60):
        re.match(rf"(.*\.)?({pattern})$", name)  # an endless one would not come back


@pytest.mark.parametrize("pattern", BAD.values(), ids=BAD)
def test_what_would_take_for_ever_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"^'alpha_pattern' in its configuration is an object from regular") as caught:
        check_fields({"alpha_pattern": {"q_proj": 2, pattern: 2}}, {"alpha_pattern": NUMBERS})
    assert "\n" not in str(caught.value)
    assert "q_proj" not in str(caught.value)  # but the one it is about


SLOWEST = [".*.*.*c", "(?:(?!b).)*(?:(?!b).)*c", ".+?.+?c", ".*.*(xb|cd|ef)$", ".*.*[bc]"]  # of those that are taken


@pytest.mark.parametrize("pattern", SLOWEST)
@pytest.mark.parametrize("name", ["a." * 100, "a" * 200])
def test_the_slowest_that_is_taken_takes_less_than_a_second(pattern: str, name: str) -> None:
    check_fields({"alpha_pattern": {pattern: 2}}, {"alpha_pattern": NUMBERS})
    start = process_time()
    assert by_pattern({pattern: 2}, name, 0) == 0
    assert process_time() - start < 1


def test_patterns_are_bounded_together() -> None:
    many = {f".*.*.*{letter}": 2 for letter in "bcdefg"}
    with pytest.raises(ValueError, match=r"got \{'\.\*\.\*\.\*c': 2\}$"):
        check_fields({"alpha_pattern": many}, {"alpha_pattern": NUMBERS})
    names = {f"model.layers.{layer}.self_attn.q_proj": 2 for layer in range(500)}
    check_fields({"alpha_pattern": names}, {"alpha_pattern": NUMBERS})


@pytest.mark.parametrize("name", ["q", "a.q", "aq", "a.b.q_proj", "layers.1.q", "model.layers.1.q", "q.a", "1.2.q"])
@pytest.mark.parametrize("pattern", [*GOOD, ".*q", "^q", "^q|b.q_proj", ".*", "", ".*1.*|q", "^a.*", r"a\.q"])
def test_the_expression_matches_what_that_of_peft_does(pattern: str, name: str) -> None:
    theirs = re.match(rf"(.*\.)?({pattern})$", name)
    assert by_pattern({pattern: 1}, name, 0) == (theirs is not None)


def test_names_that_no_module_has_are_refused() -> None:
    name = "a." * 300 + "q"
    assert by_pattern({}, name, 1) == by_pattern({"q": 2}, "a.q", 0) - 1 == 1
    with pytest.raises(ValueError, match="has 601 characters, too many to look for by patterns: at most 200"):
        by_pattern({"q": 2}, name, 1)
    with pytest.raises(ValueError, match="has a line break"):
        by_pattern({"q": 2}, "a\n.q", 1)
