"""Quantised weights are never merged: equal ones stay, others are refused by name, with what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merging_files import save_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from orthoft.merging import merge
from orthoft.merging.files.tensors import TensorFolder
from orthoft.merging.sources.quantised import quantised

Tensors = dict[str, Tensor]
WEIGHT, NORM = "a.q_proj.weight", "a.norm.weight"


def plain(scale: float = 1.0) -> Tensors:
    return {WEIGHT: scale * torch.arange(1.0, 65.0).reshape(8, 8), NORM: torch.full((8,), scale)}


def fp8(scale: float) -> Tensors:
    codes = torch.arange(1.0, 65.0).reshape(8, 8).to(torch.float8_e4m3fn)
    return plain(scale) | {WEIGHT: codes, f"{WEIGHT}_scale_inv": torch.full((1, 1), scale)}


def bnb4(scale: float) -> Tensors:
    codes = torch.full((32, 1), 3, dtype=torch.uint8)
    state = {f"{WEIGHT}.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}
    return plain(scale) | state | {WEIGHT: codes, f"{WEIGHT}.absmax": torch.full((1,), scale)}


def bnb8(scale: float) -> Tensors:
    codes = torch.ones(8, 8, dtype=torch.int8)
    return plain(scale) | {WEIGHT: codes, "a.q_proj.SCB": torch.full((8,), scale)}


def packed(codes: str, scales: str) -> Callable[[float], Tensors]:
    """Return a form that has codes of another name instead of the weight."""

    def form(scale: float) -> Tensors:
        ones, numbers = torch.ones(1, 8, dtype=torch.int32), torch.full((1, 8), scale)
        return {NORM: torch.full((8,), scale), f"a.q_proj.{codes}": ones, f"a.q_proj.{scales}": numbers}

    return form


FORMS: dict[str, Callable[[float], Tensors]] = {
    "fp8": fp8,
    "bnb4": bnb4,
    "bnb8": bnb8,
    "gptq": packed("qweight", "scales"),
    "compressed": packed("weight_packed", "weight_scale"),
}
each_form = pytest.mark.parametrize("form", FORMS)


def saved(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def merged(base: Tensors, source: Tensors, root: Path) -> Tensors:
    merge(saved(root / "base", base), [saved(root / "tuned", source)], root / "out", method="mean", progress=False)
    return load_file(root / "out" / "model.safetensors")


def lora(root: Path) -> Path:
    factors = {"a.q_proj.lora_A.weight": torch.ones(1, 8), "a.q_proj.lora_B.weight": torch.ones(8, 1)}
    return save_adapter(root / "lora", {"peft_type": "LORA", "r": 1, "lora_alpha": 1}, factors)


@each_form
@pytest.mark.parametrize(("base", "source", "which"), [(0.0, 1.0, "source"), (1.0, 0.0, "base"), (1.0, 2.0, "both")])
def test_codes_are_not_merged_with_others(form: str, base: float, source: float, which: str, tmp_path: Path) -> None:
    made = [FORMS[form](scale) if scale else plain() for scale in (base, source)]
    with pytest.raises(
        ValueError, match=rf"^source 'tuned': .*'a\.q_proj\..*: dequantise {'the ' * (which != 'both')}{which}"
    ) as caught:
        merged(made[0], made[1], tmp_path)
    assert "another base" not in str(caught.value)
    assert "\n" not in str(caught.value)


@each_form
def test_equal_codes_stay_and_the_rest_is_merged(form: str, tmp_path: Path) -> None:
    base = FORMS[form](1.0)
    found = merged(base, base | {NORM: torch.full((8,), 3.0)}, tmp_path)
    assert torch.equal(found.pop(NORM), torch.full((8,), 3.0))
    assert all(torch.equal(tensor, base[name]) for name, tensor in found.items())


@each_form
def test_an_adapter_of_a_quantised_base_is_told_so(form: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", FORMS[form](1.0))
    with pytest.raises(ValueError, match=r"^source 'lora': the base's 'a\.q_proj\..* dequantise the base first$"):
        merge(base, [lora(tmp_path)], tmp_path / "out", method="mean")


@pytest.mark.parametrize("form", ["fp8", "bnb4", "gptq"])
def test_a_module_saved_beside_an_adapter_does_not_replace_codes(form: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", FORMS[form](1.0))
    folder = save_adapter(tmp_path / "lora", {"peft_type": "LORA", "r": 1, "lora_alpha": 1}, plain(2.0))
    with pytest.raises(ValueError, match=r"^source 'lora': the base's 'a\.q_proj\..* dequantise the base first$"):
        merge(base, [folder], tmp_path / "out", method="mean")


def test_a_delta_of_a_quantised_base_is_told_so(tmp_path: Path) -> None:
    merge(saved(tmp_path / "base", plain()), [lora(tmp_path)], tmp_path / "delta", method="mean", output="delta")
    base = saved(tmp_path / "codes", bnb4(1.0))
    with pytest.raises(ValueError, match=r"^source 'delta': the base's .* dequantise the base first$"):
        merge(base, [tmp_path / "delta"], tmp_path / "out", method="mean")


def test_what_only_counts_or_is_called_a_scale_is_not_quantised(tmp_path: Path) -> None:
    tensors = {
        "a.layer_scale": torch.ones(3),
        "a.weight": torch.ones(2, 2),
        "a.weight_scale": torch.ones(1),
        "a.position_ids": torch.arange(3),
        "a.image_shape": torch.arange(2),
        "a.mask": torch.ones(2, dtype=torch.uint8),
        "experts.up_blocks": torch.ones(2, 2, dtype=torch.uint8),
        "experts.up_scales": torch.ones(2, dtype=torch.uint8),
    }
    found = quantised(TensorFolder(saved(tmp_path / "a", tensors)))
    assert found == {"experts.up_blocks": "experts.up", "experts.up_scales": "experts.up"}


def test_a_buffer_that_both_have_is_not_lacking(tmp_path: Path) -> None:
    folders = [
        saved(tmp_path / name, plain(scale) | {"a.position_ids": torch.arange(3)})
        for name, scale in (("b", 1.0), ("t", 2.0))
    ]
    report = merge(folders[0], [folders[1]], tmp_path / "out", method="mean", progress=False)
    assert report.notes == []
