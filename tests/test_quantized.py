"""Quantised bases: every adapter trains on them, merges into them, and gives their codes back bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils import quantization_utils
from tiny import Net, save_llama
from torch import Tensor, nn

from orthoft import ADAPTERS, OFTv2Config, quantization
from orthoft.config import OrthoConfig
from orthoft.layer import OrthoLayer

OUT, IN, ROWS = 64, 128, 9
SMALL: dict[str, dict[str, Any]] = {"oftv2": {"block_size": 8}, "hra": {"r": 4}, "psoft": {"r": 8}}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.5e-2, torch.float16: 5e-3}
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
needs_torchao = pytest.mark.skipif(
    find_spec("torchao") is None or not hasattr(peft.import_utils, "is_torchao_ge_v0_18_0"),
    reason="torchao is not installed, or PEFT is 0.20, which cannot read torchao 0.18",
)
every = pytest.mark.parametrize("method", sorted(ADAPTERS))


def eight_bit(linear: nn.Linear) -> Net:
    import bitsandbytes as bnb

    made = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False)
    made.bias = linear.bias
    return Net(made)


def four_bit(linear: nn.Linear, quant_type: str = "nf4", **options: Any) -> Net:
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(IN, OUT, compute_dtype=linear.weight.dtype, quant_type=quant_type, **options)
    options = {"quant_type": quant_type, "requires_grad": False, "module": made, **options}
    made.weight = bnb.nn.Params4bit(linear.weight.data, **options)
    made.bias = linear.bias
    return Net(made)


def torchao_int8(linear: nn.Linear) -> Net:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    net = Net(linear)
    quantize_(net, Int8WeightOnlyConfig())
    # where transformers leaves it when it quantises a model
    net.hf_quantizer = SimpleNamespace(
        quantization_config=SimpleNamespace(get_apply_tensor_subclass=Int8WeightOnlyConfig)
    )
    return net


# How a layer is quantised, and the relative error that this makes of normal numbers.
KINDS: dict[str, tuple[Callable[..., Net], dict[str, Any], float]] = {
    "bnb-8bit": (eight_bit, {}, 0.012),
    "bnb-nf4": (four_bit, {"compress_statistics": False}, 0.11),
    "bnb-nf4-double": (four_bit, {"compress_statistics": True}, 0.11),
    "bnb-nf4-stored-as-bfloat16": (four_bit, {"quant_storage": torch.bfloat16}, 0.11),
    "bnb-fp4": (four_bit, {"quant_type": "fp4"}, 0.13),
    "torchao-int8": (torchao_int8, {}, 0.012),
}
kinds = pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=needs_torchao if k.startswith("torchao") else needs_bitsandbytes) for k in KINDS]
)


def net(kind: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Net:
    torch.manual_seed(0)
    quantise, options, _ = KINDS[kind]
    return quantise(nn.Linear(IN, OUT).to(dtype), **options).to(device)


def config_of(method: str, **changes: Any) -> OrthoConfig:
    return ADAPTERS[method](**{**SMALL.get(method, {}), "target_modules": ["lin"], "init_weights": False, **changes})


def adapted(model: nn.Module, method: str, **changes: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, config_of(method, **changes))


def layer_of(model: Any) -> OrthoLayer:
    return model.base_model.model.lin


def stored(layer: OrthoLayer) -> list[Tensor]:
    """All that a quantised weight consists of, as copies."""
    base = layer.get_base_layer()
    weight, state = base.weight, getattr(base.weight, "quant_state", None)
    if type(weight).__name__ == "Int8Params":
        parts = [weight.data, weight.SCB if base.state.SCB is None else base.state.SCB]
    elif state is not None:
        parts = [weight.data, state.absmax, state.code, *([state.state2.absmax, state.offset] if state.nested else [])]
    else:
        parts = [weight.qdata, weight.scale]
    return [part.detach().clone() for part in parts]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Compare byte by byte: codes stored as bfloat16 may read as NaN."""
    pairs = list(zip(one, other, strict=True))
    assert all(a.dtype == b.dtype and a.shape == b.shape and a.device == b.device for a, b in pairs)
    return all(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)) for a, b in pairs)


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


def merge(model: Any, *args: Any, **kwargs: Any) -> str:
    """Merge, and return the one line that says what requantising has changed."""
    with pytest.warns(UserWarning, match="requantised") as caught:
        model.merge_adapter(*args, **kwargs)
    (line,) = [str(w.message) for w in caught if "requantised" in str(w.message)]
    return line


# Training


@every
@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward_are_those_of_the_dequantised_layer(kind: str, method: str, dtype: torch.dtype) -> None:
    model = adapted(net(kind, dtype), method).train()
    layer = layer_of(model)
    plain = nn.Linear(IN, OUT)
    plain.weight.data, plain.bias.data = layer.get_base_weight().float(), layer.base_layer.bias.data.float()
    twin = adapted(Net(plain), method).train()
    layer_of(twin).adapters.load_state_dict(layer.adapters.state_dict())
    plain.to(dtype)
    results = []
    for one in (model, twin):
        x = torch.randn(2, ROWS, IN, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
        y = one(x)
        y.float().square().sum().backward()
        trained = [p for p in one.parameters() if p.requires_grad]
        assert y.dtype == x.grad.dtype == dtype
        assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in trained)
        results.append([y, x.grad, *(p.grad for p in trained)])
    for got, wanted in zip(*results, strict=True):
        assert error(got, wanted) < ROUNDING[dtype]


@every
@kinds
def test_trains_and_leaves_the_codes_alone(kind: str, method: str) -> None:
    model = adapted(net(kind), method).train()
    x, before = torch.randn(64, IN), stored(layer_of(model))
    with torch.no_grad():
        target = model(x)  # of an adapter to be found again from the identity
    layer_of(model).adapters["default"].reset_parameters(identity=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=2e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(model(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert same(stored(layer_of(model)), before)


# Merging


@every
@kinds
def test_merge_requantises_and_reports_its_error(kind: str, method: str) -> None:
    model = adapted(net(kind), method).train()
    layer, bound = layer_of(model), KINDS[kind][2]
    x = torch.randn(ROWS, IN)
    with torch.no_grad():
        wanted, before = model(x), layer.get_base_weight()
        rotated = layer.adapters["default"].merged(before.float())  # W'
    line = merge(model)
    assert layer.requantization_error == pytest.approx(error(layer.get_base_weight(), rotated), rel=1e-4)
    assert 0 < layer.requantization_error < bound
    assert line == f"requantised 1 layer, relative error {layer.requantization_error:.2g} at most (lin)"
    assert error(model(x), wanted) < 2 * bound
    assert error(before, rotated) > bound  # the adapter does more than the rounding


@every
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_unmerge_restores_the_codes(kind: str, method: str, dtype: torch.dtype, training: bool) -> None:
    model = adapted(net(kind, dtype), method).train(training)
    layer, x = layer_of(model), torch.randn(ROWS, IN).to(dtype)
    with torch.no_grad():
        wanted, original = model(x), stored(layer)
        for _ in range(2):
            merge(model)
            assert not same(stored(layer), original)
            model(x)
            model.unmerge_adapter()
            assert same(stored(layer), original)
            assert layer.requantization_error is None
            assert torch.equal(model(x), wanted)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@every
@kinds
def test_adapters_merged_in_turn_are_computed_from_the_original(kind: str, method: str) -> None:
    model = adapted(net(kind), method)
    model.add_adapter("second", config_of(method))
    layer, x = layer_of(model), torch.randn(ROWS, IN)
    original = stored(layer)
    model.base_model.set_adapter(["default", "second"])
    merge(model)
    at_once, reported = stored(layer), layer.requantization_error
    model.unmerge_adapter()
    merge(model, ["default"])
    model(x)
    merge(model, ["second"])
    assert same(stored(layer), at_once)
    assert layer.requantization_error == reported
    model.unmerge_adapter()
    assert same(stored(layer), original)


@kinds
def test_disabling_a_merged_adapter_gives_the_base_back(kind: str) -> None:
    model, x = adapted(net(kind), "oftv2").eval(), torch.randn(ROWS, IN)
    with torch.no_grad(), model.disable_adapter():
        wanted = model(x)
    merge(model)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(x), wanted)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@kinds
def test_broken_adapter_changes_nothing(kind: str) -> None:
    model = adapted(net(kind), "oftv2")
    model.add_adapter("broken", config_of("oftv2"))
    layer = layer_of(model)
    merge(model, ["default"])
    merged = stored(layer)
    with torch.no_grad():
        layer.adapters["broken"].skew.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"NaNs detected.*The adapter broken"):
        model.merge_adapter(["broken"], safe_merge=True)
    assert same(stored(layer), merged)
    assert layer.merged_adapters == ["default"]


@kinds
def test_merge_and_unload_returns_the_quantised_layer(kind: str) -> None:
    model = adapted(net(kind), "oftv2").train()
    x, base = torch.randn(ROWS, IN), type(layer_of(model).base_layer)
    with torch.no_grad():
        wanted = model(x)
    with pytest.warns(UserWarning, match=r"requantised 1 layer, relative error 0\.\d+ at most \(lin\)"):
        merged = model.merge_and_unload()
    assert type(merged.lin) is base
    assert error(merged(x), wanted) < 2 * KINDS[kind][2]


def test_summary_names_the_worst_layer() -> None:
    line = quantization.requantization_summary({"a": 0.01, "b.q_proj": 0.0825, "c": 0.02})
    assert line == "requantised 3 layers, relative error 0.083 at most (b.q_proj)"


def test_plain_layers_report_nothing() -> None:
    model = adapted(Net(nn.Linear(IN, OUT)), "oftv2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
    assert layer_of(model).requantization_error is None


# What cannot be merged into


class CodesOnly(nn.Linear):
    """A layer as GPTQ, AWQ and AQLM have it: no weight, only codes that its own forward can read."""

    def __init__(self) -> None:
        super().__init__(IN, OUT)
        scale = self.weight.detach().abs().max() / 127
        self.register_buffer("qweight", (self.weight.detach() / scale).round().to(torch.int8))
        self.scale = scale
        del self.weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight * self.scale, self.bias)


def trains(model: Any) -> bool:
    x = torch.randn(ROWS, IN)
    model.train()(x).square().sum().backward()
    return all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ["oftv2", "hra"])
@pytest.mark.parametrize("name", ["gptq", "awq", "aqlm"])
def test_forward_only_layers_train_and_refuse_to_merge(method: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = quantization_utils.ForwardOnlyQuantizationBackend(name)
    monkeypatch.setattr(quantization, "resolve_quantization_backend", lambda *args, **kwargs: backend)
    model = adapted(Net(CodesOnly()), method)
    assert trains(model)
    for merge_of in (model.merge_adapter, model.merge_and_unload, layer_of(model).merge):
        with pytest.raises(ValueError, match=f"merging into layers quantised with {name} is not supported: merge into"):
            merge_of()
    assert not layer_of(model).merged_adapters


@kinds
def test_layers_that_peft_cannot_read_train_and_refuse_to_merge(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("as PEFT 0.20 with torchao 0.18 does")

    monkeypatch.setattr(quantization, "resolve_quantization_backend", resolve)
    model = adapted(net(kind), "oftv2")
    assert trains(model)
    before = stored(layer_of(model))
    with pytest.raises(ValueError, match=r"this PEFT cannot merge into the quantised weight of Linear\w*: merge into"):
        model.merge_adapter()
    assert same(stored(layer_of(model)), before)


def test_unknown_quantisation_is_refused() -> None:
    layer = nn.Linear(IN, OUT)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="cannot merge into the quantised weight of Linear"):
        quantization.check_mergeable(layer, None)


def test_plain_layers_do_not_ask_for_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "resolve_quantization_backend", lambda *args, **kwargs: pytest.fail("was asked"))
    assert trains(adapted(Net(nn.Linear(IN, OUT).bfloat16().float()), "oftv2"))


@needs_torchao
@every
def test_torchao_without_its_configuration_trains_and_says_what_is_missing(method: str) -> None:
    quantised = net("torchao-int8")
    del quantised.hf_quantizer
    quantised.first = nn.Linear(IN, IN)
    model = adapted(quantised, method, target_modules=["first", "lin"])
    first, before = quantised.first.base_layer.weight.detach().clone(), stored(layer_of(model))
    assert all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r"load the model with quantization_config=TorchAoConfig\(\.\.\.\)"):
        model.merge_adapter()
    assert torch.equal(quantised.first.base_layer.weight, first)  # not half of the model
    assert same(stored(layer_of(model)), before)
    model.delete_adapter("default")
    model = adapted(net("torchao-int8"), method)
    assert trains(model)


@needs_bitsandbytes
def test_not_yet_quantised_weight_is_refused() -> None:
    model = adapted(four_bit(nn.Linear(IN, OUT)), "oftv2")
    with pytest.raises(ValueError, match="the weight of Linear4bit is not quantised yet: move the model to its device"):
        model.merge_adapter()


# The repacking of 4-bit weights on CPUs with AVX512-BF16


def repack(layer: Any) -> None:
    """Do to a 4-bit layer what its first evaluation does on such a CPU."""
    functional = pytest.importorskip("bitsandbytes.functional")
    layer.weight.data, _ = functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)


FOUR_BIT = [k for k in KINDS if "4" in k]


@needs_bitsandbytes
@pytest.mark.parametrize("kind", FOUR_BIT)
def test_adapted_layers_are_not_repacked(kind: str) -> None:
    base = net(kind)
    base.lin.support_avx512bf16_for_cpu = True  # as on such a CPU
    model, x = adapted(base, "oftv2"), torch.randn(ROWS, IN)
    before = stored(layer_of(model))
    with torch.no_grad():
        wanted = model.train()(x)
        assert torch.equal(model.eval()(x), wanted)
    assert same(stored(layer_of(model)), before)
    assert trains(model)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", FOUR_BIT)
def test_repacked_layers_are_unpacked(kind: str) -> None:
    from bitsandbytes.functional import dequantize_4bit

    base = net(kind)
    wanted, codes = dequantize_4bit(base.lin.weight, base.lin.weight.quant_state), base.lin.weight.data.clone()
    repack(base.lin)
    state = base.lin.weight.quant_state
    assert error(dequantize_4bit(base.lin.weight.data, state), wanted) > 0.5  # garbage, without a word
    model = adapted(base, "oftv2")
    layer = layer_of(model)
    assert same([layer.base_layer.weight.data], [codes])
    assert error(layer.get_base_weight(), wanted) < 2**-8  # the scales were rounded to bfloat16
    assert layer.get_base_weight().dtype == wanted.dtype
    assert trains(model)
    x, original = torch.randn(ROWS, IN), stored(layer)
    with torch.no_grad():
        output = model(x)
    merge(model)
    assert error(model(x), output) < 2 * KINDS[kind][2]
    model.unmerge_adapter()
    assert same(stored(layer), original)


@needs_bitsandbytes
def test_layers_without_an_adapter_let_gradients_through() -> None:
    """One that was packed in an evaluation would stop them without a word, on CPUs with AVX512-BF16."""
    first, second = net("bnb-nf4").lin, four_bit(nn.Linear(IN, OUT)).lin
    model = nn.ModuleDict({"lin": first, "next": second})
    repack(second.to("cpu"))
    first.support_avx512bf16_for_cpu = second.support_avx512bf16_for_cpu = True
    get_peft_model(model, config_of("oftv2"))
    for layer in (first, second):
        assert not layer.support_avx512bf16_for_cpu
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


# Models that transformers quantises


def loaders() -> dict[str, Callable[[], Any]]:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    def torchao() -> Any:
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())

    qlora = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return {
        "bnb-8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "bnb-nf4-double": lambda: BitsAndBytesConfig(load_in_4bit=True, **qlora),
        "torchao-int8": torchao,
    }


IDS = torch.arange(24).reshape(4, 6) + 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder)
    return folder


def load(folder: Path, kind: str, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=loaders()[kind](), **options)


def codes_of(model: nn.Module) -> dict[str, list[Tensor]]:
    return {name: stored(module) for name, module in model.named_modules() if isinstance(module, OrthoLayer)}


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=needs_torchao if "torchao" in k else needs_bitsandbytes) for k in loaders()]
)
def test_quantised_language_model(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    """QOFT is OFTv2 on a 4-bit model: trained, saved, loaded, merged, unmerged."""
    config = OFTv2Config(block_size=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(prepare_model_for_kbit_training(load(checkpoint, kind)), config).train()
    codes = codes_of(model)
    assert len(codes) == 6
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all(same(parts, codes[name]) for name, parts in codes_of(model).items())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(prepare_model_for_kbit_training(load(checkpoint, kind)), tmp_path).eval()
    with torch.no_grad():
        wanted = model.eval()(input_ids=IDS).logits
        assert torch.equal(again(input_ids=IDS).logits, wanted)
        assert "requantised 6 layers" in merge(again)
        assert error(again(input_ids=IDS).logits, wanted) < (0.5 if "4" in kind else 0.05)
        again.unmerge_adapter()
        assert torch.equal(again(input_ids=IDS).logits, wanted)
    assert all(same(parts, codes[name]) for name, parts in codes_of(again).items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@every
@kinds
def test_on_a_gpu(kind: str, method: str) -> None:
    model = adapted(net(kind, torch.bfloat16, "cuda"), method).train()
    layer, x = layer_of(model), torch.randn(ROWS, IN, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = model(x)
    model(x).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.is_cuda for p in model.parameters() if p.requires_grad)
    original = stored(layer)
    merge(model)
    assert layer.base_layer.weight.is_cuda
    assert error(model(x), wanted) < 2 * KINDS[kind][2]
    model.unmerge_adapter()
    assert all(part.is_cuda for part in stored(layer))
    assert same(stored(layer), original)
