"""What PEFT users are told: wrong sizes, experts that stay as they are, how a saved adapter loads."""

from __future__ import annotations

import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import Net
from torch import nn

from orthoft import ADAPTERS

SIZES = ("r", "rank", "block_size", "degree", "off_diagonals", "rank_pattern", "block_size_pattern")
OF = [(method, field.name) for method, config in ADAPTERS.items() for field in fields(config) if field.name in SIZES]
both = pytest.mark.parametrize("method", sorted(ADAPTERS))


def of(method: str, **changes: Any) -> Any:
    small = {"block_size": 4} if method in ("oftv2", "goft") else {"r": 2} if method in ("hra", "psoft") else {}
    return ADAPTERS[method](**{"target_modules": ["lin"], **small, **changes})


def test_each_adapter_has_a_size() -> None:
    assert {method for method, _ in OF} == set(ADAPTERS)


@pytest.mark.parametrize(("method", "name"), OF)
@pytest.mark.parametrize("wrong", [4.0, "4"], ids=repr)
def test_sizes_are_whole_numbers(method: str, name: str, wrong: Any) -> None:
    size = name.replace("rank_pattern", "rank").replace("block_size_pattern", "block_size")
    size = "r" if size == "rank" and method != "svft" else size
    with pytest.raises(ValueError, match=f"^{size} must be a whole number, got {wrong!r}$"):
        of(method, **{name: {"lin": wrong} if name.endswith("_pattern") else wrong})


@both
@pytest.mark.parametrize("wrong", ["gaussian", "False", None, 1], ids=repr)
def test_a_start_is_true_or_false(method: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=rf"^init_weights is True .* or False .*, got {wrong!r}$"):
        of(method, init_weights=wrong)


# Experts in one tensor


class Experts(nn.Module):
    """A mixture of experts as transformers has them: each projection of all experts is one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 8))
        self.down = nn.Parameter(torch.randn(3, 8, 16))


class Mixture(Net):
    """A layer beside experts, and 3-D parameters that are none."""

    def __init__(self, experts: bool = True) -> None:
        super().__init__(nn.Linear(8, 8))
        self.experts = Experts() if experts else None
        self.conv = nn.Conv1d(8, 8, 3)
        self.scaled = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3))
        self.position = nn.Parameter(torch.zeros(1, 4, 8))
        self.layer_scale = nn.Parameter(torch.ones(8, 1, 1))


def said(model: nn.Module, config: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(model, config)
    return [str(warning.message) for warning in caught]


@both
def test_experts_in_one_tensor_are_named(method: str) -> None:
    (line,) = said(Mixture(), of(method))
    assert line.startswith("experts.up holds several matrices in one parameter")
    assert "2 such parameters stay as in the base model" in line


@both
def test_nothing_is_said_without_experts_or_of_those_that_are_trained(method: str) -> None:
    assert said(Mixture(experts=False), of(method)) == []
    assert said(Mixture(), of(method, modules_to_save=["experts"])) == []
    assert said(Mixture(), of(method, inference_mode=True)) == []


def test_a_further_adapter_does_not_say_it_again() -> None:
    with pytest.warns(UserWarning, match="experts"):
        model = get_peft_model(Mixture(), of("goft", mode="quasi"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_adapter("more", of("goft", mode="quasi"))


# How it loads


@both
@pytest.mark.parametrize("name", ["default", "sql"])
def test_the_card_says_how_to_load(method: str, name: str, tmp_path: Path) -> None:
    model = get_peft_model(Net(nn.Linear(8, 8)), of(method), adapter_name=name)
    model.save_pretrained(tmp_path)
    where = "" if name == "default" else f"/{name}"
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.count("import orthoft") == 1
    assert f'PeftModel.from_pretrained(base, "this-folder{where}")' in card
    assert f"orthoft convert this-folder{where} OUT" in card
    PeftModel.from_pretrained(model.unload(), str(tmp_path) + where)


def test_a_file_of_the_user_above_a_configuration_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("my project", encoding="utf-8")
    of("hra").save_pretrained(str(tmp_path / "configuration"))
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "my project"
