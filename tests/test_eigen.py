"""Leading eigenvectors against all of them: sharp, flat, repeated and vanishing spectra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orthoft.recipes import eigen
from orthoft.recipes.eigen import leading_eigenvectors

N = 600
SPECTRA = {
    "sharp": torch.logspace(0, -12, N, dtype=torch.float64),
    "flat": torch.linspace(1, 0.9, N, dtype=torch.float64),
    "of both signs": torch.linspace(1, -3, N, dtype=torch.float64),
    "repeated": torch.cat([torch.ones(30, dtype=torch.float64), torch.logspace(-1, -3, N - 30, dtype=torch.float64)]),
    "low rank": torch.cat([torch.tensor([3.0, 2.0]), torch.zeros(N - 2)]).double(),
    "zero": torch.zeros(N, dtype=torch.float64),
}


def operator(values: Tensor) -> Tensor:
    drawn = torch.randn(N, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    Q = torch.linalg.qr(drawn).Q
    return (Q * values) @ Q.mT


@pytest.mark.parametrize("r", [1, 7, 130])
@pytest.mark.parametrize("name", SPECTRA)
def test_they_are_orthonormal_and_attain_the_largest_eigenvalues(name: str, r: int) -> None:
    A = operator(SPECTRA[name])
    V = leading_eigenvectors(A.__matmul__, N, r, A)
    assert V.shape == (N, r)
    torch.testing.assert_close(V.mT @ V, torch.eye(r, dtype=A.dtype), rtol=0, atol=1e-11)
    wanted = SPECTRA[name].sort(descending=True).values[:r]
    torch.testing.assert_close((V * (A @ V)).sum(0), wanted, rtol=1e-9, atol=1e-9)


def test_a_sharp_spectrum_takes_few_products() -> None:
    A, seen = operator(SPECTRA["sharp"]), list[int]()

    def apply(X: Tensor) -> Tensor:
        seen.append(X.shape[1])
        return A @ X

    V = leading_eigenvectors(apply, N, 4, A)
    assert sum(seen) < N / 2
    assert set(seen) == {4 + eigen.OVERSAMPLING}
    top = torch.linalg.eigh(A).eigenvectors[:, -4:]
    assert torch.linalg.svdvals(V.mT @ top).min() > 1 - 1e-12


def test_the_same_operator_gives_the_same_vectors() -> None:
    A = operator(SPECTRA["sharp"])
    first, second = (leading_eigenvectors(A.__matmul__, N, 3, A) for _ in range(2))
    assert torch.equal(first, second)
