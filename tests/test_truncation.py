"""The best approximation of a rank, by block Krylov or by the whole SVD, against the SVD in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orthoft import krylov
from orthoft.delta import Dense
from orthoft.krylov import leading_triplets


def matrix(kind: str, shape: tuple[int, int]) -> Tensor:
    random = torch.Generator().manual_seed(3)
    U, V = (torch.linalg.qr(torch.randn(size, min(shape), generator=random).double()).Q for size in shape)
    k = torch.arange(1, min(shape) + 1, dtype=torch.float64)
    values = {"decaying": 1 / k, "steep": 2.0**-k, "flat": torch.ones_like(k), "low rank": (k <= 6).double() / k}[kind]
    return (U * values @ V.mT).float()


@pytest.mark.parametrize("shape", [(240, 200), (200, 240), (160, 160)], ids=str)
@pytest.mark.parametrize("kind", ["decaying", "steep", "flat", "low rank"])
@pytest.mark.parametrize("rank", [4, 16])
def test_the_error_is_that_of_the_svd(kind: str, shape: tuple[int, int], rank: int) -> None:
    A = matrix(kind, shape)
    U, s, Vh = leading_triplets(A, rank)
    best = torch.linalg.svdvals(A.double())[rank:].norm()
    error = (A.double() - (U * s) @ Vh).norm()
    assert error <= best * (1 + 1e-6) + 1e-6 * A.norm()
    assert (U.mT @ U - torch.eye(len(s))).norm() < 1e-4
    kept, lost = Dense(A).truncated(rank)
    assert kept.A.dtype == torch.float32
    assert abs(lost - error) < 1e-5 * A.norm()


def test_a_decaying_spectrum_needs_no_whole_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "svd", None)
    assert len(leading_triplets(matrix("steep", (240, 200)), 8)[1]) == 8
    noise = torch.randn(240, 200, generator=torch.Generator().manual_seed(1))
    assert krylov._krylov(noise, 16) is None  # that of noise does


@pytest.mark.parametrize("shape", [(3, 2), (1, 7), (7, 1)], ids=str)
def test_small_matrices(shape: tuple[int, int]) -> None:
    A = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    U, s, Vh = leading_triplets(A, 5)
    assert ((U * s) @ Vh - A).abs().max() < 1e-6
