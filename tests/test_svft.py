"""SVFT: its pattern, its two schedules, what is saved of it, and the layers it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from reference_svft import entries, svft
from safetensors.torch import load_file
from tiny import Net, save_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from orthoft import sparse
from orthoft.adapter import FrozenLinear
from orthoft.adapters.svft import SVFTConfig
from orthoft.delta import LowRank
from orthoft.layer import OrthoLayer
from orthoft.sparse import weight_is_cheaper
from orthoft.spectral import SpectralUpdate

SIZE, OUT, IN, ROWS = 12, 10, 24, 7

# Configurations with the shape (m, n) of a weight they go on.
CASES: dict[str, tuple[SVFTConfig, tuple[int, int]]] = {
    "plain": (SVFTConfig(), (OUT, IN)),
    "plain tall": (SVFTConfig(), (IN, OUT)),
    "banded": (SVFTConfig(pattern="banded", off_diagonals=3), (OUT, IN)),
    "random gate": (SVFTConfig(pattern="random", gate=True, seed=3), (OUT, IN)),
    "top_k": (SVFTConfig(pattern="top_k", off_diagonals=1), (SIZE, SIZE)),
    "truncated": (SVFTConfig(pattern="banded", rank=5), (OUT, IN)),
    "truncated lowrank": (SVFTConfig(pattern="banded", rank=5, svd="lowrank"), (OUT, IN)),
}
SCHEDULES = ("activations", "weight", "auto")


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request: pytest.FixtureRequest) -> tuple[SVFTConfig, tuple[int, int]]:
    torch.manual_seed(0)
    return CASES[request.param]


def adapted(config: SVFTConfig, lin: nn.Module, start: bool = False, name: str = "default") -> Any:
    config = replace(config, target_modules=["lin"], init_weights=start)
    return get_peft_model(Net(lin), config, adapter_name=name)


def linear(shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> nn.Linear:
    return nn.Linear(shape[1], shape[0], dtype=dtype)


def layer_of(model: Any) -> OrthoLayer:
    return model.base_model.model.lin


def adapter_of(model: Any, name: str = "default") -> SpectralUpdate:
    return layer_of(model).adapters[name]


def adapter(config: SVFTConfig, weight: Tensor, start: bool = False) -> SpectralUpdate:
    made = config.make_adapter("lin", weight.shape[1], weight.shape[0]).to(weight.dtype)
    made.adopt(lambda: weight)
    made.reset_parameters(identity=start)
    return made


def state_of(adapter: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().double().requires_grad_() for k, v in adapter.state_dict().items()}


def distance(got: Tensor, wanted: Tensor) -> float:
    return (got.double() - wanted.double()).abs().max().item()


# The pattern


@pytest.mark.parametrize("off_diagonals", [0, 1, 2, 7, 11, 30])
@pytest.mark.parametrize("pattern", ["banded", "random", "top_k"])
def test_entries_are_unique_and_as_many_as_the_formula_says(pattern: Any, off_diagonals: int) -> None:
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(SIZE, SIZE)).Q for _ in range(2))
    found = sparse.find_entries(pattern, off_diagonals, U, V, "0:lin")
    d = min(off_diagonals, SIZE - 1)
    assert len(found) == len(set(found.tolist())) == SIZE * (2 * d + 1) - d * (d + 1)
    assert found.tolist() == sorted(found.tolist())
    assert set(found.tolist()) <= set(range(SIZE * SIZE))
    config = SVFTConfig(pattern=pattern, off_diagonals=off_diagonals)
    assert [divmod(e, SIZE) for e in found.tolist()] == entries(config, U.double(), V.double())


def test_plain_is_the_diagonal() -> None:
    V = torch.eye(SIZE)
    assert sparse.find_entries("plain", 5, V, V, "").tolist() == [i * SIZE + i for i in range(SIZE)]


def test_top_k_takes_what_aligns_by_magnitude() -> None:
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(SIZE, SIZE)).Q for _ in range(2))
    found = set(sparse.top_entries(U, V, 20).tolist())
    score = {i * SIZE + j: abs(float(U[:, i] @ V[j])) for i in range(SIZE) for j in range(SIZE)}
    assert min(score[e] for e in found) >= max(s for e, s in score.items() if e not in found)
    assert found == set(sparse.top_entries(-U, V, 20).tolist())


def test_top_k_of_a_symmetric_weight_is_its_diagonal_and_then_the_first() -> None:
    torch.manual_seed(0)
    half = torch.randn(SIZE, SIZE, dtype=torch.float64)
    one = adapter(SVFTConfig(pattern="top_k", off_diagonals=1), half + half.T)  # |u_i^T v_j| is 1, or noise
    places = {divmod(e, SIZE) for e in places_of(one)}
    diagonal = {(i, i) for i in range(SIZE)}
    assert places - diagonal == set([(i, j) for i in range(SIZE) for j in range(SIZE) if i != j][: 2 * (SIZE - 1)])


def places_of(one: SpectralUpdate) -> list[int]:
    """The flat entries, read off the dense matrix with marked values."""
    dense = sparse.sparse_product(
        torch.ones(len(one.cols), dtype=torch.float64), one.cols, one.offsets, torch.eye(one.k, dtype=torch.float64)
    )
    return dense.flatten().nonzero().flatten().tolist()


def test_random_depends_on_seed_and_layer_but_not_on_their_order() -> None:
    def places(order: list[str], seed: int = 0) -> dict[str, list[int]]:
        config = SVFTConfig(pattern="random", seed=seed)
        return {key: places_of(adopted(config.make_adapter(key, SIZE, SIZE))) for key in order}

    first = places(["a.lin", "b.lin"])
    assert first == places(["b.lin", "a.lin"])
    assert first["a.lin"] != first["b.lin"]
    assert first["a.lin"] != places(["a.lin"], seed=1)["a.lin"]


def adopted(one: SpectralUpdate) -> SpectralUpdate:
    one.adopt(lambda: torch.randn(one.shape))
    return one


@pytest.mark.parametrize("width", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sparse_product_is_the_dense_one(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    found = sparse.random_entries(SIZE, 20, "")  # some rows are empty
    values, Z = torch.randn(20, dtype=torch.float64), torch.randn(SIZE, width, dtype=dtype)
    M = torch.zeros(SIZE * SIZE, dtype=torch.float64).index_put((found,), values).reshape(SIZE, SIZE)
    assert not M.any(dim=1).all()
    got = sparse.sparse_product(values, *sparse.compressed(found, SIZE), Z)
    assert got.dtype == dtype
    assert (got.double() - M @ Z.double()).norm() <= 8 * torch.finfo(dtype).eps * M.norm() * Z.double().norm()


# What it computes


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_starts_as_the_identity(case: Any, schedule: Any, training: bool) -> None:
    config, shape = case
    lin = linear(shape, torch.float32)
    x = torch.randn(ROWS, shape[1])
    wanted = lin(x)
    model = adapted(replace(config, schedule=schedule), lin, start=True).train(training)
    assert distance(model(x), wanted) <= 2e-6
    if schedule == "weight" or config.rank:  # nothing stands for the frozen layer
        assert torch.equal(model(x), wanted)
    adapter_of(model).values.add_(0.1)
    assert distance(model(x), wanted) > 1e-2


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rows", [(ROWS,), (2, 0), (), (300,)])
def test_forward_is_the_layer_with_the_dense_weight(
    case: Any, schedule: Any, training: bool, rows: tuple[int, ...]
) -> None:
    config, shape = case
    lin = linear(shape)
    model = adapted(replace(config, schedule=schedule), lin).train(training)
    weight = svft(lin.weight, state_of(adapter_of(model)), config)
    if config.svd == "lowrank":
        weight = svft(lin.weight, {**state_of(adapter_of(model)), **bases_of(model)}, config)
    x = torch.randn(*rows, shape[1], dtype=torch.float64)
    wanted = nn.functional.linear(x, weight, lin.bias)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(x), wanted, atol=1e-12, rtol=1e-12)
    assert distance(weight, lin.weight) > 1e-2


def bases_of(model: Any) -> dict[str, Tensor]:
    return {"U": adapter_of(model).U, "V": adapter_of(model).V}


def test_lowrank_bases_are_the_leading_ones() -> None:
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(30, 20)).Q, torch.linalg.qr(torch.randn(20, 20)).Q
    weight = left * 0.5 ** torch.arange(20.0) @ right
    full, low = (adapter(SVFTConfig(rank=4, svd=svd), weight) for svd in ("full", "lowrank"))
    assert distance(full.U, low.U) < 1e-6
    assert distance(full.V, low.V) < 1e-6


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradcheck(case: Any, schedule: Any, known: bool) -> None:
    config, shape = case
    W, bias = torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64)
    one = adapter(replace(config, schedule=schedule), W)
    names = [name for name, _ in one.named_parameters()]

    def call(x: Tensor) -> Tensor:
        return nn.functional.linear(x, W, bias)

    frozen = FrozenLinear(call, W, bias) if known else FrozenLinear(call)

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(one, dict(zip(names, values, strict=True)), (x, frozen))

    x = torch.randn(2, shape[1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(output, (x, *one.parameters()))


def test_gradients_of_the_schedules_equal_those_of_the_oracle(case: Any) -> None:
    config, shape = case
    lin = linear(shape)
    model = adapted(replace(config, save_basis=True), lin)
    state = state_of(adapter_of(model))
    x = torch.randn(ROWS, shape[1], dtype=torch.float64, requires_grad=True)
    towards = torch.randn(ROWS, shape[0], dtype=torch.float64)
    names = [name for name, _ in adapter_of(model).named_parameters()]
    wanted = torch.autograd.grad(
        (nn.functional.linear(x, svft(lin.weight.detach(), state, config)) * towards).sum(),
        [x, *(state[name] for name in names)],
    )
    for schedule in SCHEDULES:
        adapter_of(model).config = replace(config, schedule=schedule)
        got = torch.autograd.grad((model(x) * towards).sum(), [x, *adapter_of(model).parameters()])
        for mine, theirs in zip(got, wanted, strict=True):
            assert distance(mine, theirs) <= 1e-11
            assert theirs.abs().max() > 1e-3


# The schedules


class Calls:
    """A frozen layer that counts how often it is called."""

    def __init__(self, lin: nn.Linear) -> None:
        self.lin, self.count = lin, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.lin(x)


def calls(one: SpectralUpdate, lin: nn.Linear, x: Tensor, known: bool = True) -> int:
    frozen = Calls(lin)
    one(x, FrozenLinear(frozen, lin.weight if known else None, lin.bias if known else None))
    return frozen.count


def test_the_chain_drops_the_frozen_layer_only_where_it_gives_its_weight() -> None:
    torch.manual_seed(0)
    lin, config = linear((OUT, IN), torch.float32).requires_grad_(False), SVFTConfig(schedule="activations")
    x = torch.randn(ROWS, IN)
    one = adapter(config, lin.weight)
    assert calls(one, lin, x) == 0
    assert calls(one, lin, x, known=False) == 1
    assert calls(adapter(replace(config, rank=OUT - 1), lin.weight), lin, x) == 1
    lin.weight.requires_grad_(True)
    assert calls(one, lin, x) == 1
    lin.weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert calls(one, lin, x) == 1
    lin.weight.add_(1e-2)
    one.train()
    assert calls(one, lin, x) == 1
    assert calls(one.bfloat16(), lin.bfloat16(), x.bfloat16()) == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_changed_weight_is_what_is_adapted(schedule: Any) -> None:
    torch.manual_seed(0)
    lin = linear((OUT, IN), torch.float32)
    model = adapted(SVFTConfig(schedule=schedule), lin)
    x = torch.randn(ROWS, IN)
    change = torch.randn(OUT, IN)
    wanted = model(x) + x @ change.T
    lin.weight.data += change
    assert distance(model.train()(x), wanted) < 1e-5


@pytest.mark.parametrize("known", [True, False])
def test_auto_changes_over_where_the_counts_meet(known: bool) -> None:
    def cheaper(tokens: int, k: int = 64, **changes: Any) -> bool:
        return weight_is_cheaper(tokens, (64, 64), k, **{"chain": False, "known": known, "training": True, **changes})

    chain_meets = 128  # 4 T = 3 T + 2 d
    assert [cheaper(t, chain=True, known=True) for t in (chain_meets, chain_meets + 1)] == [False, True]
    meets = 43 if known else 128  # 6 T = 3 T + 2 d, and 6 T = 5 T + 2 d
    assert [cheaper(t) for t in (meets - 1, meets + 1)] == [False, True]
    assert not cheaper(10**9, k=8)  # thin factors always win
    assert cheaper(65, chain=True, known=True, training=False)
    assert not cheaper(64, chain=True, known=True, training=False)


def test_auto_takes_the_schedule_that_is_counted_as_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    lin = linear((SIZE, SIZE))
    one, formed = adapter(SVFTConfig(), lin.weight.detach()), []
    update = one.update
    monkeypatch.setattr(one, "update", lambda *args: formed.append(1) or update(*args))
    frozen = FrozenLinear(lin, lin.weight.detach(), lin.bias)
    few, many = (torch.randn(t, SIZE, dtype=torch.float64) for t in (2 * SIZE, 2 * SIZE + 1))
    one(few, frozen)
    assert not formed
    one(many, frozen)
    assert formed == [1]


def test_the_weight_schedule_forms_its_update_once_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = adapted(SVFTConfig(schedule="weight"), linear((OUT, IN), torch.float32))
    one, formed, x = adapter_of(model), [], torch.randn(ROWS, IN)
    update = one.update
    monkeypatch.setattr(one, "update", lambda *args: formed.append(1) or update(*args))
    model.train()
    for _ in range(2):
        model(x)
    assert len(formed) == 2
    model.eval()
    with torch.no_grad():
        before = [model(x) for _ in range(3)][-1]
        assert len(formed) == 3
        one.values.data.mul_(2)
        assert distance(model(x), before) > 1e-2
    assert len(formed) == 4


def test_only_the_weight_schedule_makes_something_of_the_size_of_the_weight() -> None:
    torch.manual_seed(0)
    lin = linear((64, 64), torch.float32)
    x = torch.randn(3, 64, requires_grad=True)
    for schedule, allowed in (("activations", 0), ("weight", 64 * 64)):
        one = adapter(SVFTConfig(schedule=schedule), lin.weight.detach())
        sizes: list[int] = []
        ours = {t.untyped_storage().data_ptr() for t in [*one.buffers(), *lin.parameters()]}

        def note(t: Tensor, ours: set[int] = ours, sizes: list[int] = sizes) -> Tensor:
            if t.untyped_storage().data_ptr() not in ours:
                sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            one(x, FrozenLinear(lin, lin.weight.detach(), lin.bias))
        assert max(sizes) == max(allowed, 64 * 3)


# Merging, deltas, combinations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge(case: Any, dtype: torch.dtype) -> None:
    config, shape = case
    model = adapted(config, linear(shape, dtype))
    base, x = layer_of(model).base_layer, torch.randn(ROWS, shape[1], dtype=dtype)
    before, wanted = base.weight.detach().clone(), model(x)
    model.merge_adapter()
    assert base.weight.dtype == dtype
    assert distance(model(x), wanted) <= (1e-5 if dtype == torch.float32 else 4e-2)
    assert distance(base.weight, before) > 1e-2
    model.unmerge_adapter()
    assert torch.equal(base.weight, before)


def test_delta_is_what_merging_adds(case: Any) -> None:
    config, shape = case
    W = torch.randn(shape, dtype=torch.float64)
    one = adapter(config, W)
    delta = one.delta(W)
    assert delta.shape == shape
    assert delta.rank() == config.rank
    assert isinstance(delta, LowRank) == (config.rank is not None)
    assert distance(delta.dense(), one.merged(W) - W) < 1e-12
    assert distance(one.merged(one.merged(W), inverse=True), W) < 1e-12


@pytest.mark.parametrize("gate", [False, True])
def test_weighted_combination_is_the_sum_of_the_updates(gate: bool) -> None:
    torch.manual_seed(0)
    config = replace(SVFTConfig(pattern="random", gate=gate), target_modules=["lin"], init_weights=False)
    model = get_peft_model(Net(linear((OUT, IN))), config, adapter_name="a")
    model.add_adapter("b", replace(config, schedule="weight"))
    model.base_model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "sum")
    a, b, total = (layer_of(model).get_delta_weight(name) for name in ("a", "b", "sum"))
    assert distance(total, 0.7 * a - 0.4 * b) < 1e-12
    model.base_model.add_weighted_adapter(["a"], [1.0], "same")
    assert distance(layer_of(model).get_delta_weight("same"), a) < 1e-15


def test_combinations_need_the_same_entries_and_bases() -> None:
    torch.manual_seed(0)
    W = torch.randn(SIZE, SIZE)
    one, other = (adapter(SVFTConfig(pattern="random", seed=s), W) for s in (0, 1))
    with torch.no_grad(), pytest.raises(ValueError, match="same pattern"):
        one.combine([one, other], [0.5, 0.5])
    elsewhere = adapter(SVFTConfig(pattern="random"), torch.randn(SIZE, SIZE))
    with torch.no_grad(), pytest.raises(ValueError, match="another basis"):
        one.combine([one, elsewhere], [0.5, 0.5])


# Saving and loading


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def trained(case: Any) -> tuple[SVFTConfig, nn.Linear, Any]:
    """A configuration, a base, and a model trained on a copy of it."""
    config, shape = case
    lin, copy = linear(shape, torch.float32), linear(shape, torch.float32)
    copy.load_state_dict(lin.state_dict())
    return config, lin, adapted(config, copy)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(trained: Any, tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    config, lin, model = trained
    tensors = load_file(saved(model, tmp_path) / "adapter_model.safetensors")
    assert {k.rpartition(".")[2] for k in tensors} == {"values", "fingerprint"} | ({"gate"} if config.gate else set())
    again = PeftModel.from_pretrained(Net(lin), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    x = torch.randn(ROWS, lin.in_features)
    assert torch.equal(again(x), model.eval()(x))
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_another_base_is_refused(trained: Any, tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    _, lin, model = trained
    saved(model, tmp_path)
    nn.init.normal_(lin.weight)
    with pytest.raises(ValueError, match=r"trained in another basis.*save_basis=True"):
        PeftModel.from_pretrained(Net(lin), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_another_base_is_refused_by_set_peft_model_state_dict() -> None:
    torch.manual_seed(0)
    one, other = (adapted(SVFTConfig(), linear((OUT, IN), torch.float32)) for _ in range(2))
    state = get_peft_model_state_dict(one)
    set_peft_model_state_dict(one, state)
    with pytest.raises(ValueError, match="trained in another basis"):
        set_peft_model_state_dict(other, state)


def test_other_entries_are_refused() -> None:
    torch.manual_seed(0)
    lin = linear((OUT, IN), torch.float32)
    one, other = (adapter(SVFTConfig(pattern="random", seed=s), lin.weight.detach()) for s in (0, 1))
    with pytest.raises(ValueError, match="trained in another basis"):
        other.load_state_dict(one.state_dict())


@pytest.mark.parametrize("pattern", ["plain", "top_k"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_saved_bases_need_no_fitting_base(pattern: Any, schedule: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = adapted(
        SVFTConfig(pattern=pattern, save_basis=True, schedule=schedule), linear((SIZE, SIZE), torch.float32)
    )
    tensors = load_file(saved(model, tmp_path) / "adapter_model.safetensors")
    assert {k.rpartition(".")[2] for k in tensors} == {"values", "fingerprint", "U", "V"}
    lin = linear((SIZE, SIZE), torch.float32)
    again = PeftModel.from_pretrained(Net(lin), tmp_path)
    x, delta = torch.randn(ROWS, SIZE), layer_of(model).get_delta_weight("default")
    assert distance(again(x), nn.functional.linear(x, lin.weight + delta, lin.bias)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("save_basis", [False, True])
def test_a_model_cast_after_it_was_made_keeps_its_bases(dtype: torch.dtype, save_basis: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    lin, copy = linear((OUT, IN), torch.float32), linear((OUT, IN), torch.float32)
    copy.load_state_dict(lin.state_dict())
    model = adapted(SVFTConfig(pattern="banded", save_basis=save_basis), copy)
    bases = bases_of(model)
    model.to(dtype)
    assert adapter_of(model).values.dtype == dtype
    assert all(torch.equal(bases[name], found) for name, found in bases_of(model).items())
    again = PeftModel.from_pretrained(Net(lin), saved(model, tmp_path))
    assert torch.equal(adapter_of(again).values, adapter_of(model).values)
    assert torch.equal(adapter_of(again).U, bases["U"])


@pytest.mark.parametrize("save_basis", [False, True])
def test_transformers_loads_it(save_basis: bool, tmp_path: Path) -> None:
    save_llama(tmp_path / "base")

    def base(seed: int) -> Any:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(seed)
        nn.init.normal_(model.model.layers[1].self_attn.q_proj.weight)
        return model.eval()

    config = SVFTConfig(pattern="top_k", target_modules=["q_proj", "o_proj"], init_weights=False, save_basis=save_basis)
    model = get_peft_model(base(0), config)
    folder = saved(model, tmp_path / "adapter")
    again, ids = base(0), torch.arange(8)[None]
    again.load_adapter(str(folder))
    assert distance(again(ids).logits, model.eval()(ids).logits) < 1e-5
    assert distance(again(ids).logits, base(0)(ids).logits) > 1e-2
    other = base(1)
    if not save_basis:
        with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj' was trained in another basis"):
            other.load_adapter(str(folder))
        return
    other.load_adapter(str(folder))
    loaded = other.model.layers[1].self_attn.q_proj
    trained = model.base_model.model.model.layers[1].self_attn.q_proj
    assert distance(loaded.get_delta_weight("default"), trained.get_delta_weight("default")) < 1e-6


def test_the_merged_weight_is_that_of_the_authors_formula() -> None:
    """``(V^T (Sigma + s sigmoid(g))^T U^T)^T``, the weight that the authors' layer multiplies with."""
    torch.manual_seed(0)
    W = torch.randn(OUT, IN, dtype=torch.float64)
    one = adapter(SVFTConfig(pattern="banded", gate=True), W)
    U, sigma, V = torch.linalg.svd(W, full_matrices=False)
    turned = torch.sign((V * one.V).sum(1))
    rows, cols = torch.tensor(places_of(one)) // OUT, torch.tensor(places_of(one)) % OUT
    core = torch.diag(sigma)
    core[rows, cols] += one.values.detach() * torch.sigmoid(one.gate.detach()) * turned[rows] * turned[cols]
    assert distance(one.merged(W), (V.T @ core.T @ U.T).T) < 1e-12


@pytest.mark.parametrize("off_diagonals", [0, 1, 3, 40])
def test_size_of_a_core_by_its_entries(off_diagonals: int) -> None:
    assert [sparse.core_size(sparse.entry_count(k, off_diagonals), off_diagonals) for k in range(1, 60)] == [
        *range(1, 60)
    ]


def test_a_weight_without_values_is_refused() -> None:
    with torch.device("meta"):
        lin = linear((OUT, IN))
    with pytest.raises(ValueError, match="meta device"):
        adapted(SVFTConfig(), lin)


# Layers and precision


class Scaled(nn.Embedding):
    def __init__(self, *args: Any, scale: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.embed_scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        scale = self.embed_scale
        return super().forward(ids) * (scale.to(self.weight.dtype) if isinstance(scale, Tensor) else scale)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: nn.Embedding(30, SIZE),
    "scaled embedding, a tensor": lambda: Scaled(30, SIZE, scale=torch.tensor(50.596)),
    "scaled embedding, a number": lambda: Scaled(30, SIZE, scale=50.596),
    "Conv1D": lambda: Conv1D(OUT, SIZE),
    "conv": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
}


def input_of(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.randint(30, (3, 5))
    return (
        torch.randn(2, 4, 9, 9, dtype=dtype) if isinstance(layer, nn.Conv2d) else torch.randn(3, 5, SIZE, dtype=dtype)
    )


@pytest.mark.parametrize("make", LAYERS.values(), ids=[name.replace(", ", "-").replace(" ", "-") for name in LAYERS])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers(make: Callable[[], nn.Module], schedule: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = make().to(dtype)
    x, exact = input_of(layer, dtype), dtype == torch.float64
    wanted = layer(x)
    start = adapted(SVFTConfig(pattern="banded", schedule=schedule), layer, start=True)
    assert distance(start(x), wanted) <= (1e-12 if exact else 0.0)
    assert distance(start.eval()(x), wanted) <= (1e-12 if exact else 0.0)
    start.unload()
    model = adapted(SVFTConfig(pattern="banded", schedule=schedule), layer)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter_of(model).parameters())
    assert adapter_of(model).U.dtype == (torch.float64 if exact else torch.float32)
    got = model(x).detach()
    model.merge_adapter()
    assert distance(got, model(x)) <= (1e-12 if exact else 0.02 * wanted.abs().max().item())
    assert distance(got, wanted) > 0.03 * wanted.abs().max().item()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(schedule: Any, autocast: bool) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if autocast else torch.bfloat16
    lin = linear((64, 96), dtype)
    model = adapted(SVFTConfig(pattern="banded", schedule=schedule, save_basis=True), lin)
    assert all(p.dtype == torch.float32 for p in adapter_of(model).parameters())
    x = torch.randn(50, 96, dtype=torch.bfloat16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    assert y.dtype == torch.bfloat16
    towards = torch.randn(50, 64, dtype=torch.bfloat16)
    y.backward(towards)
    state = state_of(adapter_of(model))
    wanted = nn.functional.linear(
        x.double(), svft(lin.weight.detach().double(), state, SVFTConfig(pattern="banded")), lin.bias.double()
    )
    assert ((y - wanted).norm() / wanted.norm()).item() < 6e-3
    (gradient,) = torch.autograd.grad((wanted * towards).sum(), [state["values"]])
    got = adapter_of(model).values.grad
    assert got.dtype == torch.float32
    assert ((got - gradient).norm() / gradient.norm()).item() < 1e-2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("schedule", ["activations", "weight"])
def test_compiles_in_one_graph(schedule: Any, training: bool) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    model = adapted(SVFTConfig(pattern="banded", schedule=schedule, gate=True), linear((OUT, IN), torch.float32))
    model.train(training)
    x = torch.randn(ROWS, IN, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(x), model(x)
    assert distance(got, wanted) < 1e-5
    leaves = [x, *adapter_of(model).parameters()]
    for mine, theirs in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, wanted)), strict=True):
        assert distance(mine, theirs) < 1e-4


def test_several_adapters_add_their_updates() -> None:
    torch.manual_seed(0)
    config = replace(SVFTConfig(pattern="banded", save_basis=True), target_modules=["lin"], init_weights=False)
    model = get_peft_model(Net(linear((OUT, IN))), config, adapter_name="1")
    model.add_adapter("2", replace(config, schedule="weight"))
    model.base_model.set_adapter(["1", "2"])
    base, x = layer_of(model).base_layer, torch.randn(ROWS, IN, dtype=torch.float64)
    weight = base.weight.detach()
    for name in ("1", "2"):
        weight = svft(weight, state_of(adapter_of(model, name)), config)
    torch.testing.assert_close(model(x), nn.functional.linear(x, weight, base.bias), atol=1e-12, rtol=1e-12)
    model.merge_adapter()
    assert distance(base.weight, weight) < 1e-12


def test_a_lora_beneath_keeps_its_part() -> None:
    torch.manual_seed(0)
    lora = get_peft_model(Net(linear((OUT, IN))), peft.LoraConfig(target_modules=["lin"], init_lora_weights=False))
    x = torch.randn(ROWS, IN, dtype=torch.float64)
    wanted = lora(x)
    model = adapted(SVFTConfig(), lora.merge_and_unload().lin, start=True)
    assert distance(model(x), wanted) < 1e-12


# The configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "diagonal"}, "pattern"),
        ({"schedule": "fast"}, "schedule"),
        ({"svd": "thin"}, "svd"),
        ({"off_diagonals": -1}, "off_diagonals must not be negative"),
        ({"rank": 0}, "rank must be a positive number"),
        ({"rank_pattern": {"lin": 0}}, "rank must be a positive number"),
        ({"svd": "lowrank"}, "give a rank"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SVFTConfig(**changes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SVFTConfig(pattern="top_k"), r"needs square weights, but 'lin' is \(10, 24\)"),
        (SVFTConfig(rank=11), "rank 11 does not fit 'lin', which has 10 singular vectors"),
    ],
)
def test_layers_that_do_not_fit(config: SVFTConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(config, linear((OUT, IN)))


def test_ranks_of_single_layers() -> None:
    config = SVFTConfig(rank=20, rank_pattern={"lin": 4})
    assert config.make_adapter("a.lin", IN, OUT).values.shape == (4,)
    assert config.make_adapter("a.up", IN, IN).values.shape == (20,)
    assert config.make_adapter("a.up", IN, IN).flops_per_token() == 2 * 20 * 48 + 2 * 20
