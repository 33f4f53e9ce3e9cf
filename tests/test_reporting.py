"""The report of a model's adapters, against dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import orthoft
from orthoft import ADAPTERS, HRAConfig, OFTv2Config
from orthoft.adapter import InputRotation
from orthoft.config import OrthoConfig

CONFIGS = {
    "oftv2 series": OFTv2Config(block_size=8, target_modules=["lin"]),
    "oftv2 cayley": OFTv2Config(block_size=6, map="cayley", target_modules=["lin"]),
    "hra": HRAConfig(r=4, target_modules=["lin"]),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(48, 20)
        self.table = nn.Embedding(30, 48)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.lin(self.table(ids))
        return out


def tuned(config: OrthoConfig) -> tuple[nn.Module, InputRotation]:
    torch.manual_seed(0)
    model = get_peft_model(Net(), config)
    adapter = model.base_model.model.lin.adapters["default"]
    assert isinstance(adapter, InputRotation)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model, adapter


@pytest.mark.parametrize("name", CONFIGS)
def test_tells_what_the_dense_matrix_tells(name: str) -> None:
    model, adapter = tuned(CONFIGS[name])
    (line,) = orthoft.report(model)
    with torch.no_grad():
        Q = adapter.rotate(torch.eye(48)).double()
    defect = torch.linalg.matrix_norm(Q @ Q.T - torch.eye(48), ord=2).item()
    angles = torch.linalg.eigvals(Q).angle().abs()
    assert line.defect == pytest.approx(defect, rel=0.05, abs=2e-6)
    assert line.angle == pytest.approx(math.degrees(angles.max()), rel=0.02)
    rms = 2 * math.asin(math.sqrt((4 * torch.sin(angles / 2) ** 2).mean()) / 2)
    assert line.rms_angle == pytest.approx(math.degrees(rms), rel=0.02)
    assert (line.layer, line.adapter, line.shape) == ("lin", "default", (20, 48))
    assert line.parameters == sum(p.numel() for p in adapter.parameters())
    assert line.flops == adapter.flops_per_token() / (2 * 20 * 48)


@pytest.mark.parametrize("method", ADAPTERS)
def test_every_method_has_a_line_and_a_table(method: str) -> None:
    size = {"oftv2": {"block_size": 8}, "psoft": {"r": 4}, "hra": {"r": 4}}.get(method, {})
    torch.manual_seed(0)
    model = get_peft_model(Net(), ADAPTERS[method](target_modules=["lin", "table"], **size))
    told = orthoft.report(model)
    assert [line.layer for line in told] == ["lin", "table"]
    assert told[1].flops is None
    assert told[0].flops is not None
    assert told[0].flops > 0
    assert all(line.defect is None or line.defect < 1e-5 for line in told)
    assert all(line.angle is None or line.angle < 0.1 for line in told)
    lines = str(told).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("layer")
    assert lines[3].startswith("2 adapters")
    assert told.to_dict()[0]["shape"] == (20, 48)


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="no orthoft adapters"):
        orthoft.report(Net())
