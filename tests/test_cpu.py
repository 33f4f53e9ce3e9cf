"""Types that a CPU only imitates are known, and a recipe that would train in one says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from orthoft.recipes.cpu import computes_in
from orthoft.recipes.devices import slow_type
from orthoft.recipes.schema import Recipe

OLD = {"avx2": True, "f16c": True, "avx512_bf16": False, "amx_bf16": False, "avx512_fp16": False}


@pytest.fixture
def capable(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the CPU is said to be capable of: nothing beyond AVX2, to begin with."""
    found: dict[str, object] = dict(OLD)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    return found


def recipe(**words: Any) -> Recipe:
    data = {split: f"{split}.jsonl" for split in ("train", "tuning", "test")}
    task = {"name": "a", "kind": "causal-lm", "data": data, "adapter": {"type": "oftv2"}, "training": {"max_steps": 1}}
    return Recipe.model_validate({"name": "tiny", "base": "b", "output": "o", "tasks": [task], **words})


def base(folder: Path, dtype: str) -> Path:
    LlamaConfig(dtype=dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("dtype", "key"), [(torch.bfloat16, "amx_bf16"), (torch.float16, "avx512_fp16")])
def test_instructions_are_looked_up(dtype: torch.dtype, key: str, capable: dict[str, object]) -> None:
    assert not computes_in(dtype)
    assert computes_in(torch.float32)
    capable[key] = True
    assert computes_in(dtype)


def test_a_torch_that_cannot_tell_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert computes_in(torch.bfloat16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_slow_type_is_told(dtype: str, capable: dict[str, object], tmp_path: Path) -> None:
    folder = base(tmp_path, dtype)
    assert str(slow_type(recipe(), folder)).startswith(f"{dtype} is slow on this CPU")
    assert slow_type(recipe(dtype="float32"), folder) is None
    assert slow_type(recipe(quantization={"load_in_8bit": True}), folder) is None
    assert str(slow_type(recipe(dtype=dtype), base(tmp_path, "float32"))).startswith(dtype)
    assert slow_type(recipe(), folder) is None


def test_an_accelerator_is_not_asked(
    capable: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    folder = base(tmp_path, "bfloat16")
    assert slow_type(recipe(), folder) is None
    assert slow_type(recipe(device="cpu"), folder) is not None
