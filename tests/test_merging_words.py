"""Words of a merge from programs: numbers of numpy and torch mean what Python's own mean, in files, too."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from merging_files import save_pair, tensors_of

from orthoft.delta import LowRank
from orthoft.merging import OUTPUTS, merge, merge_deltas
from orthoft.merging.parameters import plain

Words = dict[str, Any]


class Name(StrEnum):
    ties = "ties"
    weights = "*query*"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair(tmp_path_factory.mktemp("words"))


def merged(made: Path, out: Path, **words: Any) -> tuple[Words, Words]:
    """Merge, and return the tensors and the recipe in the card."""
    given = {"method": "ties", "progress": False, "diagnostics": False, **words}
    report = merge(made / "base", [made / "a", made / "b"], out, **given)
    told = json.loads((out / "report.json").read_text(encoding="utf-8"))
    card = (out / "README.md").read_text(encoding="utf-8")
    recipe = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert recipe == told["config"] == report.config
    return tensors_of(out), recipe


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ({"density": np.float64(0.3)}, {"density": 0.3}),
        ({"density": np.float32(0.5)}, {"density": 0.5}),
        ({"density": torch.tensor(0.5)}, {"density": 0.5}),
        ({"scale": np.float64(0.5)}, {"scale": 0.5}),
        ({"seed": np.int64(1)}, {"seed": 1}),
        ({"isotropise": np.bool_(True)}, {"isotropise": True}),
        ({"overrides": {"*": {"scale": np.float64(0.5)}}}, {"overrides": {"*": {"scale": 0.5}}}),
        (
            {"overrides": {Name.weights: {"weights": {"a": torch.tensor(2.0)}, "density": np.array(0.5)}}},
            {"overrides": {"*query*": {"weights": {"a": 2.0}, "density": 0.5}}},
        ),
        ({"method": Name.ties, "include": (Name.weights,)}, {"include": ["*query*"]}),
        (
            {"include": np.array(["*query*"]), "weights": np.array([1, 0.5])},
            {"include": ["*query*"], "weights": [1, 0.5]},
        ),
        ({"output": "lora", "rank": np.int64(2)}, {"output": "lora", "rank": 2}),
    ],
    ids=lambda words: ",".join(words),
)
def test_numbers_of_other_libraries_are_numbers(words: Words, same: Words, made: Path, tmp_path: Path) -> None:
    got, recipe = merged(made, tmp_path / "got", **words)
    want, recipe_of_same = merged(made, tmp_path / "want", **same)
    assert recipe == recipe_of_same
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_they_are_in_memory_too() -> None:
    deltas = [LowRank(torch.ones(3, 1), torch.ones(1, 4)), LowRank(torch.ones(3, 1), -torch.ones(1, 4))]
    got = merge_deltas(deltas, method="ties", density=np.float32(0.5), scale=torch.tensor(2.0))
    assert torch.equal(got.dense(), merge_deltas(deltas, method="ties", density=0.5, scale=2.0).dense())


def test_a_word_of_a_merge_is_pythons_own() -> None:
    assert plain({"a": (np.int64(1), [torch.ones(2)]), "b": None, "c": True}) == {
        "a": [1, [[1, 1]]],
        "b": None,
        "c": True,
    }
    assert type(plain(np.str_("x"))) is type(plain(Name.ties)) is str
    assert [plain(word) for word in ("x", Path("x"), {1})] == ["x", Path("x"), {1}]


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_docstring_of_merge_names_every_output(name: str) -> None:
    assert f'"{name}"' in str(merge.__doc__).partition("output: ")[2].partition("rank: ")[0]
