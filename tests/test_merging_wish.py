"""What a user may ask for beside the method: filters, overrides by pattern, what follows the merge; and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merging_files import TARGETS, load, save_base, save_lora, tensors_of
from torch import Tensor

from orthoft.merging import merge, plan
from orthoft.merging.wish import wish_for

Words = dict[str, Any]
SUM: Words = {"method": "task_arithmetic", "progress": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two LoRAs, one of them with a trained bias."""
    root = tmp_path_factory.mktemp("wish")
    save_base(root / "base", "bert")
    save_lora(root / "a", load(root / "base"), seed=1, target_modules=TARGETS["bert"], bias="lora_only")
    save_lora(root / "b", load(root / "base"), seed=2, target_modules=TARGETS["bert"])
    return root


def changes(made: Path, out: Path, sources: tuple[str, ...] = ("a", "b"), **words: Any) -> dict[str, Tensor]:
    """Merge and return what changed of the base, in float64, by name."""
    merge(made / "base", [made / name for name in sources], out, **{**SUM, **words})
    base = tensors_of(made / "base")
    merged = {name: tensor.double() - base[name].double() for name, tensor in tensors_of(out).items()}
    return {name: change for name, change in merged.items() if change.abs().max() > 0}


def same(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().max() < 1e-6)


def test_filters_choose_the_weights(made: Path, tmp_path: Path) -> None:
    whole = changes(made, tmp_path / "whole")
    query = changes(made, tmp_path / "query", include=["*.query.*"])
    rest = changes(made, tmp_path / "rest", exclude=["*.query.*"])
    assert {name for name in whole if ".query." in name} == set(query)
    assert set(query) | set(rest) == set(whole)
    assert all(torch.equal(whole[name], (query | rest)[name]) for name in whole)
    both = changes(made, tmp_path / "both", include=["*.query.*"], exclude=["*.layer.0.*"])
    assert set(both) == {name for name in query if ".layer.1." in name}


def test_what_a_filter_leaves_out_is_listed(made: Path, tmp_path: Path) -> None:
    report = merge(made / "base", [made / "a", made / "b"], tmp_path / "out", include=["*.query.weight"], **SUM)
    assert {entry.name for entry in report.merged} == {f"encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)}
    left = report.not_carried["a"]
    assert any(line == "encoder.layer.0.attention.self.query.bias: left out by a filter" for line in left)
    assert len(left) == len(plan(made / "base", [made / "a"], method="mean").merged) - 2


def test_overrides_hold_where_their_pattern_matches(made: Path, tmp_path: Path) -> None:
    whole = changes(made, tmp_path / "whole")
    alone = changes(made, tmp_path / "alone", sources=("a",))
    got = changes(
        made,
        tmp_path / "got",
        overrides={"*.layer.0.*": {"scale": 0.5}, "*.layer.0.*query*": {"weights": {"b": 0.0}, "scale": 2.0}},
    )
    for name, change in got.items():
        if ".layer.0." not in name:
            assert torch.equal(change, whole[name])
        elif ".query." in name:
            assert same(change, 2 * alone[name])
        else:
            assert same(change, 0.5 * whole[name])


def test_an_override_of_a_parameter_and_of_the_space(made: Path) -> None:
    words: Words = {"method": "ties", "density": 0.3, "overrides": {"*.query.*": {"density": 0.9, "space": "core"}}}
    todo = plan(made / "base", [made / "a", made / "b"], **words)
    for name, item in todo.merged.items():
        if name.endswith(".query.weight"):
            assert (item.space.name, item.choice.params["density"]) == ("core", 0.9)
        elif name.endswith(".weight"):
            assert (item.space.name, item.choice.params["density"]) == ("full", 0.3)


@pytest.mark.parametrize(
    ("method", "weights", "message"),
    [
        ("karcher", {"a": 0.0, "b": 0.0}, "not all"),
        ("fisher", {"a": -1.0}, "weights of 0 or more"),
    ],
)
def test_weights_of_an_override_are_tried_before_the_merge(
    method: str, weights: dict[str, float], message: str, made: Path
) -> None:
    words: Words = {"method": method, "overrides": {"*.layer.1.*query.weight": {"weights": weights}}}
    with pytest.raises(ValueError, match=r"^weight 'encoder\.layer\.1\.attention\.self\.query\.weight': ") as caught:
        plan(made / "base", [made / "a", made / "b"], **words)
    assert message in str(caught.value)


def test_a_delta_tells_the_norms_under_the_weights_of_overrides(made: Path, tmp_path: Path) -> None:
    """OPCM brings the model to the mean norm of the weighted tasks: the saved norms have that mean."""
    words: Words = {"method": "opcm", "output": "delta", "progress": False}
    overrides = {"*.query.weight": {"weights": {"a": 3.0}}, "*.layer.0.*": {"weights": {"b": 0.25}}}
    report = merge(made / "base", [made / "a", made / "b"], tmp_path / "out", overrides=overrides, **words)
    told = json.loads((tmp_path / "out" / "delta_config.json").read_text(encoding="utf-8"))
    whole = sum(entry.norm**2 for entry in report.merged) ** 0.5
    assert sum(told["task_norms"]) / 2 == pytest.approx(whole)
    with pytest.raises(ValueError, match=r"^weight .*: the result of an OPCM merge goes on with weight 1, got 2.0"):
        plan(
            made / "base", [tmp_path / "out", made / "b"], method="opcm", overrides={"*query*": {"weights": {"out": 2}}}
        )


def test_scale_and_rescale_reach_every_weight(made: Path, tmp_path: Path) -> None:
    whole = changes(made, tmp_path / "whole")
    for name, change in changes(made, tmp_path / "half", scale=0.5).items():
        assert same(change, 0.5 * whole[name])
    tasks = [changes(made, tmp_path / name, sources=(name,)) for name in "ab"]
    norms = [sum(change.norm() ** 2 for change in task.values()) ** 0.5 for task in tasks]
    norm = sum(change.norm() ** 2 for change in whole.values()) ** 0.5
    for name, change in changes(made, tmp_path / "model", rescale="model", scale=3.0).items():
        assert same(change, whole[name] * 3 * sum(norms) / 2 / norm)
    for name, change in changes(made, tmp_path / "weight", rescale="weight").items():
        of_tasks = [task[name].norm() if name in task else 0.0 for task in tasks]
        assert same(change, whole[name] * sum(of_tasks) / 2 / whole[name].norm())


def test_isotropise_makes_singular_values_equal(made: Path, tmp_path: Path) -> None:
    for change in changes(made, tmp_path / "flat", isotropise=True, include=["*.weight"]).values():
        s = torch.linalg.svdvals(change)
        kept = s[s > 1e-3 * s[0]]
        assert len(kept) == 8  # two LoRAs of rank 4
        assert kept.min() > 0.999 * kept.max()


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (
            {"include": ["*.qurey.*"]},
            ValueError,
            "the pattern '*.qurey.*' matches no weight that a source changes, e.g.",
        ),
        ({"exclude": ["nothing"]}, ValueError, "the pattern 'nothing' matches no weight"),
        ({"exclude": ["*"]}, ValueError, "include and exclude leave no weight to merge"),
        ({"include": "*.query.*"}, TypeError, "include is a sequence of patterns, got '*.query.*'"),
        ({"overrides": {"*mlp*": {"scale": 1}}}, ValueError, "the pattern '*mlp*' matches no weight"),
        ({"overrides": {"*": {"scal": 1}}}, ValueError, "method 'task_arithmetic' has no parameters, got 'scal'"),
        ({"overrides": {"*": {"scale": "big"}}}, TypeError, "the scale of '*' is a finite number, got 'big'"),
        ({"overrides": {"*": {"space": "cor"}}}, ValueError, "unknown space 'cor', did you mean 'core'?"),
        ({"overrides": {"*": {"weights": {"c": 1}}}}, ValueError, "unknown source in the weights of '*' 'c'"),
        ({"overrides": {"*": {"weights": {"a": None}}}}, TypeError, "the weight of 'a' in '*' is a finite number"),
        ({"overrides": {"*": 3}}, TypeError, "the override of '*' is a mapping of words, got 3"),
        ({"overrides": {"*": {"weights": 3}}}, TypeError, "the weights of '*' are a mapping from sources to numbers"),
        ({"overrides": []}, TypeError, "overrides is a mapping from patterns to words, got []"),
        ({"scale": float("inf")}, TypeError, "scale is a finite number, got inf"),
        ({"rescale": "modle"}, ValueError, "unknown rescale 'modle', did you mean 'model'?"),
        ({"statistics": {"c": "x"}}, ValueError, "method 'task_arithmetic' takes no statistics"),
        ({"statistics": {"c": "x"}, "method": "fisher"}, ValueError, "unknown source in statistics 'c'"),
    ],
)
def test_mistakes_are_told_in_one_line(
    words: Words, error: type[Exception], message: str, made: Path, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        merge(made / "base", [made / "a", made / "b"], tmp_path / "out", **{**SUM, **words})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_parameters_of_a_space_hold_in_that_space(made: Path) -> None:
    words = {"method": "mean", "space": "rotation", "chart": "log"}
    wish = wish_for(1, overrides={"*q_proj*": {"space": "full"}}, **words)
    assert wish.of("layers.0.q_proj.weight", ["a"]).bound() == ({}, {})
    assert wish.of("layers.0.k_proj.weight", ["a"]).bound()[1]["chart"] == "log"
