"""The PEFT host: what PEFT users do with LoRA, done with our adapters on tiny models of three architectures."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from merging_files import MODELS, TARGETS, randomised, save_base
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from orthoft import ADAPTERS, to_lora
from orthoft.config import OrthoConfig
from orthoft.layer import OrthoLayer
from orthoft.peft_compat import register

SMALL: dict[str, dict[str, Any]] = {
    "oftv2": {"block_size": 8},
    "hra": {"r": 4},
    "goft": {"block_size": 8},
    "psoft": {"r": 4},
    "svft": {"pattern": "banded"},
}
TASKS = {"bert": "FEATURE_EXTRACTION", "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM"}
IDS = torch.arange(24).reshape(4, 6) % 60
both = pytest.mark.parametrize("method", sorted(ADAPTERS))
all_models = pytest.mark.parametrize("kind", sorted(MODELS))


def test_each_adapter_is_tested() -> None:
    assert set(SMALL) == set(ADAPTERS)


def config_of(method: str, kind: str = "llama", **changes: Any) -> OrthoConfig:
    """A small adapter away from the identity."""
    given = {"target_modules": TARGETS[kind], "init_weights": False, "task_type": TASKS[kind]}
    return ADAPTERS[method](**{**SMALL[method], **given, **changes})


def base_model(kind: str = "llama") -> PreTrainedModel:
    return randomised(MODELS[kind](), seed=7).eval()


def tuned(method: str, kind: str = "llama", **changes: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base_model(kind), config_of(method, kind, **changes)).eval()


def output(model: nn.Module, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **kwargs)[0]


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


def ours(model: nn.Module) -> dict[str, OrthoLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, OrthoLayer)}


def targets(model: nn.Module) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in ours(model)})


# The start


@both
@all_models
def test_get_peft_model_starts_at_the_base(method: str, kind: str) -> None:
    model = tuned(method, kind, init_weights=True)
    assert len(ours(model)) == {"bert": 8, "llama": 6, "gpt2": 8}[kind]
    assert error(output(model), output(base_model(kind))) < 1e-6
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(f"orthoft_{method}_" in name for name in trainable)


@both
def test_training_lowers_the_loss(method: str) -> None:
    torch.manual_seed(0)
    model = tuned(method, init_weights=True).train()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


# Files

RELOAD = """
import sys
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForFeatureExtraction, PeftModel
from transformers import AutoModel, AutoModelForCausalLM

ids, folder, results = torch.load(sys.argv[1]), sys.argv[2], {}
for kind in ("bert", "gpt2", "llama"):
    base = (AutoModel if kind == "bert" else AutoModelForCausalLM).from_pretrained(f"{folder}/{kind}")
    model = PeftModel.from_pretrained(base, f"{folder}/{kind}-lora").eval()
    with torch.no_grad():
        results[f"{kind}-hra", "lora"] = model(input_ids=ids)[0]
assert not any(name.startswith("orthoft") for name in sys.modules)

import orthoft

def ways(kind, base, adapter):
    loader = AutoModel if kind == "bert" else AutoModelForCausalLM
    auto = AutoPeftModelForFeatureExtraction if kind == "bert" else AutoPeftModelForCausalLM
    yield "from_pretrained", PeftModel.from_pretrained(loader.from_pretrained(base), adapter)
    yield "low_cpu_mem_usage", PeftModel.from_pretrained(loader.from_pretrained(base), adapter, low_cpu_mem_usage=True)
    yield "AutoPeftModel", auto.from_pretrained(adapter)
    model = loader.from_pretrained(base)
    model.load_adapter(adapter)
    yield "load_adapter", model

for name in sys.argv[3:]:
    kind = name.split("-")[0]
    for way, model in ways(kind, f"{folder}/{kind}", f"{folder}/{name}"):
        with torch.no_grad():
            results[name, way] = model.eval()(input_ids=ids)[0]
torch.save(results, f"{folder}/results.pt")
"""
WAYS = ("from_pretrained", "low_cpu_mem_usage", "AutoPeftModel", "load_adapter")


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder with bases, each with an adapter of each method, and the outputs of the adapted models."""
    folder, wanted = tmp_path_factory.mktemp("saved"), {}
    for kind in MODELS:
        save_base(folder / kind, kind)
        for method in ADAPTERS:
            loader = AutoModel if kind == "bert" else AutoModelForCausalLM
            model = get_peft_model(loader.from_pretrained(folder / kind), config_of(method, kind))
            model.save_pretrained(folder / f"{kind}-{method}")
            wanted[f"{kind}-{method}"] = output(model.eval())
    return folder, wanted


@pytest.fixture(scope="module")
def reloaded(saved: tuple[Path, dict[str, Tensor]]) -> dict[tuple[str, str], Tensor]:
    folder, wanted = saved
    for kind in MODELS:
        assert to_lora(folder / f"{kind}-hra", folder / f"{kind}-lora").error == pytest.approx(0, abs=1e-5)
    torch.save(IDS, folder / "ids.pt")
    run_python(RELOAD, str(folder / "ids.pt"), str(folder), *wanted)
    return torch.load(folder / "results.pt")


@both
@all_models
@pytest.mark.parametrize("way", WAYS)
def test_reload_in_a_new_process_equals_saved(
    saved: tuple[Path, dict[str, Tensor]],
    reloaded: dict[tuple[str, str], Tensor],
    method: str,
    kind: str,
    way: str,
) -> None:
    folder, wanted = saved
    name = f"{kind}-{method}"
    assert torch.equal(reloaded[name, way], wanted[name])
    base = (AutoModel if kind == "bert" else AutoModelForCausalLM).from_pretrained(folder / kind)
    assert error(wanted[name], output(base.eval())) > 1e-2


@both
def test_what_is_saved(saved: tuple[Path, dict[str, Tensor]], method: str) -> None:
    folder = saved[0] / f"llama-{method}"
    assert {file.name for file in folder.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "import orthoft" in (folder / "README.md").read_text(encoding="utf-8")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {name.split(".orthoft_")[0].rpartition("base_model.model.")[2] for name in tensors} == set(target_names())
    assert all(f"orthoft_{method}_" in name and tensor.dtype == torch.float32 for name, tensor in tensors.items())


def target_names() -> list[str]:
    return [name.removeprefix("base_model.model.") for name in ours(tuned("hra"))]


def test_frozen_directions_of_hra_are_saved(tmp_path: Path) -> None:
    model = tuned("hra", orthonormal=True)
    model.save_pretrained(tmp_path)
    assert error(output(PeftModel.from_pretrained(base_model(), tmp_path).eval()), output(model)) == 0
    low = PeftModel.from_pretrained(base_model(), tmp_path, low_cpu_mem_usage=True)
    assert error(output(low.eval()), output(model)) == 0


@both
def test_load_adapter_trainable_again(method: str, tmp_path: Path) -> None:
    tuned(method).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in again.parameters())
    frozen = PeftModel.from_pretrained(base_model(), tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters())


@all_models
def test_hra_as_a_lora_needs_no_orthoft(
    kind: str, saved: tuple[Path, dict[str, Tensor]], reloaded: dict[tuple[str, str], Tensor]
) -> None:
    assert error(reloaded[f"{kind}-hra", "lora"], saved[1][f"{kind}-hra"]) <= 1e-5


def test_oftv2_as_a_lora_needs_a_rank(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, wanted = saved
    with pytest.raises(ValueError, match="rank"):
        to_lora(folder / "llama-oftv2", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    errors = []
    for rank in (4, 16, 32):
        told = to_lora(folder / "llama-oftv2", tmp_path / str(rank), rank=rank)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "llama"), tmp_path / str(rank))
        errors.append(error(output(model.eval()), wanted["llama-oftv2"]))
        assert (told.error > 1e-3) == (rank < 32)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] <= 1e-5


@both
@all_models
def test_pefts_own_conversion_to_lora(method: str, kind: str) -> None:
    if not hasattr(peft, "convert_to_lora"):
        pytest.skip("this PEFT has no convert_to_lora")
    model = tuned(method, kind)
    assert model.supports_lora_conversion()
    config, state = peft.convert_to_lora(model, rank=4 if method == "hra" else 1.0)
    lora = get_peft_model(base_model(kind), config)
    assert not peft.set_peft_model_state_dict(lora, state).unexpected_keys
    assert error(output(lora.eval()), output(model)) <= 1e-4


# transformers' own integration


@both
def test_transformers_add_adapter(method: str, tmp_path: Path) -> None:
    model = base_model()
    plain = output(model)
    torch.manual_seed(1)
    model.add_adapter(config_of(method), adapter_name="one")
    one = output(model)
    assert error(one, plain) > 1e-2
    model.add_adapter(config_of(method), adapter_name="two")
    model.set_adapter("two")
    assert error(output(model), one) > 1e-2
    model.disable_adapters()
    assert torch.equal(output(model), plain)
    model.enable_adapters()
    model.set_adapter("one")
    model.save_pretrained(tmp_path)
    again = base_model()
    again.load_adapter(str(tmp_path))
    assert torch.equal(output(again), one)
    model.delete_adapter("two")
    assert torch.equal(output(model), one)


# Several adapters


@pytest.fixture(params=sorted(ADAPTERS))
def pair(request: pytest.FixtureRequest) -> tuple[PeftModel, dict[str, Tensor]]:
    """A model with adapters red and blue and the outputs of each alone, and of "__base__"."""
    torch.manual_seed(1)
    model = get_peft_model(base_model(), config_of(request.param), adapter_name="red")
    model.add_adapter("blue", config_of(request.param, target_modules=["q_proj", "up_proj"]))
    outputs = {"__base__": output(base_model())}
    for name in ("blue", "red"):
        model.set_adapter(name)
        outputs[name] = output(model.eval())
    return model, outputs


def test_set_delete_and_disable_adapters(pair: tuple[PeftModel, dict[str, Tensor]]) -> None:
    model, wanted = pair
    assert error(wanted["red"], wanted["blue"]) > 1e-2
    with model.disable_adapter():
        assert torch.equal(output(model), wanted["__base__"])
    assert torch.equal(output(model), wanted["red"])
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"red"}
    model.set_adapter("blue")
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"blue"}
    model.delete_adapter("red")
    assert list(model.peft_config) == ["blue"]
    assert not any("red" in layer.adapters for layer in ours(model).values())
    assert torch.equal(output(model), wanted["blue"])
    assert not any(".red." in name for name in model.state_dict())


@both
@pytest.mark.parametrize("names", [("default", "further"), ("first", "default")])
def test_a_further_adapter_is_not_trained_until_set(method: str, names: tuple[str, str]) -> None:
    model = get_peft_model(base_model(), config_of(method), adapter_name=names[0])
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    model.add_adapter(names[1], config_of(method, target_modules=["q_proj", "up_proj"]))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before


def test_one_adapter_per_row_of_the_batch(pair: tuple[PeftModel, dict[str, Tensor]]) -> None:
    model, wanted = pair
    names = ["blue", "__base__", "red", "blue"]
    got = output(model, adapter_names=names)
    for row, name in enumerate(names):
        assert error(got[row], wanted[name][row]) < 1e-6
    assert torch.equal(output(model), wanted["red"])


def test_one_adapter_per_row_when_generating(pair: tuple[PeftModel, dict[str, Tensor]]) -> None:
    model, _ = pair
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    got = model.generate(input_ids=IDS[:3], adapter_names=["blue", "red", "__base__"], **how)
    model.set_adapter("blue")
    assert torch.equal(got[:1], model.generate(input_ids=IDS[:1], **how))
    model.set_adapter("red")
    assert torch.equal(got[1:2], model.generate(input_ids=IDS[1:2], **how))
    with model.disable_adapter():
        assert torch.equal(got[2:], model.generate(input_ids=IDS[2:3], **how))


def test_wrong_adapter_names(pair: tuple[PeftModel, dict[str, Tensor]]) -> None:
    model, _ = pair
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): green\..*__base__"):
        output(model, adapter_names=["red", "blue", "green", "red"])
    with pytest.raises(ValueError, match="same as the number of inputs, but got 2 and 4"):
        output(model, adapter_names=["red", "blue"])
    with pytest.raises(ValueError, match="in training mode"):
        output(model.train(), adapter_names=["red"] * 4)
    with pytest.raises(ValueError, match="list of one name per row"):
        output(model, adapter_names="red")
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        output(model, adapter_names=["red"] * 4)


def test_adding_all_linear_to_a_wrapped_model() -> None:
    model = tuned("hra", target_modules="all-linear")
    linear = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert targets(model) == linear
    model.add_adapter("second", config_of("hra", target_modules="all-linear"))
    assert targets(model) == linear
    assert all(set(layer.adapters) == {"default", "second"} for layer in ours(model).values())


def test_methods_of_one_model_must_be_the_same() -> None:
    model = tuned("hra")
    with pytest.raises(ValueError, match=r"ORTHOFT_HRA and .*ORTHOFT_OFTV2"):
        model.add_adapter("other", config_of("oftv2"))
    assert list(model.peft_config) == ["default"]


# Merging


@both
@all_models
def test_merge_adapter_and_unmerge_adapter(method: str, kind: str) -> None:
    model = tuned(method, kind)
    wanted = output(model)
    weights = {name: layer.base_layer.weight.clone() for name, layer in ours(model).items()}
    model.merge_adapter()
    assert error(output(model), wanted) <= 1e-5
    assert all(layer.base_layer.weight.is_contiguous() for layer in ours(model).values())
    model.unmerge_adapter()
    assert torch.equal(output(model), wanted)
    assert all(torch.equal(layer.base_layer.weight, weights[name]) for name, layer in ours(model).items())


@both
@all_models
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload(method: str, kind: str, safe: bool, tmp_path: Path) -> None:
    model = tuned(method, kind)
    wanted = output(model)
    plain = model.merge_and_unload(safe_merge=safe)
    assert type(plain) is type(base_model(kind))
    assert error(output(plain), wanted) <= 1e-5
    assert not any(type(m).__module__.startswith(("orthoft", "peft")) for m in plain.modules())
    assert set(plain.state_dict()) == set(base_model(kind).state_dict())
    if kind == "gpt2":
        assert isinstance(plain.transformer.h[0].attn.c_attn, Conv1D)
    plain.save_pretrained(tmp_path)
    assert torch.equal(output(type(plain).from_pretrained(tmp_path).eval()), output(plain))


@both
def test_unload(method: str) -> None:
    model = tuned(method)
    plain = model.unload()
    assert torch.equal(output(plain), output(base_model()))
    assert not ours(plain)


@both
def test_merging_while_disabled_restores_the_base(method: str) -> None:
    model = tuned(method)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model), output(base_model()))


@both
def test_safe_merge_refuses_nan(method: str) -> None:
    model = tuned(method)
    layer = ours(model)["base_model.model.model.layers.0.self_attn.q_proj"]
    weight = layer.base_layer.weight.clone()
    with torch.no_grad():
        next(layer.adapters["default"].parameters()).flatten()[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)
    assert not layer.merged
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True)


@both
@all_models
def test_get_delta_weight(method: str, kind: str) -> None:
    model = tuned(method, kind)
    before = {name: layer.base_layer.weight.clone() for name, layer in ours(model).items()}
    deltas = {name: layer.get_delta_weight("default") for name, layer in ours(model).items()}
    model.merge_adapter()
    for name, layer in ours(model).items():
        assert error(deltas[name], layer.base_layer.weight - before[name]) < 1e-5


# Where it goes, and what else is trained


@both
def test_modules_to_save(method: str, tmp_path: Path) -> None:
    save_base(tmp_path / "bert", "bert")

    def classifier() -> PreTrainedModel:
        torch.manual_seed(2)
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", num_labels=3).eval()

    config = config_of(method, "bert", task_type="SEQ_CLS")
    model = get_peft_model(classifier(), config).eval()
    head = {name: p for name, p in model.named_parameters() if "classifier" in name and p.requires_grad}
    assert len(head) == 2
    nn.init.normal_(next(iter(head.values())))
    model.save_pretrained(tmp_path / "adapter")
    assert any("classifier" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(classifier(), tmp_path / "adapter").eval()
    assert torch.equal(output(again), output(model))


@both
@pytest.mark.parametrize("bias", ["ortho_only", "all"])
def test_bias(method: str, bias: str, tmp_path: Path) -> None:
    if not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):  # PEFT 0.20 would lose them
        with pytest.raises(ValueError, match=r"bias needs PEFT 0\.21"):
            config_of(method, "bert", bias=bias)
        return
    model = tuned(method, "bert", bias=bias)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    every = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    adapted = {n for n in every if ".base_layer." in n}
    assert trained == (every if bias == "all" else adapted)
    assert adapted < every
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model("bert"), tmp_path).eval()
    assert torch.equal(output(again), output(model))


@both
def test_choosing_layers(method: str) -> None:
    assert targets(tuned(method, exclude_modules=["k_proj"])) == ["down_proj", "q_proj"]
    assert targets(tuned(method, exclude_modules=r".*\.mlp\..*")) == ["k_proj", "q_proj"]
    assert targets(tuned(method, target_modules=r".*self_attn\.(q|v)_proj")) == ["q_proj", "v_proj"]
    assert targets(tuned(method, target_modules=None)) == ["q_proj", "v_proj"]
    assert {n.split(".")[4] for n in ours(tuned(method, layers_to_transform=[1]))} == {"1"}
    assert {n.split(".")[4] for n in ours(tuned(method, layers_to_transform=0, layers_pattern="layers"))} == {"0"}


def test_patterns_of_sizes(tmp_path: Path) -> None:
    model = tuned("hra", rank_pattern={"k_proj": 2, r".*\.1\.self_attn\.q_proj": 6})
    rows = {
        n.removeprefix("base_model.model.model.layers."): m.adapters["default"].u.shape[0]
        for n, m in ours(model).items()
    }
    assert (rows["0.self_attn.k_proj"], rows["0.self_attn.q_proj"], rows["1.self_attn.q_proj"]) == (2, 4, 6)
    blocks = tuned("oftv2", block_size_pattern={"down_proj": 12})
    sizes = {n.rpartition(".")[2]: m.adapters["default"].block_size for n, m in ours(blocks).items()}
    assert sizes == {"q_proj": 8, "k_proj": 8, "down_proj": 12}
    for one in (model, blocks):
        one.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(base_model(), tmp_path).eval()
        assert torch.equal(output(again), output(one))


# Python and torch machinery


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@both
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("merged", [False, True])
def test_copies(method: str, copied: Callable[[nn.Module], nn.Module], merged: bool) -> None:
    model = tuned(method)
    wanted = output(model)
    if merged:
        model.merge_adapter()
    twin = copied(model)
    assert torch.equal(output(twin), output(model))
    twin.unmerge_adapter()
    assert torch.equal(output(twin), wanted)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert error(output(twin), wanted) > 1e-2
    model.unmerge_adapter()
    assert torch.equal(output(model), wanted)


@both
def test_compile_without_graph_breaks(method: str) -> None:
    base = base_model("bert")
    base.encoder.layer = base.encoder.layer[:1]  # each layer takes as long to compile as the first
    model = get_peft_model(base, config_of(method, "bert")).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert error(output(compiled), output(model)) < 1e-6


@both
def test_compiled_backward(method: str) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(32, 16)), config_of(method, target_modules=["0"], task_type=None))
    x = torch.randn(5, 32)
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(model(x).square().sum(), parameters)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x).square().sum(), parameters)
    for mine, theirs in zip(got, wanted, strict=True):
        assert error(mine, theirs) < 1e-5


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(method: str, reentrant: bool) -> None:
    model = tuned(method).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(model(input_ids=IDS, labels=IDS).loss, parameters)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for parameter, gradient in zip(parameters, wanted, strict=True):
        assert error(parameter.grad, gradient) < 1e-5


@both
def test_half_precision_base(method: str) -> None:
    model = get_peft_model(base_model().bfloat16(), config_of(method)).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    wanted = output(model)
    assert wanted.dtype == torch.bfloat16
    model.merge_adapter()
    assert error(output(model).float(), wanted.float()) < 0.05


# Registration and error messages


def test_registration_is_idempotent() -> None:
    from orthoft.adapters import HRAConfig, HRAModel

    before = list(PeftType)
    register("hra", HRAConfig, HRAModel)
    assert list(PeftType) == before
    assert [t.value for t in PeftType if t.startswith("ORTHOFT")] == [f"ORTHOFT_{m.upper()}" for m in ADAPTERS]
    assert pickle.loads(pickle.dumps(PeftType.ORTHOFT_HRA)) is PeftType.ORTHOFT_HRA


def test_registration_steps_aside_for_peft() -> None:
    from orthoft.adapters import HRAModel, OFTv2Config

    with pytest.warns(UserWarning, match="ORTHOFT_HRA"):
        register("hra", OFTv2Config, HRAModel)
    assert type(peft.get_peft_config({"peft_type": "ORTHOFT_HRA"})).__name__ == "HRAConfig"


def test_large_blocks_take_the_exact_map() -> None:
    with pytest.warns(UserWarning, match="cayley"):
        assert ADAPTERS["oftv2"](block_size=64).map == "cayley"


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "block_size that does not divide": ("oftv2", {"block_size": 7}, "block_size 7 does not divide the 32 inputs"),
    "block_size of 1": ("oftv2", {"block_size": 1}, "block_size 1"),
    "even degree": ("oftv2", {"degree": 4}, "degree must be odd.*got 4"),
    "unknown map": ("oftv2", {"map": "caley"}, "unknown value of map 'caley', did you mean 'cayley'"),
    "dropout of 1": ("oftv2", {"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
    "odd r": ("hra", {"r": 3, "init_weights": True}, "r must be even.*got 3"),
    "odd r in the pattern": ("hra", {"rank_pattern": {"q_proj": 5}, "init_weights": True}, "r must be even.*got 5"),
    "r of 0": ("hra", {"r": 0}, "positive.*got 0"),
    "r above the inputs": ("hra", {"r": 34}, "r = 34 reflections do not fit the 32 inputs"),
    "negative penalty": ("hra", {"orthogonality_weight": -1.0}, "must not be negative, got -1.0"),
    "unknown bias": ("hra", {"bias": "lora_only"}, "unknown value of bias 'lora_only'.*ortho_only"),
    "norm": (
        "oftv2",
        {"target_modules": ["input_layernorm"]},
        "LlamaRMSNorm is not supported: target nn.Lin",
    ),
    "no such layer": ("hra", {"target_modules": ["qproj"]}, "qproj"),
    "pattern without layers": ("hra", {"layers_pattern": "layers"}, "give both"),
}


@pytest.mark.parametrize(("method", "changes", "message"), WRONG.values(), ids=WRONG)
def test_mistakes_are_explained(method: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuned(method, **changes)
