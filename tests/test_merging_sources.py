"""Readers and sources: each format's delta against PEFT's own merge, or against the dense formula in float64."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from merging_files import (
    MODELS,
    TARGETS,
    classifier,
    linear_weights,
    load,
    merged_by,
    save_adapter,
    save_base,
    save_hra,
    save_lora,
    save_oftv2,
    tensors_of,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, BertModel, PreTrainedModel

from orthoft.adapters import GOFTConfig, PSOFTConfig, SVFTConfig
from orthoft.merging import plan
from orthoft.merging.files.tensors import TensorFolder
from orthoft.merging.formats.ours import READERS
from orthoft.merging.sources.adapter import open_source
from orthoft.merging.sources.orientation import Orientation

LORAS: dict[str, dict[str, Any]] = {
    "alpha over r": {"lora_alpha": 12},
    "rsLoRA": {"lora_alpha": 12, "use_rslora": True},
    "patterns": {
        "rank_pattern": {"query": 2, r".*\.1\..*down_proj": 3, "^h.0.attn.c_attn": 1, "c_proj": 6},
        "alpha_pattern": {"encoder.layer.1.attention.self.query": 9, "layers.0.self_attn.q_proj": 5, "mlp.c_proj": 2},
    },
    "rsLoRA with patterns": {"rank_pattern": {"query": 2, "q_proj": 2, "c_fc": 2}, "use_rslora": True},
    "DoRA": {"dora": True, "lora_alpha": 12},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_base(tmp_path_factory.mktemp("base") / kind, kind) for kind in MODELS}


def load_class(kind: str, folder: Path) -> PreTrainedModel:
    return load(folder) if kind == "bert" else AutoModelForCausalLM.from_pretrained(folder)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], atol: float = 2e-6) -> None:
    for name, tensor in got.items():
        torch.testing.assert_close(tensor.double(), want[name].double(), atol=atol, rtol=1e-5, msg=name)


@pytest.mark.parametrize("variant", LORAS)
@pytest.mark.parametrize("kind", MODELS)
def test_lora_equals_the_merge_of_peft(kind: str, variant: str, bases: dict[str, Path], tmp_path: Path) -> None:
    tuned = save_lora(tmp_path / "lora", load_class(kind, bases[kind]), target_modules=TARGETS[kind], **LORAS[variant])
    base = TensorFolder(bases[kind])
    got = merged_by(open_source("a", tmp_path / "lora", base), base)
    assert len(got) == len(linear_weights(bases[kind], kind))
    want = tuned.merge_and_unload().state_dict()
    assert_same(got, want)
    assert all((want[name] - base[name]).norm() > 1e-2 for name in got)


def test_lora_on_embeddings_equals_the_merge_of_peft(bases: dict[str, Path], tmp_path: Path) -> None:
    tuned = save_lora(tmp_path / "lora", load(bases["bert"]), target_modules=["word_embeddings", "query"], lora_alpha=3)
    base = TensorFolder(bases["bert"])
    source = open_source("a", tmp_path / "lora", base)
    assert source.ranks["embeddings.word_embeddings.weight"] == 4
    assert_same(merged_by(source, base), tuned.merge_and_unload().state_dict())


def test_what_is_saved_beside_an_adapter_is_a_replacement(bases: dict[str, Path], tmp_path: Path) -> None:
    kwargs = {"target_modules": ["query"], "modules_to_save": ["classifier", "pooler"], "bias": "all"}
    tuned = save_lora(tmp_path / "lora", classifier(bases["bert"]), **kwargs)
    base = TensorFolder(bases["bert"])
    source = open_source("a", tmp_path / "lora", base)
    got = merged_by(source, base)
    merged = tuned.merge_and_unload().state_dict()
    assert_same(got, {name.removeprefix("bert."): tensor for name, tensor in merged.items()})
    assert {"pooler.dense.weight", "pooler.dense.bias", "encoder.layer.0.attention.self.query.bias"} <= got.keys()
    assert source.not_carried == [
        "classifier.bias: the base has no such tensor",
        "classifier.weight: the base has no such tensor",
    ]


@pytest.mark.parametrize("map", ["series", "cayley"])
@pytest.mark.parametrize("block_share", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_oftv2_equals_the_formula(
    kind: str, block_share: bool, map: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    deltas = save_oftv2(tmp_path / "a", linear_weights(bases[kind], kind), map, block_share)
    base = TensorFolder(bases[kind])
    got = merged_by(open_source("a", tmp_path / "a", base), base)
    assert got.keys() == deltas.keys()
    assert_same(got, {name: base[name].double() + delta for name, delta in deltas.items()})


@pytest.mark.parametrize("orthonormal", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_hra_equals_the_formula(kind: str, orthonormal: bool, bases: dict[str, Path], tmp_path: Path) -> None:
    deltas = save_hra(tmp_path / "a", linear_weights(bases[kind], kind), orthonormal)
    base = TensorFolder(bases[kind])
    source = open_source("a", tmp_path / "a", base)
    assert set(source.ranks.values()) == {8 if orthonormal else 4}
    assert_same(merged_by(source, base), {name: base[name].double() + delta for name, delta in deltas.items()})


def test_a_checkpoint_is_its_difference_to_the_base(bases: dict[str, Path], tmp_path: Path) -> None:
    """Other names (a head's class around the encoder), other shards: the same weights are found."""
    tuned = classifier(bases["bert"])
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    base = TensorFolder(bases["bert"])
    source = open_source("a", tmp_path / "tuned", base)
    got = merged_by(source, base)
    assert got.keys() == set(base)
    assert_same(got, {name.removeprefix("bert."): tensor for name, tensor in tuned.state_dict().items()})
    assert [line.split(":")[0] for line in source.not_carried] == ["classifier.bias", "classifier.weight"]


@pytest.mark.parametrize("formats", ["lora", "oftv2", "hra"])
def test_names_may_have_a_prefix_more_or_less(formats: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """An adapter of the bare encoder on a checkpoint with a head, and the reverse."""
    bare = bases["bert"]
    whole = tmp_path / "whole"
    BertForMaskedLM.from_pretrained(bare).save_pretrained(whole)
    weights = {module: pair for module, pair in linear_weights(bare, "bert").items() if "query" in module}
    save = {"oftv2": save_oftv2, "hra": save_hra}.get(formats)
    if save is None:
        save_lora(tmp_path / "bare", load(bare), target_modules=["query"])
        save_lora(tmp_path / "headed", classifier(bare), target_modules=["query"])
    else:
        save(tmp_path / "bare", weights)
        save(tmp_path / "headed", {f"bert.{module}": pair for module, pair in weights.items()})
    for adapter, folder, prefix, own in [("bare", whole, "bert.", ""), ("headed", bare, "", "bert.")]:
        base = TensorFolder(folder)
        source = open_source("a", tmp_path / adapter, base)
        assert set(source.ranks) == {f"{prefix}{module}.weight" for module in weights}
        assert {source.module(name) for name in source.ranks} == {f"{own}{module}" for module in weights}
        assert all(source.delta(name, base[name]).norm() > 1e-3 for name in source.ranks)


def test_a_reader_reads_only_the_tensors_of_its_weight(bases: dict[str, Path], tmp_path: Path) -> None:
    save_lora(tmp_path / "lora", load(bases["bert"]), target_modules=["query"])
    base = TensorFolder(bases["bert"])
    source = open_source("a", tmp_path / "lora", base)
    read: list[str] = []
    tensors = source._file.tensors  # type: ignore[attr-defined]
    original = type(tensors).__getitem__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorFolder, "__getitem__", lambda self, name: read.append(name) or original(self, name))
        name = next(iter(source.ranks))
        source.delta(name, torch.zeros(32, 32))
    assert sorted(key.rpartition("lora_")[2] for key in read) == ["A.weight", "B.weight"]


REFUSED = [
    ({"use_bdlora": {"x": 1}, "kasa_config": {"y": 1}}, "it uses use_bdlora, kasa_config, which is not read: load it"),
    ({"init_lora_weights": "pissa_niter_4"}, "it uses init_lora_weights='pissa_niter_4', which no change of its"),
    (
        {"init_lora_weights": "olora"},
        "can represent (convert it: save_pretrained with path_initial_model_for",
    ),
    ({"init_lora_weights": "loftq"}, "it uses init_lora_weights='loftq', which no change"),
    ({"layer_replication": [[0, 2]], "use_qalora": True}, "it uses use_qalora, layer_replication, which no change"),
    ({"trainable_token_indices": [1]}, "'trainable_token_indices' in its configuration and in its tensors disagree"),
    ({"peft_type": "LOHA"}, "its peft_type 'LOHA' is not read: load it in PEFT, merge_and_unload(), save_pretrained"),
    ({"peft_type": "P_TUNING"}, "its peft_type 'P_TUNING' is a prompt, which no change of the weights can represent"),
    (
        {"peft_type": "NOBODY"},
        "Choose from: BOFT, HRA, LORA, OFT, ORTHOFT_GOFT, ORTHOFT_HRA, ORTHOFT_OFTV2, ORTHOFT_PSOFT, ",
    ),
    ({"peft_type": "ORTHOFT_HRB"}, "unknown peft_type 'ORTHOFT_HRB', did you mean 'ORTHOFT_HRA'? Choose from: BOFT,"),
    ({"r": 3}, "has rank 3 by its configuration and 4 by its tensors"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_represented_is_refused_by_name(
    change: dict[str, Any], message: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    save_lora(tmp_path / "lora", load(bases["bert"]), target_modules=["query"])
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    base = TensorFolder(bases["bert"])
    with pytest.raises(ValueError, match=r"^source 'a': ") as caught:
        merged_by(open_source("a", tmp_path / "lora", base), base)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_tensors_of_a_module_are_refused_by_name(bases: dict[str, Path], tmp_path: Path) -> None:
    save_lora(tmp_path / "lora", load(bases["bert"]), target_modules=["query"])
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(iter(tensors)).replace("lora_A.weight", "lora_new")] = torch.zeros(2)
    save_file(tensors, file)
    base = TensorFolder(bases["bert"])
    with pytest.raises(ValueError, match=r"^source 'a': module '.*query' has 'lora_new', which cannot be merged$"):
        merged_by(open_source("a", tmp_path / "lora", base), base)


def test_an_adapter_of_another_base_is_told_by_name_and_shape(bases: dict[str, Path], tmp_path: Path) -> None:
    config = BertConfig(hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=60)
    save_lora(tmp_path / "narrow", BertModel(config), target_modules=["query"])
    save_lora(tmp_path / "llama", load_class("llama", bases["llama"]), target_modules=["q_proj"])
    BertModel(config).save_pretrained(tmp_path / "narrow-tuned")
    base = TensorFolder(bases["bert"])
    query, q_proj = "encoder.layer.0.attention.self.query", "model.layers.0.self_attn.q_proj"
    for folder, message in [
        (
            "narrow",
            f"its module '{query}' has (16, 16) outputs and inputs, the base's '{query}.weight' has shape (32, 32)",
        ),
        ("llama", f"an adapter of another base: its module '{q_proj}' has no weight in {bases['bert']}"),
        ("narrow-tuned", "fine-tuned from another base: 'embeddings.LayerNorm.bias' has shape (16,), the base's"),
    ]:
        with pytest.raises(ValueError, match=r"^source 'a': ") as caught:
            open_source("a", tmp_path / folder, base)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_ambiguous_names_are_not_guessed(tmp_path: Path) -> None:
    weight = torch.zeros(4, 4)
    (tmp_path / "base").mkdir()
    save_file({"text.x.weight": weight, "vision.x.weight": weight + 0}, tmp_path / "base" / "model.safetensors")
    hra = {"peft_type": "ORTHOFT_HRA", "r": 2, "orthonormal": False}
    save_adapter(tmp_path / "a", hra, {"x.orthoft_hra_adapter.u": torch.ones(2, 4)})
    with pytest.raises(ValueError, match=r"^source 'a': its names are ambiguous in this base: 'x.weight' may be"):
        open_source("a", tmp_path / "a", TensorFolder(tmp_path / "base"))


def looked_up(folder: Path, layers: int, path: str) -> int:
    """Return how many look-ups of a shape it takes to plan the merge of two checkpoints; one of them is partial."""
    folder.mkdir()
    tensors = {}
    for layer in range(layers):
        for name, outputs in (("query", 4), ("up", 8)):
            tensors[path.format(layer) + f".{name}.weight"] = torch.ones(outputs, 4)
            tensors[path.format(layer) + f".{name}.bias"] = torch.ones(outputs)
    kept = list(tensors)[::2]
    for name, held in {"base": tensors, "whole": tensors, "part": {key: tensors[key] for key in kept}}.items():
        (folder / name).mkdir()
        save_file(held, folder / name / "model.safetensors")
    calls: list[str] = []
    shape = TensorFolder.shape
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorFolder, "shape", lambda self, name: calls.append(name) or shape(self, name))
        assert plan(folder / "base", [folder / "whole", folder / "part"], method="mean").merged.keys() == tensors.keys()
    return len(calls)


@pytest.mark.parametrize("path", ["model.layers.{}", "layer{}.attention"])
def test_planning_grows_with_the_number_of_tensors_and_no_faster(path: str, tmp_path: Path) -> None:
    few, many = (looked_up(tmp_path / str(layers), layers, path) for layers in (20, 80))
    assert many <= 4 * few


def test_a_square_weight_is_stored_as_the_nearest_that_tells(tmp_path: Path) -> None:
    shapes = {"h.0.attn.up": (4, 8), "h.0.attn.out": (4, 4), "g.0.up": (8, 4), "g.0.out": (4, 4), "h.1.plain": (4, 4)}
    tensors = {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    biases = {"h.0.attn.up": 8, "h.0.attn.out": 4, "g.0.up": 8, "g.0.out": 4}
    tensors |= {f"{name}.bias": torch.ones(size) for name, size in biases.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    says = Orientation(TensorFolder(tmp_path)).inputs_first
    assert {name: says(f"{name}.weight") for name in shapes} == {name: "attn" in name for name in shapes}


ADAPTERS: dict[str, Any] = {
    "OFT": peft.OFTConfig(oft_block_size=4, init_weights=False),  # 5 terms: degree 4
    "OFT, exact": peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, block_share=True, init_weights=False),
    "OFT, 2 terms, COFT": peft.OFTConfig(r=4, oft_block_size=0, num_cayley_neumann_terms=2, coft=True, eps=0.3),
    "HRA": peft.HRAConfig(r=3, init_weights=False),
    "HRA, Gram-Schmidt": peft.HRAConfig(r=3, apply_GS=True, init_weights=False),
    "PSOFT": peft.PsoftConfig(r=5),
    "PSOFT, symmetric, free": peft.PsoftConfig(r=5, ab_svd_init="pissa_init", psoft_orth=False, psoft_alpha=3),
    "PSOFT, bounded": peft.PsoftConfig(r=5, use_cayley_neumann=True, cayley_neumann_eps=0.3, psoft_svd="lowrank"),
    "VERA": peft.VeraConfig(r=5, d_initial=2.0),
    "VERA, drawn again": peft.VeraConfig(r=5, d_initial=2.0, save_projection=False, projection_prng_key=11),
    "BOFT": peft.BOFTConfig(boft_block_size=4),
    "BOFT, by number": peft.BOFTConfig(boft_block_size=0, boft_block_num=2, init_weights=False, bias="all"),
    "ORTHOFT_PSOFT": PSOFTConfig(r=5),
    "ORTHOFT_PSOFT, fingerprint": PSOFTConfig(r=5, relax=False, map="series", save_basis=False),
    "ORTHOFT_GOFT": GOFTConfig(block_size=8),
    "ORTHOFT_GOFT, quasi": GOFTConfig(mode="quasi", scale=True),
    "ORTHOFT_SVFT": SVFTConfig(pattern="banded"),
    "ORTHOFT_SVFT, truncated": SVFTConfig(pattern="random", rank=7, gate=True, save_basis=True),
}


@pytest.mark.parametrize("variant", ADAPTERS)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_other_methods_equal_their_merge_in_peft(
    kind: str, variant: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    config = replace(ADAPTERS[variant], target_modules=set(TARGETS[kind]))
    torch.manual_seed(0)
    tuned = peft.get_peft_model(load_class(kind, bases[kind]), config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "a")
    base = TensorFolder(bases[kind])
    got = merged_by(open_source("a", tmp_path / "a", base), base)
    want = tuned.merge_and_unload().state_dict()
    assert_same(got, want, atol=1e-5)
    assert all((want[name] - base[name]).norm() > 1e-1 for name in got)


def test_every_reader_is_tested() -> None:
    tested = {
        "LORA",
        "ORTHOFT_OFTV2",
        "ORTHOFT_HRA",
        "TRAINABLE_TOKENS",
        *(variant.partition(",")[0] for variant in ADAPTERS),
    }
    assert set(READERS) == tested


def test_the_merge_of_peft_is_what_its_forward_computes(bases: dict[str, Path], tmp_path: Path) -> None:
    """The oracle above is PEFT's merge: its forward has to agree with our merged weights too (DoRA, float32)."""
    save_lora(tmp_path / "lora", load(bases["bert"]), target_modules=["query"], dora=True)
    base = TensorFolder(bases["bert"])
    merged = load(bases["bert"])
    merged.load_state_dict(tensors_of(bases["bert"]) | merged_by(open_source("a", tmp_path / "lora", base), base))
    tokens = torch.arange(10).reshape(2, 5)
    want = PeftModel.from_pretrained(load(bases["bert"]), tmp_path / "lora").eval()(tokens).last_hidden_state
    torch.testing.assert_close(merged.eval()(tokens).last_hidden_state, want, atol=1e-5, rtol=1e-5)
