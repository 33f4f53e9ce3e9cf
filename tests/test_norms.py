"""Norms of whole weights: sums of squares that float32 cannot hold, in any shape and layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor

from orthoft.delta import Dense, LowRank
from orthoft.linalg import frobenius_norm
from orthoft.merging import merge_deltas
from orthoft.merging.files.tensors import TensorFolder
from orthoft.merging.reports.diagnostics import diagnose
from orthoft.merging.sources.rows import Replaced
from orthoft.merging.spectra import changing, largest_norm
from orthoft.quantization import requantization_error

SHAPES = [(), (0,), (1,), (5,), (0, 7), (7, 0), (3, 4), (1024,), (1025,), (2048, 3), (2, 5000), (4, 3, 2, 2), (2, 0, 3)]
FLAT = torch.full((4096, 4096), 1e-3)  # its norm, added up in float32, is off by 1 %
NORM = 4.096


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = normal(*shape).to(dtype)
    norm = frobenius_norm(x)
    assert (norm.shape, norm.dtype) == ((), torch.promote_types(dtype, torch.float32))
    assert norm.item() == pytest.approx(
        x.double().square().sum().sqrt().item(), rel=1e-12 if x.dtype.itemsize > 4 else 1e-6
    )


@pytest.mark.parametrize("shape", [(3, 50, 2000), (3, 0, 4), (0, 3, 4), (3, 2, 5, 7)], ids=str)
def test_norms_of_a_batch(shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    torch.testing.assert_close(frobenius_norm(x, 1), x.square().flatten(1).sum(1).sqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "view", [lambda x: x.mT, lambda x: x[::2, ::3], lambda x: x[:, :7], lambda x: x.mT[::3], lambda x: x[None].mT[0]]
)
def test_norms_of_any_layout(view: Callable[[Tensor], Tensor]) -> None:
    x = view(normal(300, 2500))
    torch.testing.assert_close(frobenius_norm(x), x.square().sum().sqrt(), rtol=1e-12, atol=0)


def test_the_gradient_of_a_norm() -> None:
    x = normal(3, 700).requires_grad_()
    frobenius_norm(x).backward()
    torch.testing.assert_close(x.grad, x.detach() / x.detach().norm())
    still = torch.zeros(3, 4, requires_grad=True)
    frobenius_norm(still).backward()
    assert still.grad is not None
    assert not still.grad.any()


@pytest.mark.parametrize("shape", [(4096, 4096), (1, 1 << 24), (1 << 24,), (1 << 23, 2)], ids=str)
def test_norms_do_not_lose_digits_to_many_entries(shape: tuple[int, ...]) -> None:
    assert frobenius_norm(FLAT.view(shape)).item() == pytest.approx(NORM, rel=1e-6)


@pytest.mark.parametrize(
    "words",
    [
        {"method": "ties", "density": 1.0, "rescale": "weight"},
        {"method": "model_stock", "rescale": "weight"},
        {"method": "model_stock", "rescale": "model"},
    ],
)
def test_one_large_source_rescaled_is_itself(words: dict[str, Any]) -> None:
    merged = merge_deltas([Dense(FLAT)], **words).dense()
    assert (merged - FLAT).abs().max() < 1e-6 * 1e-3


def test_norms_of_large_deltas_are_right(tmp_path: Path) -> None:
    save_file({"w": FLAT}, tmp_path / "model.safetensors")
    replaced = Replaced(TensorFolder(tmp_path), "w", torch.zeros(()).expand(4096, 4096), "w")
    assert Dense(FLAT).norm().item() == pytest.approx(NORM, rel=1e-6)
    assert replaced.norm().item() == pytest.approx(NORM, rel=1e-6)


def test_norms_that_methods_and_reports_use_are_right() -> None:
    assert largest_norm(FLAT[None]) == pytest.approx(NORM, rel=1e-6)
    assert len(changing(FLAT[None])) == 1
    tiny = LowRank(torch.ones(4096, 1), torch.ones(1, 4096))
    assert diagnose([tiny], [1.0], None, FLAT, torch.Generator()).base_norm == pytest.approx(NORM, rel=2e-6)  # 6 digits


def test_what_requantisation_loses_is_told_of_large_weights() -> None:
    mixed = FLAT.clone()
    mixed[:8] = 0.1
    kept = torch.cat([mixed[:8], torch.zeros(4088, 4096)])
    layer = cast(BaseTunerLayer, SimpleNamespace(get_base_weight=lambda: kept))
    want = float((mixed - kept).double().norm() / mixed.double().norm())
    assert requantization_error(layer, mixed) == pytest.approx(want, rel=1e-6)


def test_nothing_is_lost_of_zeros() -> None:
    layer = cast(BaseTunerLayer, SimpleNamespace(get_base_weight=lambda: torch.zeros(3, 4)))
    assert requantization_error(layer, torch.zeros(3, 4)) == 0.0
