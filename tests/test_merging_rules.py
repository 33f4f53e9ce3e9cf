"""Sources and the rules for what is not a linear weight: biases, tied weights, added tokens, converted adapters."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from merging_files import (
    MODELS,
    TARGETS,
    linear_weights,
    llama_config,
    load,
    merged_by,
    randomised,
    save_adapter,
    save_base,
    save_lora,
    save_oftv2,
    tensors_of,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertForMaskedLM, LlamaForCausalLM, PreTrainedModel

from orthoft.delta import Rotated, SubspaceRotated
from orthoft.merging import merge
from orthoft.merging.files.tensors import TensorFolder, as_matrix
from orthoft.merging.formats.boft import butterfly_update
from orthoft.merging.sources.adapter import AdapterSource, CheckpointSource, open_source

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: save_base(tmp_path_factory.mktemp("base") / kind, kind) for kind in MODELS}
    config = llama_config()
    config.tie_word_embeddings = True
    folders["tied"] = tmp_path_factory.mktemp("tied")
    randomised(LlamaForCausalLM(config), seed=7).save_pretrained(folders["tied"])
    return folders


def llama(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model


def close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name], atol=5e-6, rtol=1e-5, msg=name)


def edit(folder: Path, change: dict[str, Tensor | None]) -> None:
    """Replace tensors of an adapter's file, or take them away."""
    tensors = load_file(folder / "adapter_model.safetensors") | change
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kwargs", [{}, {"use_rslora": True, "alpha_pattern": {"query": 3}, "bias": "lora_only"}])
def test_a_bias_of_lora_changes_the_bias_of_the_layer(
    kwargs: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    kwargs = {"target_modules": TARGETS["bert"], "lora_alpha": 12, "lora_bias": True, **kwargs}
    tuned = save_lora(tmp_path / "a", load(bases["bert"]), **kwargs)
    base = TensorFolder(bases["bert"])
    got = merged_by(open_source("a", tmp_path / "a", base), base)
    want = tuned.merge_and_unload().state_dict()
    close(got, want)
    biases = [name for name in got if name.endswith(".bias")]
    assert len(biases) == len(linear_weights(bases["bert"], "bert"))
    assert all((want[name] - base[name]).norm() > 1e-2 for name in biases)


def test_a_bias_that_the_base_has_no_place_for_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    save_lora(tmp_path / "a", llama(bases["llama"]), target_modules=["q_proj"])
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"
    base = TensorFolder(bases["llama"])
    edit(tmp_path / "a", {key: torch.zeros(32)})
    assert "model.layers.0.self_attn.q_proj.bias" not in open_source("a", tmp_path / "a", base).ranks
    edit(tmp_path / "a", {key: torch.ones(32)})
    with pytest.raises(ValueError, match=r"q_proj' has lora_B\.bias, and the base has no bias of its shape there$"):
        open_source("a", tmp_path / "a", base)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("kwargs", [{}, {"use_rslora": True}, {"rank_pattern": {"query": 2}}], ids=str)
def test_converted_adapters_equal_the_model_they_were_trained_as(
    init: str, kwargs: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    """PiSSA and OLoRA change the base; saved with ``path_initial_model_for_weight_conversion`` they are plain LoRAs."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["query"], init_lora_weights=init, **kwargs)
    tuned = get_peft_model(load(bases["bert"]), config)
    config.init_lora_weights = True
    tuned.save_pretrained(tmp_path / "start")
    config.init_lora_weights = init  # type: ignore[assignment]
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "raw")
    tuned.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    base = TensorFolder(bases["bert"])
    source = open_source("a", tmp_path / "a", base)
    assert set(source.ranks.values()) == {4 if "rank_pattern" in kwargs else 8}
    got = merged_by(source, base)
    merged = tuned.merge_and_unload().state_dict()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, merged[name], atol=2e-5, rtol=1e-4)
        assert (tensor - base[name]).norm() > 1e-2
    with pytest.raises(
        ValueError, match=rf"'{init}', which no change .* \(convert it: save_pretrained with path_initial_model"
    ):
        open_source("a", tmp_path / "raw", base)


class BlockDiagonal:
    """Stands for PEFT's CUDA kernel, without which it trains one factor only."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


@pytest.mark.parametrize(("size", "factors"), [(4, 2), (4, 3), (2, 4), (8, 2)])
def test_boft_with_several_factors_equals_the_merge_of_peft(
    size: int, factors: int, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", BlockDiagonal)
    config = peft.BOFTConfig(
        boft_block_size=size, boft_n_butterfly_factor=factors, target_modules=["q_proj", "gate_proj"], bias="all"
    )
    tuned = randomised(get_peft_model(llama(bases["llama"]), config), "boft_R", std=0.4)
    tuned.save_pretrained(tmp_path / "a")
    base = TensorFolder(bases["llama"])
    source = open_source("a", tmp_path / "a", base)
    name = "model.layers.1.self_attn.q_proj.weight"
    delta = source.delta(name, base[name])
    assert isinstance(delta, Rotated)  # no scales were trained
    assert delta.update.shape == (32 // (size * 2 ** (factors - 1)), *[size * 2 ** (factors - 1)] * 2)
    randomised(tuned, "boft_s", std=0.4)
    tuned.save_pretrained(tmp_path / "b")
    for folder in ("a", "b"):
        got = merged_by(open_source("a", tmp_path / folder, base), base)
        again = PeftModel.from_pretrained(llama(bases["llama"]), tmp_path / folder)
        close(got, again.merge_and_unload().state_dict())
        assert all((got[name] - base[name]).norm() > 0.1 for name in got)


def test_butterfly_factors_need_even_blocks_and_enough_of_them() -> None:
    for shape in [(2, 3, 4, 4), (2, 4, 3, 3), (3, 2, 4, 4)]:
        with pytest.raises(ValueError, match="cannot have"):
            butterfly_update(torch.zeros(shape))
    assert butterfly_update(torch.zeros(1, 3, 5, 5)).shape == (3, 5, 5)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 8, 1), nn.Conv1d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.b(self.a(x)).flatten(2))
        return y


CONVOLUTIONS: dict[str, Any] = {
    "LoRA": LoraConfig(r=3, lora_alpha=5, target_modules=["a", "b", "c"], init_lora_weights=False),
    "LoRA with a bias": LoraConfig(r=3, target_modules=["a", "b"], lora_bias=True, init_lora_weights=False),
    "DoRA": LoraConfig(r=3, target_modules=["a", "b"], use_dora=True, init_lora_weights=False),
    "OFT": peft.OFTConfig(oft_block_size=2, target_modules=["a", "b"], init_weights=False),
    "BOFT": peft.BOFTConfig(boft_block_size=2, target_modules=["a", "b"], init_weights=False),
}


@pytest.mark.parametrize("variant", CONVOLUTIONS)
def test_convolutions_equal_the_merge_of_peft(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Convolutions()
    (tmp_path / "base").mkdir()
    save_file({name: t.clone() for name, t in model.state_dict().items()}, tmp_path / "base" / "model.safetensors")
    tuned = get_peft_model(model, CONVOLUTIONS[variant])
    tuned.save_pretrained(tmp_path / "a")
    base = TensorFolder(tmp_path / "base")
    got = merged_by(open_source("a", tmp_path / "a", base), base)
    assert len(got) >= 2
    close(got, tuned.merge_and_unload().state_dict())
    assert all((got[name] - base[name]).norm() > 1e-2 for name in got)


@pytest.mark.parametrize("kind", ["list", "by module", "alone"])
def test_trained_tokens_replace_rows(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    indices: dict[str, Any] = {"list": [3, 1], "by module": {"embed_tokens": [3, 1]}}
    config = (
        peft.TrainableTokensConfig(token_indices=[3, 1])
        if kind == "alone"
        else LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices[kind])
    )
    tuned = get_peft_model(llama(bases["tied"]), config)
    randomised(tuned, "lora_")
    randomised(tuned, "trainable_tokens_delta", std=0.5)
    tuned.save_pretrained(tmp_path / "a")
    base = TensorFolder(bases["tied"])
    source = open_source("a", tmp_path / "a", base)
    assert source.ranks[EMBEDDING] == 2
    close(merged_by(source, base), tuned.merge_and_unload().state_dict())
    assert source.notes == [f"{EMBEDDING}: where the base ties it to an output head, both change"]
    changed = source.delta(EMBEDDING, base[EMBEDDING]).dense().norm(dim=1).nonzero().flatten().tolist()
    assert changed == [1, 3]


@pytest.mark.parametrize(
    ("indices", "message"),
    [([1, 60], "token 60 is new, the base has 60 rows"), ([1, 1], "2 rows"), ([1], "2 rows"), ("x", "is no list")],
)
def test_tokens_that_are_not_there_are_refused(
    indices: Any, message: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 3])
    get_peft_model(llama(bases["llama"]), config).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trainable_token_indices": indices}))
    base = TensorFolder(bases["llama"])
    with pytest.raises(ValueError, match=message) as caught:
        merged_by(open_source("a", tmp_path / "a", base), base)
    assert str(caught.value).startswith("source 'a': ")


def test_a_tied_head_may_only_change_with_its_embedding(bases: dict[str, Path], tmp_path: Path) -> None:
    base = TensorFolder(bases["tied"])
    message = (
        rf"^source 'a': '{HEAD}' is not the base's '{EMBEDDING}', to which the base ties it .*: save the base with"
    )
    for number, kwargs in enumerate([{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}]):
        save_lora(tmp_path / str(number), llama(bases["tied"]), **{"target_modules": ["q_proj"], **kwargs})
        with pytest.raises(ValueError, match=message):
            open_source("a", tmp_path / str(number), base)


def test_a_lora_of_tied_weights_counts_once(bases: dict[str, Path], tmp_path: Path) -> None:
    """As in PEFT's forward; its merge adds to the shared tensor once for the embedding and once for the head."""
    kwargs = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    tuned = save_lora(tmp_path / "a", llama(bases["tied"]), **kwargs)
    base = TensorFolder(bases["tied"])
    source = open_source("a", tmp_path / "a", base)
    got = merged_by(source, base)
    assert list(got) == [EMBEDDING]
    tokens = torch.arange(10).reshape(2, 5)
    want = tuned.eval()(tokens).logits
    model = llama(bases["tied"])
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(got[EMBEDDING])
        torch.testing.assert_close(model.eval()(tokens).logits, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("equal", [True, False])
def test_a_checkpoint_whose_head_the_base_ties(equal: bool, bases: dict[str, Path], tmp_path: Path) -> None:
    base = TensorFolder(bases["tied"])
    tensors = tensors_of(bases["tied"])
    tensors[EMBEDDING] = tensors[EMBEDDING] + 1
    tensors[HEAD] = tensors[EMBEDDING].clone() + (0 if equal else 1e-3)
    save_file(tensors, tmp_path / "model.safetensors")
    if equal:
        assert open_source("a", tmp_path, base).not_carried == []
    else:
        with pytest.raises(ValueError, match=f"^source 'a': '{HEAD}' is not the base's '{EMBEDDING}'"):
            open_source("a", tmp_path, base)


def test_a_head_that_only_the_base_stores_follows_its_embedding(bases: dict[str, Path], tmp_path: Path) -> None:
    tensors = tensors_of(bases["tied"])
    (tmp_path / "both").mkdir()
    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, tmp_path / "both" / "model.safetensors")
    (tmp_path / "tuned").mkdir()
    tuned = tensors | {EMBEDDING: tensors[EMBEDDING] + 1}
    save_file(tuned, tmp_path / "tuned" / "model.safetensors")
    base = TensorFolder(tmp_path / "both")
    source = open_source("a", tmp_path / "tuned", base)
    close(merged_by(source, base), tuned | {HEAD: tuned[EMBEDDING]})
    assert HEAD in source.ranks
    assert source.notes == [f"a stores no {HEAD}: it is tied to {EMBEDDING}, as in the base"]


def grown(folder: Path) -> PreTrainedModel:
    model = BertForMaskedLM.from_pretrained(folder)
    model.resize_token_embeddings(64)
    randomised(model, "embeddings", seed=3)
    return model  # type: ignore[no-any-return]


def test_added_tokens_are_listed_and_the_others_merged(bases: dict[str, Path], tmp_path: Path) -> None:
    BertForMaskedLM.from_pretrained(bases["bert"]).save_pretrained(tmp_path / "base")
    grown(tmp_path / "base").save_pretrained(tmp_path / "checkpoint")
    adapted = get_peft_model(grown(tmp_path / "base"), LoraConfig(target_modules=["query"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    base = TensorFolder(tmp_path / "base")
    name = "bert.embeddings.word_embeddings.weight"
    for kind, saved in [("checkpoint", None), ("adapter", f"base_model.model.{name}")]:
        source = open_source(kind, tmp_path / kind, base)
        assert f"{name}: rows 60 to 63 (the base has 60 rows)" in source.not_carried
        want = tensors_of(tmp_path / kind)[saved or name]
        assert want.shape == (64, 32)
        close(merged_by(source, base), merged_by(source, base) | {name: want[:60]})
        assert source.delta(name, base[name]).norm() > 1
    assert [line.split(":")[0] for line in open_source("c", tmp_path / "checkpoint", base).not_carried] == [
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.bias",
    ]


def test_fewer_tokens_or_other_shapes_are_another_base(bases: dict[str, Path], tmp_path: Path) -> None:
    tensors = tensors_of(bases["llama"])
    base = TensorFolder(bases["llama"])
    up = "model.layers.0.mlp.up_proj.weight"
    for name, shape in [(EMBEDDING, (59, 32)), (EMBEDDING, (64, 16)), (up, (50, 32)), (HEAD, (64, 33))]:
        save_file(tensors | {name: torch.zeros(shape)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"^source 'a': fine-tuned from another base: "):
            open_source("a", tmp_path, base)


def test_a_checkpoint_is_read_row_by_row(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = randomised(MODELS["llama"](), seed=9)
    tuned.save_pretrained(tmp_path, max_shard_size="20KB")
    base = TensorFolder(bases["llama"])
    source = open_source("a", tmp_path, base)
    assert isinstance(source, CheckpointSource)
    weights = {name: as_matrix(base[name]) for name in base}
    wanted = {name: as_matrix(tuned.state_dict()[name]) - weights[name] for name in base}
    monkeypatch.setattr(TensorFolder, "__getitem__", lambda self, name: pytest.fail(f"all of {name} was read"))
    monkeypatch.setattr("orthoft.merging.sources.rows.CHUNK", 100)
    for name in (name for name in base if len(base.shape(name)) == 2):
        delta, rows = source.delta(name, weights[name]), base.shape(name)[0]
        for start, stop in [(0, 1), (5, 17), (rows - 3, rows), (rows - 3, rows + 5), (4, 4)]:
            torch.testing.assert_close(delta.rows(start, stop), wanted[name][start:stop], atol=0, rtol=0)
        assert delta.upcast().dense().equal(wanted[name])
        torch.testing.assert_close(delta.norm(), wanted[name].norm())


def test_nan_is_told_when_its_rows_are_read(bases: dict[str, Path], tmp_path: Path) -> None:
    tensors = tensors_of(bases["llama"])
    tensors[EMBEDDING][40, 3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    base = TensorFolder(bases["llama"])
    delta = open_source("a", tmp_path, base).delta(EMBEDDING, base[EMBEDDING])
    assert delta.rows(0, 40).norm() == 0
    for read in (lambda: delta.rows(40, 41), delta.dense, delta.norm):
        with pytest.raises(ValueError, match=f"^source 'a': tensor '{EMBEDDING}' contains NaN or Inf$"):
            read()


@pytest.mark.parametrize("config", [peft.HRAConfig(r=3), peft.HRAConfig(r=40, apply_GS=True), peft.PsoftConfig(r=5)])
def test_rotations_of_a_subspace_are_told_as_such(config: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    config.target_modules = {"q_proj"}
    if isinstance(config, peft.PsoftConfig):
        config.psoft_mag_a = config.psoft_mag_b = False
    tuned = randomised(get_peft_model(llama(bases["llama"]), config), "hra_u")
    randomised(tuned, "psoft_R")
    tuned.save_pretrained(tmp_path / "a")
    base = TensorFolder(bases["llama"])
    source = open_source("a", tmp_path / "a", base)
    for name in source.ranks:
        delta = source.delta(name, base[name])
        assert isinstance(delta, SubspaceRotated)
        C = delta.update + torch.eye(len(delta.update))
        torch.testing.assert_close(C @ C.mT, torch.eye(len(C)), atol=1e-5, rtol=0)
        torch.testing.assert_close(delta.basis @ delta.basis.mT, torch.eye(len(C)), atol=1e-5, rtol=0)
        assert (C - torch.eye(len(C))).norm() > 0.1


def test_tokens_and_biases_are_not_lost_in_conversions(bases: dict[str, Path], tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1])
    get_peft_model(llama(bases["llama"]), config).save_pretrained(tmp_path / "a")
    source = AdapterSource("a", tmp_path / "a", TensorFolder(bases["llama"]))
    with pytest.raises(ValueError, match=f"also changes '{EMBEDDING}' .*: merge it instead"):
        source.beside()


def test_a_weighted_list_of_all_kinds(bases: dict[str, Path], tmp_path: Path) -> None:
    """Mixed kinds, ranks and target modules: the weighted sum of what PEFT merges."""
    base = tensors_of(bases["llama"])
    adapters: dict[str, Any] = {
        "lora": LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
        "vera": peft.VeraConfig(r=6, target_modules=["q_proj", "k_proj"], d_initial=1.0),
        "boft": peft.BOFTConfig(boft_block_size=4, target_modules=["k_proj", "up_proj"], init_weights=False),
    }
    weights = {"lora": 0.5, "vera": -1.0, "boft": 0.25, "oftv2": 2.0, "tuned": 0.1}
    wanted = {name: tensor.double() for name, tensor in base.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, config in adapters.items():
            tuned = get_peft_model(llama(bases["llama"]), config)
            tuned = randomised(tuned, "vera_lambda") if kind == "vera" else tuned
            tuned.save_pretrained(tmp_path / kind)
            for name, tensor in tuned.merge_and_unload().state_dict().items():
                wanted[name] += weights[kind] * (tensor.double() - base[name].double())
    modules = {module: pair for module, pair in linear_weights(bases["llama"], "llama").items() if "down" in module}
    for name, delta in save_oftv2(tmp_path / "oftv2", modules).items():
        wanted[name] += weights["oftv2"] * delta
    randomised(MODELS["llama"](), seed=5).save_pretrained(tmp_path / "tuned")
    for name, tensor in tensors_of(tmp_path / "tuned").items():
        wanted[name] += weights["tuned"] * (tensor.double() - base[name].double())
    report = merge(
        bases["llama"],
        [(kind, tmp_path / kind) for kind in weights],
        tmp_path / "out",
        method="task_arithmetic",
        weights=list(weights.values()),
        progress=False,
    )
    assert list(report.sources.values()) == ["LORA", "VERA", "BOFT", "ORTHOFT_OFTV2", "checkpoint"]
    for name, tensor in tensors_of(tmp_path / "out").items():
        torch.testing.assert_close(tensor.double(), wanted[name], atol=1e-5, rtol=1e-5, msg=name)


def save_tensors(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_counters_and_empty_tensors_stay_as_in_the_base(tmp_path: Path) -> None:
    base = {
        "a.weight": torch.ones(4, 4),
        "norm.steps": torch.tensor(3),
        "mask": torch.tensor([True, False]),
        "scale": torch.tensor(2.0),
        "no.rows": torch.ones(0, 4),
        "no.columns": torch.ones(4, 0),
        "nothing": torch.ones(0),
    }
    save_tensors(tmp_path / "base", base)
    tuned = {**base, "a.weight": torch.eye(4), "norm.steps": torch.tensor(5), "scale": torch.tensor(4.0)}
    save_tensors(tmp_path / "tuned", tuned)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    factors = {"a.lora_A.weight": torch.ones(1, 4), "a.lora_B.weight": torch.ones(4, 1)}
    save_adapter(tmp_path / "lora", config, {**factors, "norm.steps": torch.tensor(7), "no.rows": torch.ones(0, 4)})
    report = merge(tmp_path / "base", [tmp_path / "tuned", tmp_path / "lora"], tmp_path / "out", method="mean")
    got = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(got.pop("a.weight"), torch.ones(4, 4) + (torch.eye(4) - 1 + 1) / 2)
    assert got.pop("scale") == 3
    assert all(torch.equal(tensor, base[name]) for name, tensor in got.items())
    left = "norm.steps: the base stores it as torch.int64, which is not merged"
    assert report.not_carried == {"tuned": [left], "lora": [left]}


def test_codes_of_a_quantised_source_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "base", {"a.weight": torch.ones(4, 4)})
    save_tensors(tmp_path / "codes", {"a.weight": torch.ones(4, 4, dtype=torch.int8)})
    with pytest.raises(ValueError, match=r"^source 'codes': 'a.weight' is stored as torch.int8, .* dequantise the"):
        merge(tmp_path / "base", [tmp_path / "codes"], tmp_path / "out", method="mean")
