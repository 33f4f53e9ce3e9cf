"""Our adapters against PEFT's own OFT and HRA with the same parameters; docs/agreement.md quotes the numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from orthoft import HRAConfig, OFTv2Config

OUT, IN, ROWS = 64, 96, 128


@dataclass
class Twin:
    """A configuration of PEFT and one of ours, and how PEFT's only parameter becomes ours."""

    theirs: Any
    ours: Any
    parameter: str
    translate: Callable[[Tensor], Tensor]
    std: float


def oft(neumann: bool, block_share: bool = False) -> Any:
    return peft.OFTConfig(
        target_modules=["0"],
        r=0,
        oft_block_size=16,
        use_cayley_neumann=neumann,
        num_cayley_neumann_terms=6,  # degree 5
        block_share=block_share,
    )


def ours(**changes: Any) -> OFTv2Config:
    return OFTv2Config(target_modules=["0"], block_size=16, **changes)


TWINS = {
    "OFT, Cayley-Neumann of 6 terms": Twin(oft(neumann=True), ours(), "oft_R", lambda q: q, 0.05),
    "OFT, Cayley-Neumann, shared block": Twin(oft(True, True), ours(block_share=True), "oft_R", lambda q: q, 0.05),
    "OFT, exact Cayley": Twin(oft(neumann=False), ours(map="cayley"), "oft_R", lambda q: -q, 0.1),
    "HRA": Twin(
        peft.HRAConfig(target_modules=["0"], r=8), HRAConfig(target_modules=["0"], r=8), "hra_u", lambda u: u.mT, 1.0
    ),
}


def the_parameter(model: nn.Module) -> nn.Parameter:
    [parameter] = [p for p in model.parameters() if p.requires_grad]
    return parameter


def twins(twin: Twin, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return PEFT's model and ours, adapted alike."""
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT)
    theirs, mine = (
        get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), config).to(dtype) for config in (twin.theirs, twin.ours)
    )
    with torch.no_grad():
        for model in (theirs, mine):
            layer = model.base_model.model[0].base_layer
            layer.weight.copy_(base.weight)
            layer.bias.copy_(base.bias)
        nn.init.normal_(the_parameter(theirs), std=twin.std)
        assert twin.parameter in next(n for n, p in theirs.named_parameters() if p.requires_grad)
        the_parameter(mine).copy_(twin.translate(the_parameter(theirs)))
    return theirs, mine


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


def differences(twin: Twin, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Return the relative differences of output, gradient and merged weight, and how far both are from the base."""
    theirs, mine = twins(twin, dtype)
    base = mine.base_model.model[0].base_layer
    x, weight = torch.randn(ROWS, IN, dtype=dtype), base.weight.detach().clone()
    found = {"output": error(mine(x), theirs(x))}
    (mine(x) ** 2).sum().backward()
    (theirs(x) ** 2).sum().backward()
    found["gradient"] = error(the_parameter(mine).grad, twin.translate(the_parameter(theirs).grad))
    mine.merge_adapter()
    theirs.merge_adapter()
    found["merged weight"] = error(base.weight, theirs.base_model.model[0].base_layer.weight)
    found["from the base"] = error(base.weight, weight)
    return found


@pytest.mark.parametrize("twin", TWINS.values(), ids=[name.replace(",", "").replace(" ", "-") for name in TWINS])
def test_equals_peft(twin: Twin) -> None:
    found = differences(twin)
    assert found.pop("from the base") > 0.1
    assert max(found.values()) < 2e-6, found


@pytest.mark.parametrize("bad", ["OFT, exact Cayley", "OFT, Cayley-Neumann of 6 terms"])
def test_the_sign_matters(bad: str) -> None:
    right = TWINS[bad]
    wrong = Twin(right.theirs, right.ours, right.parameter, lambda q: -right.translate(q), right.std)
    assert differences(wrong)["output"] > 0.1
