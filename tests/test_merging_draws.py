"""What methods draw in the engine: other numbers for each weight and each expert, the same wherever it is done."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from merging_files import tensors_of
from safetensors.torch import save_file
from torch import Tensor

from orthoft.merging import METHODS, merge
from orthoft.merging.weightwise import weight_generator

DRAWING = [name for name, found in METHODS.items() if found.needs("generator")]
EXPERTS, OUTPUTS, INPUTS = 3, 16, 12
STACKED = "layers.0.mlp.experts.gate_up_proj"


def saved(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def changes(seed: int) -> Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(seed))


def merged(root: Path, method: str, names: list[str], shape: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """Merge two tasks, which do the same to all weights and all experts of a base of zeros."""
    each = [{name: changes(task).expand(shape) for name in names} for task in range(2)]
    base = saved(root / "base", {name: torch.zeros(shape) for name in names})
    sources = [saved(root / f"t{task}", tensors) for task, tensors in enumerate(each)]
    merge(base, sources, root / "out", method=method, seed=seed, progress=False, diagnostics=False)
    return tensors_of(root / "out")


def by_hand(method: str, generator: torch.Generator) -> Tensor:
    found = METHODS[method]
    x = torch.stack([changes(0), changes(1)])
    return found.merge(x, torch.ones(2), **found.bind({}), generator=generator)


def test_there_are_methods_that_draw() -> None:
    assert set(DRAWING) == {"dare", "della"}


def test_generators_differ_by_seed_and_name() -> None:
    given = [(0, "a.weight"), (0, "b.weight"), (1, "a.weight"), (0, "")]
    drawn = [torch.rand(8, generator=weight_generator(*one)) for one in given]
    assert all(not torch.equal(one, other) for one, other in combinations(drawn, 2))
    assert all(
        torch.equal(torch.rand(8, generator=weight_generator(*one)), d) for one, d in zip(given, drawn, strict=True)
    )


@pytest.mark.parametrize("method", DRAWING)
def test_each_weight_has_masks_of_its_own(method: str, tmp_path: Path) -> None:
    found = merged(tmp_path, method, ["a.weight", "b.weight"], (OUTPUTS, INPUTS), seed=3)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, by_hand(method, weight_generator(3, name)))
    assert ((found["a.weight"] != 0) != (found["b.weight"] != 0)).float().mean() > 0.1


@pytest.mark.parametrize("method", DRAWING)
def test_each_expert_has_masks_of_its_own(method: str, tmp_path: Path) -> None:
    """One after the other from the generator of their tensor."""
    found = merged(tmp_path, method, [STACKED], (EXPERTS, OUTPUTS, INPUTS))[STACKED]
    generator = weight_generator(0, STACKED)
    for expert in found:
        torch.testing.assert_close(expert, by_hand(method, generator))
    for one, other in combinations(found, 2):
        assert ((one != 0) != (other != 0)).float().mean() > 0.1
