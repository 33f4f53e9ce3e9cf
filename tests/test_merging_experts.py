"""Experts that one tensor holds: a merge of them is the merge of the same experts stored one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merging_files import tensors_of
from safetensors.torch import save_file
from torch import Tensor

from orthoft.merging import METHODS, merge, plan
from orthoft.merging.files.tensors import TensorFolder
from orthoft.merging.reports.estimate import estimates
from orthoft.merging.reports.inspection import inspect_sources
from orthoft.merging.sources.orientation import Orientation, is_stacked

Tensors = dict[str, Tensor]
EXPERTS, OUTPUTS, INPUTS, TASKS = 3, 8, 6, 3
UP, DOWN = "layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"
DRAWING = {"dare", "della"}  # their masks depend on the names: see test_merging_draws.py
CASES = [*((name, "auto") for name in sorted(METHODS.keys() - DRAWING)), ("mean", "rotation"), ("ties", "rotation")]


def saved(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def stacked(seed: int) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    weights, biases = (torch.randn(EXPERTS, OUTPUTS, *rest, generator=random) for rest in ((INPUTS,), ()))
    return {UP: weights, f"{UP}_bias": biases}


def apart(tensors: Tensors) -> Tensors:
    """Return the experts one by one, as most mixtures were once stored."""
    return {f"{name}.{e}.weight": tensor[e] for name, tensor in tensors.items() for e in range(len(tensor))}


def turned(tensors: Tensors) -> Tensors:
    """Return the experts as (inputs, outputs), as gpt-oss has them."""
    return {name: tensor.mT if tensor.ndim == 3 else tensor for name, tensor in tensors.items()}


def same(tensors: Tensors) -> Tensors:
    return tensors


def models(root: Path, tasks: int, form: Callable[[Tensors], Tensors]) -> tuple[Path, list[tuple[str, Path]]]:
    """Save a base and some checkpoints near it."""
    base = stacked(0)
    near = [{name: base[name] + 0.1 * tensor for name, tensor in stacked(t + 1).items()} for t in range(tasks)]
    sources = [(f"t{t}", saved(root / f"t{t}", form(one))) for t, one in enumerate(near)]
    return saved(root / "base", form(base)), sources


def close(got: Tensors, want: Tensors) -> None:
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize(("name", "space"), CASES)
def test_experts_in_one_tensor_merge_as_those_stored_one_by_one(name: str, space: str, tmp_path: Path) -> None:
    found = {}
    for form in (same, apart, turned):
        root = tmp_path / form.__name__
        base, sources = models(root, 2 if name == "slerp" else TASKS, form)
        merge(base, sources, root / "out", method=name, space=space, progress=False)
        found[form] = tensors_of(root / "out")
    assert all((found[same][key] - tensor).norm() > 1e-3 for key, tensor in stacked(0).items())
    close(apart(found[same]), found[apart])
    close(turned(found[turned]), found[same])


@pytest.mark.parametrize(("method", "kind"), [("fisher", "fisher"), ("ota", "second_moment")])
def test_statistics_of_experts_are_those_of_each(method: str, kind: str, tmp_path: Path) -> None:
    found = []
    for form in (same, apart):
        root = tmp_path / form.__name__
        base, sources = models(root, TASKS, form)
        files = {}
        for t, (name, _) in enumerate(sources):
            files[name] = root / f"{name}.safetensors"
            numbers = {key: (tensor.square() + 0.1).contiguous() for key, tensor in form(stacked(t + 20)).items()}
            save_file(numbers, files[name], {"kind": kind})
        merge(base, sources, root / "out", method=method, statistics=files, progress=False)
        found.append(tensors_of(root / "out"))
    close(apart(found[0]), found[1])


def test_a_merged_delta_of_experts_goes_on(tmp_path: Path) -> None:
    base, sources = models(tmp_path, TASKS, turned)
    words = {"method": "opcm", "progress": False}
    merge(base, sources, tmp_path / "at-once", **words)
    merge(base, sources[:2], tmp_path / "two", output="delta", **words)
    merge(base, [tmp_path / "two", sources[2]], tmp_path / "on", **words)
    close(tensors_of(tmp_path / "on"), tensors_of(tmp_path / "at-once"))


def test_norms_are_over_all_experts(tmp_path: Path) -> None:
    base, sources = models(tmp_path, TASKS, turned)
    report = merge(base, sources, tmp_path / "out", method="tsv", progress=False)
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    for entry in report.merged:
        assert entry.norm == pytest.approx(float((after[entry.name] - before[entry.name]).norm()), rel=1e-4)
        for name, folder in sources:
            change = tensors_of(folder)[entry.name] - before[entry.name]
            assert entry.task_norms[name] == pytest.approx(float(change.norm()), rel=1e-4)
        assert entry.diagnostics is not None
        assert entry.diagnostics.base_norm == pytest.approx(float(before[entry.name].norm()), rel=1e-4)
    inspected = inspect_sources(base, sources)
    assert [weight.shape for weight in inspected.weights] == [tuple(tensor.shape) for tensor in before.values()]


def test_the_estimate_is_not_that_of_one_huge_matrix(tmp_path: Path) -> None:
    big = {UP: torch.zeros(2, 300, 400)}
    base, task = saved(tmp_path / "base", big), saved(tmp_path / "task", {UP: big[UP] + 1})
    todo = plan(base, [task], method="mean", space="rotation")
    assert todo.merged[UP].matrix == (600, 400)
    assert estimates(todo)[UP].memory < 50e6  # as a (2, 120000) matrix 115 GB


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("size", [INPUTS, 2 * INPUTS])
def test_which_way_round_experts_are_stored(flipped: bool, size: int, tmp_path: Path) -> None:
    tensors = {UP: torch.ones(EXPERTS, 2 * size, INPUTS), DOWN: torch.ones(EXPERTS, INPUTS, size)}
    other = {"other.experts.w": torch.ones(2, 3, 4), "other.experts.w_bias": torch.ones(2, 4 if flipped else 3)}
    base = TensorFolder(saved(tmp_path / "base", {**(turned(tensors) if flipped else tensors), **other}))
    says = Orientation(base).inputs_first
    assert [says(UP), says(DOWN), says("other.experts.w"), says("other.experts.w_bias")] == [*[flipped] * 3, False]


def test_a_kernel_of_a_convolution_is_one_matrix(tmp_path: Path) -> None:
    assert not is_stacked("encoder.conv.weight", (8, 4, 3))
    assert not is_stacked("mlp.experts.0.up.weight", (8, 4))
    assert is_stacked("block_sparse_moe.input_linear.weight", (4, 8, 3))
    base = saved(tmp_path / "base", {"conv.weight": torch.randn(8, 4, 3)})
    task = saved(tmp_path / "task", {"conv.weight": torch.randn(8, 4, 3)})
    assert plan(base, [task], method="mean").merged["conv.weight"].matrix == (8, 12)
