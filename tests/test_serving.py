"""LoRAs for programs that serve them: one rank for all layers, and what is told of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from merging_files import save_base
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from orthoft import HRAConfig
from orthoft.cli import main
from orthoft.convert import serving_notes, to_lora
from orthoft.merging import merge

TARGETS = ["q_proj", "k_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("serving") / "llama", "llama")


def saved(base: Path, folder: Path, config: Any) -> Path:
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


def lora(base: Path, folder: Path, **options: Any) -> Path:
    return saved(base, folder, peft.LoraConfig(target_modules=TARGETS, init_lora_weights=False, **options))


def logits(base: Path, folder: Path) -> Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


def test_one_rank_gives_the_same_numbers(base: Path, tmp_path: Path) -> None:
    source = saved(
        base,
        tmp_path / "hra",
        HRAConfig(r=6, target_modules=TARGETS, rank_pattern={"k_proj": 2}, init_weights=False),
    )
    to_lora(source, tmp_path / "several")
    done = to_lora(source, tmp_path / "one", pad_rank=True)
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (6, 6, {}, {})
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / "one" / "adapter_model.safetensors").items()}
    assert {shape[0 if "lora_A" in name else 1] for name, shape in shapes.items()} == {6}
    assert {layer.rank for layer in done.layers} == {6}
    torch.testing.assert_close(logits(base, tmp_path / "one"), logits(base, tmp_path / "several"), rtol=0, atol=1e-5)
    assert "layers of rank 2, 6" in " ".join(serving_notes(tmp_path / "several"))
    assert serving_notes(tmp_path / "one") == []


def test_a_merged_lora_is_padded_by_converting_it(base: Path, tmp_path: Path) -> None:
    sources = [lora(base, tmp_path / "a", r=4, rank_pattern={"k_proj": 1}), lora(base, tmp_path / "b", r=2)]
    merge(base, sources, tmp_path / "merged", method="mean", output="lora")
    with pytest.raises(SystemExit) as exit_:
        main(["convert", str(tmp_path / "merged"), str(tmp_path / "one"), "--pad-rank"])
    assert exit_.value.code == 0
    assert serving_notes(tmp_path / "merged")
    assert serving_notes(tmp_path / "one") == []
    torch.testing.assert_close(logits(base, tmp_path / "one"), logits(base, tmp_path / "merged"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 8}, None),
        ({"r": 20}, "rank 20 needs --max-lora-rank 32"),
        ({"r": 600}, "rank 600 is above the 512 that vLLM takes"),
        ({"r": 4, "use_dora": True}, "use_dora: vLLM refuses it"),
        ({"r": 4, "bias": "all"}, "bias='all': vLLM refuses it"),
        ({"r": 4, "use_rslora": True}, "use_rslora: llama.cpp scales by alpha / r"),
        ({"r": 4, "modules_to_save": ["lm_head"]}, "modules_to_save lm_head: vLLM and llama.cpp take factors only"),
        ({"r": 4, "alpha_pattern": {"k_proj": 1}}, "older vLLM and llama.cpp's converter do not read rank_pattern"),
    ],
)
def test_what_is_told(options: dict[str, Any], words: str | None, base: Path, tmp_path: Path) -> None:
    notes = serving_notes(lora(base, tmp_path / "lora", **options))
    assert all("\n" not in note for note in notes)
    if words is None:
        assert notes == []
    else:
        assert any(words in note for note in notes), notes


def test_of_embeddings_and_other_adapters(base: Path, tmp_path: Path) -> None:
    words = peft.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    assert "LoRAs of embeddings" in serving_notes(saved(base, tmp_path / "words", words))[0]
    ours = HRAConfig(r=2, target_modules=["q_proj"])
    assert "this is ORTHOFT_HRA" in serving_notes(saved(base, tmp_path / "hra", ours))[0]
    with pytest.raises(FileNotFoundError, match=r"no adapter in .*llama"):
        serving_notes(base)
