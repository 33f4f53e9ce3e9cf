"""What is special to PSOFT: the basis it takes from the weight, saves or knows again, and PEFT's own PSOFT."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from merging_files import MODELS, TARGETS, randomised
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from reference_psoft import psoft
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from orthoft.adapters.psoft import PSOFTConfig, SubspaceRotation
from orthoft.bases import signed_svd
from orthoft.layer import OrthoLayer

OUT, IN, ROWS = 10, 24, 7
CONFIGS = {
    "relaxed": PSOFTConfig(r=6),
    "strict": PSOFTConfig(r=6, relax=False),
    "relaxed series": PSOFTConfig(r=6, map="series", degree=3),
    "strict series": PSOFTConfig(r=6, relax=False, map="series"),
    "lowrank": PSOFTConfig(r=6, svd="lowrank", seed=3),
    "one dimension": PSOFTConfig(r=1),
    "all dimensions": PSOFTConfig(r=10),
}
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=[name.replace(" ", "-") for name in CONFIGS])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def adopted(config: PSOFTConfig, weight: Tensor, start: bool = False) -> SubspaceRotation:
    """An adapter on a float64 weight, away from the identity unless ``start``."""
    made = config.make_adapter("lin", weight.shape[1], weight.shape[0]).double()
    made.adopt(lambda: weight)
    made.reset_parameters(identity=start)
    return made


def doubles(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def state_of(adapter: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in [*adapter.named_parameters(), *adapter.named_buffers()]}


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


# What it computes


@each
@pytest.mark.parametrize("shape", [(10, 24), (24, 10), (12, 12)], ids=str)
def test_equals_the_dense_oracle(config: PSOFTConfig, shape: tuple[int, int]) -> None:
    W, x = doubles(*shape), doubles(2, ROWS, shape[1])
    one = adopted(config, W)
    wanted = psoft(W, state_of(one), config)
    assert error(wanted, W) > 1e-2
    assert error(one(x, lambda x: x @ W.mT), x @ wanted.mT) < 1e-12
    assert error(one.merged(W), wanted) < 1e-12
    B, A = one.delta(W).factors()
    assert (B.shape, A.shape) == ((shape[0], config.r), (config.r, shape[1]))
    assert error(W + B @ A, wanted) < 1e-12


@each
def test_starts_as_the_identity(config: PSOFTConfig) -> None:
    W, x = doubles(OUT, IN), doubles(ROWS, IN)
    one = adopted(config, W, start=True)
    assert torch.equal(one.rotate(x), x)
    assert sum(p.numel() for p in one.parameters()) == config.r * (config.r - 1) // 2 + 2 * config.r * config.relax


@each
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotation_flags(config: PSOFTConfig, transpose: bool, inverse: bool) -> None:
    one, eye = adopted(config, doubles(OUT, IN)), torch.eye(IN, dtype=torch.float64)
    Q = psoft(eye, state_of(one), config).mT
    Q = torch.linalg.inv(Q) if inverse else Q
    assert error(one.rotate(eye, transpose=transpose, inverse=inverse), Q.mT if transpose else Q) < 1e-12


def test_orthogonal_without_the_scales_only() -> None:
    eye, weight = torch.eye(IN), torch.randn(OUT, IN)
    defects = {}
    for name in ("strict", "relaxed"):
        one = CONFIGS[name].make_adapter("lin", IN, OUT)
        one.adopt(lambda: weight)
        one.reset_parameters(identity=False)
        Q = one.rotate(eye).detach().double()
        defects[name] = torch.linalg.matrix_norm(Q.mT @ Q - torch.eye(IN), 2).item()
    assert defects["strict"] < 2e-6
    assert defects["relaxed"] > 1e-2


@each
@pytest.mark.parametrize("inverse", [False, True])
def test_gradcheck(config: PSOFTConfig, inverse: bool) -> None:
    one = adopted(config, doubles(OUT, IN))
    names = [name for name, _ in one.named_parameters()]
    x = doubles(3, IN).requires_grad_()

    def rotated(x: Tensor, *values: Tensor) -> Tensor:
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(Rotate(one, inverse), {f"adapter.{n}": v for n, v in state.items()}, (x,))

    assert torch.autograd.gradcheck(rotated, (x, *one.parameters()), fast_mode=True)


class Rotate(nn.Module):
    """``rotate`` as a forward, for functional_call."""

    def __init__(self, adapter: SubspaceRotation, inverse: bool) -> None:
        super().__init__()
        self.adapter, self.inverse = adapter, inverse

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter.rotate(x, inverse=self.inverse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saves_the_thin_product_and_not_the_input(dtype: torch.dtype) -> None:
    one = PSOFTConfig(r=4).make_adapter("lin", 64, 64)
    one.adopt(lambda: torch.randn(64, 64))
    one.reset_parameters()
    x, saved = torch.randn(1000, 64, dtype=dtype, requires_grad=True), {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = one.rotate(x)
    assert y.dtype == dtype
    assert sum(saved.values()) < 0.1 * x.untyped_storage().nbytes()


def test_compiles_whole() -> None:
    one = adopted(PSOFTConfig(r=4), doubles(OUT, IN))
    x = doubles(ROWS, IN)
    compiled = torch.compile(one.rotate, fullgraph=True, backend="aot_eager")
    assert error(compiled(x), one.rotate(x)) < 1e-14


# Combinations


def test_combination_adds_generators_and_multiplies_powers_of_scales() -> None:
    W = doubles(OUT, IN)
    first, second, both = (adopted(PSOFTConfig(r=4), W) for _ in range(3))
    with torch.no_grad():
        both.combine([first, second], [1.0, 0.0])
        assert error(both.merged(W), first.merged(W)) < 1e-12
        both.combine([first, second], [0.5, -2.0])
    assert error(both.alpha, first.alpha**0.5 / second.alpha**2) < 1e-12
    assert error(both.beta, first.beta**0.5 / second.beta**2) < 1e-12
    assert error(both.merged(W), first.merged(W)) > 1e-2
    with torch.no_grad():
        second.skew.copy_(2 * first.skew / (1 - first.skew**2))
    twice, once = (adopted(PSOFTConfig(r=2, relax=False), W) for _ in range(2))
    with torch.no_grad():
        twice.combine([once], [2.0])
    assert error(twice.merged(W), once.merged(once.merged(W))) < 1e-12


def test_combination_refuses_other_bases_and_powers_that_do_not_exist() -> None:
    W = doubles(OUT, IN)
    first, second, other = (adopted(PSOFTConfig(r=4), w) for w in (W, W, doubles(OUT, IN)))
    with torch.no_grad():
        with pytest.raises(ValueError, match="need the same basis, those of 'lin' have others"):
            first.combine([second, other], [0.5, 0.5])
        second.alpha[0] = -1.0
        with pytest.raises(ValueError, match="alpha of 'lin' is not positive everywhere"):
            first.combine([second], [0.5])
        first.combine([second], [1.0])
    assert error(first.merged(W), second.merged(W)) < 1e-12


@pytest.mark.parametrize("save_basis", [True, False])
def test_add_weighted_adapter(save_basis: bool) -> None:
    config = PSOFTConfig(r=4, target_modules=["lin"], init_weights=False, save_basis=save_basis)
    model = get_peft_model(Net(), config, adapter_name="a")
    model.add_adapter("b", config)
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 0.0], "c")
    x, out = torch.randn(ROWS, IN), {}
    for name in "abc":
        model.set_adapter(name)
        out[name] = model(x)
    assert error(out["c"], out["a"]) < 1e-6
    assert error(out["c"], out["b"]) > 1e-2


# Layers


class Net(nn.Module):
    def __init__(self, lin: nn.Module | None = None) -> None:
        super().__init__()
        self.lin = nn.Linear(IN, OUT) if lin is None else lin

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


LAYERS = {
    "Linear": (lambda: nn.Linear(IN, OUT), lambda: torch.randn(ROWS, IN), lambda w: w, lambda w, like: w),
    "Conv1D": (lambda: randomised(Conv1D(OUT, IN)), lambda: torch.randn(ROWS, IN), lambda w: w.mT, lambda w, _: w.mT),
    "Embedding": (lambda: nn.Embedding(30, IN), lambda: torch.arange(30), lambda w: w, lambda w, _: w),
    "Conv2d": (
        lambda: nn.Conv2d(4, OUT, (3, 2), stride=2, padding=1, groups=2),
        lambda: torch.randn(2, 4, 9, 8),
        lambda w: w.flatten(1),
        lambda w, like: w.reshape(like.shape),
    ),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("relax", [True, False])
def test_works_on(layer: str, relax: bool) -> None:
    make, draw, rows, stored = LAYERS[layer]
    config = PSOFTConfig(r=5, relax=relax, target_modules=["lin"], init_weights=False)
    model, x = get_peft_model(Net(make()), config).eval(), draw()
    host: OrthoLayer = model.base_model.model.lin
    base = host.base_layer
    one = host.adapters["default"]
    Vh = torch.linalg.svd(rows(base.weight.detach()).double())[2][:5]
    torch.testing.assert_close((one.basis.double() @ Vh.mT).abs(), torch.eye(5, dtype=torch.float64), atol=1e-4, rtol=0)
    wanted = stored(psoft(rows(base.weight.detach()), state_of(one), config), base.weight).float()
    plain, got = base(x), model(x)
    model.merge_adapter()
    assert error(base.weight, wanted) < 1e-6
    assert error(model(x), got) < 1e-5
    assert error(got, plain) > 1e-2


# The basis


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("save_basis", [True, False])
def test_half_precision_leaves_the_basis_in_float32(tmp_path: Path, save_basis: bool, low_cpu_mem_usage: bool) -> None:
    config = PSOFTConfig(r=4, target_modules=["lin"], init_weights=False, save_basis=save_basis)
    base = nn.Linear(IN, OUT, dtype=torch.bfloat16)
    _, _, wanted = signed_svd(base.weight.detach().float(), 4)
    model = get_peft_model(Net(base), config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    for one in (model, loaded, model.to(torch.bfloat16)):
        basis = one.base_model.model.lin.adapters["default"].basis
        assert basis.dtype == torch.float32
        assert torch.equal(basis, wanted)
    assert model(torch.randn(2, IN, dtype=torch.bfloat16)).dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "half")
    PeftModel.from_pretrained(Net(base), tmp_path / "half")


def tuned(kind: str, seed: int, **changes: Any) -> PeftModel:
    config = PSOFTConfig(r=4, target_modules=TARGETS[kind], init_weights=False, **changes)
    return get_peft_model(base_model(kind, seed), config).eval()


def base_model(kind: str, seed: int) -> Any:
    return randomised(MODELS[kind](), seed=seed).eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(24).reshape(4, 6))[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("save_basis", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(tmp_path: Path, kind: str, save_basis: bool, low_cpu_mem_usage: bool) -> None:
    model = tuned(kind, seed=1, save_basis=save_basis)
    model.save_pretrained(tmp_path)
    names = {name.rpartition(".")[2] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert names == {"skew", "alpha", "beta", "basis" if save_basis else "fingerprint"}
    loaded = PeftModel.from_pretrained(base_model(kind, 1), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert error(output(loaded), output(model)) < 1e-6
    assert error(output(loaded), output(base_model(kind, 1))) > 1e-2
    again = base_model(kind, 1)
    again.load_adapter(str(tmp_path))
    assert error(output(again), output(model)) < 1e-6
    into = tuned(kind, seed=1, save_basis=save_basis)
    assert not set_peft_model_state_dict(into, get_peft_model_state_dict(model)).unexpected_keys
    assert error(output(into), output(model)) < 1e-6


def by_from_pretrained(folder: Path, base: Any) -> None:
    PeftModel.from_pretrained(base, folder)


def by_from_pretrained_on_meta(folder: Path, base: Any) -> None:
    PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)


def by_peft(folder: Path, base: Any) -> None:
    model = get_peft_model(base, PSOFTConfig(r=4, target_modules=TARGETS["llama"]))
    model.load_adapter(folder, "second")


def by_transformers(folder: Path, base: Any) -> None:
    base.load_adapter(str(folder))


def by_state_dict(folder: Path, base: Any) -> None:
    model = get_peft_model(base, PSOFTConfig(r=4, target_modules=TARGETS["llama"], save_basis=False))
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


WAYS = [by_from_pretrained, by_from_pretrained_on_meta, by_peft, by_transformers, by_state_dict]


@pytest.mark.parametrize("load", WAYS, ids=lambda way: way.__name__)
def test_fingerprint_refuses_another_base(tmp_path: Path, load: Any) -> None:
    tuned("llama", seed=1, save_basis=False).save_pretrained(tmp_path)
    load(tmp_path, base_model("llama", seed=1))
    with pytest.raises(ValueError, match=r"proj' was trained in another basis than this base weight gives"):
        load(tmp_path, base_model("llama", seed=2))


def test_one_turned_singular_vector_is_refused() -> None:
    W = torch.randn(64, 64)
    U, s, Vh = signed_svd(W)
    turned = U @ torch.diag(s) @ torch.cat([torch.stack([Vh[0] + Vh[1], Vh[0] - Vh[1]]) / 2**0.5, Vh[2:]])
    config = PSOFTConfig(r=16, save_basis=False)
    saved = adopted(config, W).state_dict()
    adopted(config, W + 1e-6 * W.norm() / 64 * torch.randn(64, 64)).load_state_dict(saved)
    with pytest.raises(ValueError, match="another basis"):
        adopted(config, turned).load_state_dict(saved)


def test_saved_basis_wins_over_the_base() -> None:
    W, other = doubles(OUT, IN), doubles(OUT, IN)
    config = PSOFTConfig(r=4)
    one, two = adopted(config, W), adopted(config, other)
    two.load_state_dict(one.state_dict())
    assert torch.equal(two.basis, one.basis)
    assert torch.equal(two.merged(W), one.merged(W))


def test_missing_basis_on_meta_is_refused(tmp_path: Path) -> None:
    config = PSOFTConfig(r=4, target_modules=["lin"], save_basis=False)
    model = get_peft_model(Net(), config)
    model.save_pretrained(tmp_path)
    replace(config, save_basis=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'lin' was saved without its basis: load it without low_cpu_mem_usage"):
        PeftModel.from_pretrained(Net(), tmp_path, low_cpu_mem_usage=True)


def test_weight_that_is_not_in_memory_has_no_fingerprint() -> None:
    config, W = PSOFTConfig(r=4, save_basis=False), doubles(OUT, IN)
    offloaded = adopted(config, W.to("meta"))
    with pytest.raises(ValueError, match="'lin' needs the weight for its basis: load the base model without offload"):
        offloaded.load_state_dict(adopted(config, W).state_dict())


def test_loading_a_saved_basis_on_meta_takes_no_svd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(Net(), PSOFTConfig(r=4, target_modules=["lin"], init_weights=False))
    model.save_pretrained(tmp_path)
    x = torch.randn(ROWS, IN)
    wanted = model(x)
    base = model.unload()
    assert error(wanted, base(x)) > 1e-2
    monkeypatch.delattr("orthoft.adapters.psoft.signed_svd")
    assert error(PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)(x), wanted) < 1e-6


# Configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "at least 1"),
        ({"r": 1, "relax": False}, "at least 2 .*relax=False"),
        ({"rank_pattern": {"lin": -1}}, "got -1"),
        ({"degree": 4}, "must be odd"),
        ({"map": "cayly"}, "did you mean 'cayley'"),
        ({"svd": "fast"}, "full, lowrank"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PSOFTConfig(**changes)


def test_rank_has_to_fit_the_weight() -> None:
    with pytest.raises(ValueError, match="r = 11 does not fit 'lin', which has 24 inputs and 10 outputs"):
        get_peft_model(Net(), PSOFTConfig(r=11, target_modules=["lin"]))
    model = get_peft_model(Net(), PSOFTConfig(r=11, target_modules=["lin"], rank_pattern={"lin": 3}))
    assert model.base_model.model.lin.adapters["default"].basis.shape == (3, IN)


def test_large_series_becomes_cayley() -> None:
    with pytest.warns(UserWarning, match="setting map='cayley'"):
        assert PSOFTConfig(map="series", rank_pattern={"lin": 64}).map == "cayley"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PSOFTConfig(map="series", r=63).map == "series"
        assert PSOFTConfig(r=256).map == "cayley"


# PEFT's own PSOFT


def twins(out: int, features: int, relax: bool, neumann: bool) -> tuple[Any, Any]:
    """PEFT's model and ours with the same parameters: theirs take the signs of our singular vectors."""
    base, r = nn.Linear(features, out), 8
    series = {"use_cayley_neumann": True, "num_cayley_neumann_terms": 6} if neumann else {}  # of degree 5
    theirs = peft.PsoftConfig(r=r, target_modules=["lin"], psoft_mag_a=relax, psoft_mag_b=relax, **series)
    ours = PSOFTConfig(r=r, target_modules=["lin"], relax=relax, map="series" if neumann else "cayley")
    copies = [nn.Linear(features, out) for _ in range(2)]
    for copy in copies:
        copy.load_state_dict(base.state_dict())
    theirs, ours = get_peft_model(Net(copies[0]), theirs), get_peft_model(Net(copies[1]), ours)
    mine, peers = ours.base_model.model.lin.adapters["default"], theirs.base_model.model.lin
    A = peers._psoft_A_cache["default"]
    signs = torch.sign((A * mine.basis).sum(dim=1))  # each of their vectors is ours up to its sign
    with torch.no_grad():
        for name in ("weight", "vector_a", "vector_b") if relax else ("weight",):
            nn.init.normal_(getattr(peers.psoft_R["default"], name), mean=float(name != "weight"), std=0.1)
        rows, cols = torch.triu_indices(r, r, 1)
        mine.skew.copy_(peers.psoft_R["default"].weight * signs[rows] * signs[cols])
        if relax:
            mine.alpha.copy_(peers.psoft_R["default"].vector_a)
            mine.beta.copy_(peers.psoft_R["default"].vector_b)
    return theirs, ours


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (64, 64)], ids=str)
@pytest.mark.parametrize("relax", [True, False])
@pytest.mark.parametrize("neumann", [False, True])
def test_equals_peft(shape: tuple[int, int], relax: bool, neumann: bool) -> None:
    theirs, ours = twins(*shape, relax, neumann)
    x, base = torch.randn(128, shape[1]), ours.base_model.model.lin.base_layer
    before = base.weight.detach().clone()
    assert error(ours(x), theirs(x)) < 2e-6
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    if relax:
        mine, peers = ours.base_model.model.lin.adapters["default"], theirs.base_model.model.lin.psoft_R["default"]
        assert error(mine.alpha.grad, peers.vector_a.grad) < 1e-5
        assert error(mine.beta.grad, peers.vector_b.grad) < 1e-5
    ours.merge_adapter()
    theirs.merge_adapter()
    assert error(base.weight, theirs.base_model.model.lin.base_layer.weight) < 2e-6
    assert error(base.weight, before) > 0.05
