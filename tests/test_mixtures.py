"""Adapters on the fused experts of mixtures: one rotation of what all experts of a layer read, trained and merged."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from merging_files import randomised
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_merging_parameters import MODELS, UP_AND_DOWN, close, loaded, save_base, save_lora
from tiny import write_rows
from torch import Tensor
from transformers import PreTrainedModel

import orthoft
from orthoft import ADAPTERS
from orthoft.convert import to_lora
from orthoft.merging import merge, plan
from orthoft.merging.files.tensors import TensorFolder
from orthoft.merging.sources.adapter import open_source
from orthoft.recipes import RecipeError, load
from orthoft.recipes.live_merge import LiveMerge
from orthoft.recipes.rehearse import rehearse
from orthoft.recipes.train_to_merge import save_subspaces

KINDS = ("mixtral", "qwen3_moe", "gpt_oss")
STACK = "model.layers.0.mlp.experts.gate_up_proj"
FIELDS: dict[str, dict[str, Any]] = {
    "oftv2": {"block_size": 4},
    "hra": {"r": 4},
    "goft": {"mode": "quasi"},
    "psoft": {"r": 4},
}
ORTHOGONAL = {"hra": {"orthonormal": True}}
IDS = torch.tensor([[1, 5, 9, 2, 4, 7], [3, 8, 0, 6, 11, 13]])


def test_each_adapter_that_turns_inputs_is_tested() -> None:
    assert FIELDS.keys() == ADAPTERS.keys() - {"svft"}


def config(method: str, **more: Any) -> Any:
    words = {"target_modules": ["experts", "q_proj"], "init_weights": False, **FIELDS.get(method, {}), **more}
    return ADAPTERS[method](**words)


def mixture(kind: str) -> PreTrainedModel:
    """A mixture whose experts disagree, so that it shows what they read."""
    return randomised(MODELS[kind](), seed=7).eval()


def adapted(model: PreTrainedModel, method: str, seed: int = 0, **more: Any) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(model, config(method, **more)).eval()


@torch.no_grad()
def logits(model: Any, **words: Any) -> Tensor:
    return model(IDS, **words).logits


def apart(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("method", FIELDS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_all_experts_read_is_turned(kind: str, method: str, tmp_path: Path) -> None:
    """Experts with ``W_e Q^T`` in place of ``W_e`` say the same to what was not turned."""
    frozen = logits(mixture(kind))
    model = adapted(mixture(kind), method, target_modules=["experts"])
    turned = logits(model)
    assert apart(turned, frozen) > 1e-2
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(mixture(kind), tmp_path)), turned)
    with model.disable_adapter():
        assert torch.equal(logits(model), frozen)
    layer = next(module for module in model.modules() if isinstance(module, orthoft.layer.OrthoLayer))
    adapter, stack = layer.adapters["default"], layer.get_base_layer().gate_up_proj.detach().clone()
    Q = adapter.rotate(torch.eye(stack.shape[1 if kind == "gpt_oss" else 2])).detach()
    wanted = torch.stack([Q @ one if kind == "gpt_oss" else one @ Q.mT for one in stack])
    model.merge_adapter()
    torch.testing.assert_close(layer.get_base_layer().gate_up_proj.detach(), wanted, atol=1e-5, rtol=1e-5)
    assert apart(logits(model), turned) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().gate_up_proj, stack)
    plain = model.merge_and_unload()
    assert type(plain) is type(mixture(kind))
    assert not any("orthoft" in name for name in plain.state_dict())
    assert apart(logits(plain), turned) < 1e-5


@pytest.mark.parametrize("method", FIELDS)
def test_it_starts_as_the_base_and_learns(method: str) -> None:
    frozen = logits(mixture("qwen3_moe"))
    model = adapted(mixture("qwen3_moe"), method, target_modules=["experts"], init_weights=True).train()
    assert apart(logits(model), frozen) < 1e-5
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-2)
    losses = []
    for _ in range(12):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    assert sum(p.numel() for p in trained) < 100  # one rotation, however many experts


@pytest.mark.parametrize("kind", KINDS)
def test_however_transformers_computes_experts_and_loads_them(kind: str, tmp_path: Path) -> None:
    model = adapted(mixture(kind), "oftv2")
    turned = logits(model)
    model.save_pretrained(tmp_path)
    for way in ("eager", "batched_mm", "grouped_mm"):
        again = mixture(kind)
        again.set_experts_implementation(way)
        again.load_adapter(str(tmp_path))
        assert apart(logits(again), turned) < 1e-5
    half = mixture(kind).to(torch.bfloat16)
    half.set_experts_implementation("eager")  # for bfloat16 the others want wider experts
    assert apart(logits(PeftModel.from_pretrained(half, tmp_path)).float(), turned) < 0.1


def test_nothing_of_the_size_of_the_experts_is_kept_for_backward() -> None:
    model = adapted(mixture("qwen3_moe"), "oftv2", target_modules=["experts"]).train()
    stack = model.base_model.model.model.layers[0].mlp.experts.get_base_layer().gate_up_proj
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model(IDS, labels=IDS)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    made = [x for x in kept if x.untyped_storage().data_ptr() not in own]
    assert made
    assert max(x.numel() for x in made) < stack.numel() / 2


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_per_row(kind: str) -> None:
    model = adapted(mixture(kind), "oftv2")
    torch.manual_seed(1)
    model.add_adapter("other", config("oftv2"))
    alone = {"__base__": logits(mixture(kind))}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model)
    for names in (["other", "default"], ["__base__", "other"], ["default", "__base__"]):
        got = logits(model, adapter_names=names)
        for row, name in enumerate(names):
            torch.testing.assert_close(got[row], alone[name][row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", FIELDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_stored", [True, False])
def test_a_merge_on_disk_is_that_of_the_model(as_stored: bool, kind: str, method: str, tmp_path: Path) -> None:
    """Whether the base has its experts one by one, or fused as they are loaded."""
    model = save_base(tmp_path / "base", kind, save_original_format=as_stored)
    tuned = adapted(model, method)
    tuned.save_pretrained(tmp_path / "a")
    report = merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", method="task_arithmetic", progress=False)
    close(loaded(tmp_path / "out", model), tuned.merge_and_unload().state_dict())
    experts = [entry.name for entry in report.merged if "experts" in entry.name]
    assert len(experts) == (6 if as_stored and kind != "gpt_oss" else 1)
    assert not report.not_carried
    source = open_source("a", tmp_path / "a", TensorFolder(tmp_path / "base"))
    ranks = {source.ranks[name] for name in experts}
    assert ranks == ({4} if method in ("hra", "psoft") and len(experts) > 1 else {None})


@pytest.mark.parametrize("method", ["oftv2", "hra"])
@pytest.mark.parametrize("space", ["full", "rotation"])
def test_experts_one_by_one_and_fused_are_merged_alike(space: str, method: str, tmp_path: Path) -> None:
    """In the space of rotations, too: of experts in one tensor each is turned by itself."""
    done = {}
    for as_stored in (True, False):
        root = tmp_path / str(as_stored)
        model = save_base(root / "base", "mixtral", save_original_format=as_stored)
        for seed, name in enumerate("ab"):
            tuned = adapted(type(model).from_pretrained(root / "base"), method, seed, **ORTHOGONAL.get(method, {}))
            tuned.save_pretrained(root / name)
        merge(root / "base", [root / "a", root / "b"], root / "out", method="mean", space=space, progress=False)
        done[as_stored] = loaded(root / "out", model)
    close(done[True], done[False])


@pytest.mark.parametrize("kind", KINDS)
def test_turns_of_all_experts_meet_half_way(kind: str, tmp_path: Path) -> None:
    """The mean of an adapter and of one that does nothing, in the space of rotations, is a rotation of every expert."""
    model = save_base(tmp_path / "base", kind, save_original_format=False)
    before = model.state_dict()[STACK].clone()
    adapted(model, "oftv2", map="cayley").save_pretrained(tmp_path / "a")
    still = adapted(type(model).from_pretrained(tmp_path / "base"), "oftv2", map="cayley", init_weights=True)
    still.save_pretrained(tmp_path / "b")
    sources = [tmp_path / "a", tmp_path / "b"]
    merge(tmp_path / "base", sources, tmp_path / "out", method="mean", space="rotation", progress=False)
    after = loaded(tmp_path / "out", model)[STACK]
    inputs = 1 if kind == "gpt_oss" else 2
    for old, new in zip(before, after, strict=True):
        assert apart(new, old) > 1e-2
        gram, own = (one @ one.mT if inputs == 2 else one.mT @ one for one in (new, old))
        torch.testing.assert_close(gram, own, atol=1e-5, rtol=1e-4)


def test_a_basis_of_all_experts_is_not_guessed_from_one(tmp_path: Path) -> None:
    """PSOFT without its basis: the base has to hold all experts of a layer in one tensor."""
    for as_stored in (True, False):
        root = tmp_path / str(as_stored)
        model = save_base(root / "base", "mixtral", save_original_format=as_stored)
        tuned = adapted(model, "psoft", save_basis=False)
        tuned.save_pretrained(root / "a")
        if as_stored:
            with pytest.raises(ValueError, match="was saved without its basis, which is one of all experts"):
                plan(root / "base", [root / "a"], method="mean")
        else:
            merge(root / "base", [root / "a"], root / "out", method="mean", progress=False)
            close(loaded(root / "out", model), tuned.merge_and_unload().state_dict())


def test_a_mixture_of_another_width_is_told(tmp_path: Path) -> None:
    save_base(tmp_path / "base", "gpt_oss")
    tuned = adapted(mixture("gpt_oss"), "oftv2", target_modules=["experts"])
    tuned.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: torch.cat([tensor, tensor]) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"rotates 32 inputs of experts, the base's .*gate_up_proj' has shape"):
        plan(tmp_path / "base", [tmp_path / "a"], method="mean")


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds the experts of a mixture, whose inputs an adapter can rotate; svft"):
        get_peft_model(mixture("mixtral"), ADAPTERS["svft"](target_modules=["experts"]))
    with pytest.raises(ValueError, match="Llama4TextExperts is not supported"):
        get_peft_model(mixture("llama4"), config("oftv2"))
    model = save_base(tmp_path / "base", "mixtral")
    model.name_or_path = str(tmp_path / "base")
    tuned = adapted(model, "hra")
    tuned.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"holds the experts of a mixture, .*: merge instead"):
        to_lora(tuned)
    with pytest.raises(ValueError, match=r"fused experts.*: merge it instead"):
        to_lora(tmp_path / "a", out=tmp_path / "lora", base=tmp_path / "base")
    with pytest.raises(ValueError, match="output='lora' would need factors for each expert"):
        merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", method="mean", output="lora", progress=False)
    alone = adapted(type(model).from_pretrained(tmp_path / "base"), "hra", target_modules=["experts"])
    alone.save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match=r"fused experts.*: merge it instead"):
        to_lora(tmp_path / "alone", out=tmp_path / "lora", base=tmp_path / "base")
    adapted(type(model).from_pretrained(tmp_path / "base"), "oftv2").save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="output='rotation' holds rotations of layers"):
        merge(tmp_path / "base", [tmp_path / "b"], tmp_path / "out", method="mean", output="rotation", progress=False)


def test_experts_that_are_left_out_are_named() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted(mixture("mixtral"), "oftv2")
        assert not any("matrices" in str(each.message) for each in caught)
        adapted(mixture("mixtral"), "oftv2", target_modules=["q_proj"])
    (line,) = (str(each.message) for each in caught if "matrices" in str(each.message))
    assert line.startswith("model.layers.0.mlp.experts.gate_up_proj holds several matrices in one parameter")
    assert line.endswith("2 such parameters stay as in the base model (target_modules may name 'experts')")


def test_on_top_of_a_lora_on_parameters() -> None:
    """PEFT's wrapper of the experts is called with what was turned, and both count."""
    model = get_peft_model(mixture("mixtral"), LoraConfig(r=2, target_modules=[], target_parameters=["gate_up_proj"]))
    randomised(model, "lora_", seed=3)
    below = logits(model.eval())
    both = adapted(model.base_model.model, "oftv2", target_modules=["experts"])
    assert apart(logits(both), below) > 1e-3
    with pytest.raises(ValueError, match="merge those before these are put on top"):
        both.merge_adapter()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_stored", [True, False])
@pytest.mark.parametrize(
    "words", [{"method": "task_arithmetic", "scale": 0.5}, {"method": "mean", "space": "rotation"}]
)
def test_a_merge_in_memory_is_that_on_disk_and_is_undone(
    words: dict[str, Any], as_stored: bool, kind: str, tmp_path: Path
) -> None:
    """Experts that are stored one by one are parts of one parameter of the live model; a LoRA on them beside ours."""
    base = save_base(tmp_path / "base", kind, save_original_format=as_stored)
    adapted(type(base).from_pretrained(tmp_path / "base"), "oftv2").save_pretrained(tmp_path / "a")
    save_lora(tmp_path / "b", type(base).from_pretrained(tmp_path / "base"), UP_AND_DOWN)
    sources = [tmp_path / "a", tmp_path / "b"]
    merge(tmp_path / "base", sources, tmp_path / "out", diagnostics=False, progress=False, **words)
    wanted, before = loaded(tmp_path / "out", base), loaded(tmp_path / "base", base)
    tried = LiveMerge(plan(tmp_path / "base", sources, method="mean", space="full"), base)
    with tried.changed(tried.merged(words)):
        close({name: tensor.clone() for name, tensor in base.state_dict().items()}, wanted)
        assert apart(base.state_dict()[STACK], before[STACK]) > 1e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_tied_experts_cannot_hold_two_adapters() -> None:
    model = mixture("mixtral")
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    model.model.layers[1].mlp.experts.gate_up_proj = model.model.layers[0].mlp.experts.gate_up_proj
    with pytest.raises(ValueError, match="share one weight, which cannot hold both adapters"):
        adapted(model, "oftv2", target_modules=["experts"]).merge_adapter()


@pytest.mark.parametrize("targets", [["experts"], ["experts", "q_proj"]])
@pytest.mark.parametrize("as_stored", [True, False])
def test_a_recipe_is_told_before_it_trains(as_stored: bool, targets: list[str], tmp_path: Path) -> None:
    """What its merge and its exports cannot do with adapters on experts; what they can passes."""
    save_base(tmp_path / "base", "mixtral", save_original_format=as_stored)
    text = write_rows(tmp_path / "text.jsonl", [{"text": "w"}])
    splits = dict.fromkeys(("train", "tuning", "test"), text)

    def rehearsed(merging: dict[str, Any], **more: Any) -> None:
        words = {"type": "oftv2", "block_size": 4, "target_modules": targets}
        task = {"name": "a", "kind": "causal-lm", "data": splits, "adapter": words}
        told = {"name": "t", "base": str(tmp_path / "base"), "output": str(tmp_path / "out"), "tasks": [task]}
        rehearse(load(told | {"merge": merging} | more), tmp_path / "base")

    rehearsed({"method": "mean", "include": ["*experts*"]})
    rehearsed({"method": "mean", "space": "rotation"})
    with pytest.raises(RecipeError, match=r"merge: the pattern '\*expertss\*' matches no weight"):
        rehearsed({"method": "mean", "include": ["*expertss*"]})
    with pytest.raises(RecipeError, match="space 'core' needs low-rank factors"):
        rehearsed({"method": "mean", "space": "core"})
    with pytest.raises(RecipeError, match=r"export\.lora: a rotates what fused experts read, which no LoRA holds"):
        rehearsed({"method": "mean"}, export={"lora": {"rank": 4}})
    if len(targets) > 1:
        rehearsed({"method": "mean", "exclude": ["*experts*"]}, export={"lora": {"rank": 4}})


def test_tasks_are_not_kept_apart_on_experts(tmp_path: Path) -> None:
    save_base(tmp_path / "base", "mixtral")
    words = {"type": "psoft", "r": 4, "target_modules": ["experts", "q_proj"]}
    splits = dict.fromkeys(("train", "tuning", "test"), write_rows(tmp_path / "text.jsonl", [{"text": "w"}]))
    tasks = [{"name": name, "kind": "causal-lm", "data": splits, "adapter": words} for name in "ab"]
    recipe = {"name": "t", "base": str(tmp_path / "base"), "output": str(tmp_path / "out"), "tasks": tasks}
    with pytest.raises(ValueError, match=r"keeps tasks apart on linear layers, and .* holds fused experts"):
        save_subspaces(load(recipe | {"train_to_merge": {"method": "orthogonal"}}), tmp_path / "base", tmp_path / "s")
