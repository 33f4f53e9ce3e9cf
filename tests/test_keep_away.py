"""The penalty that keeps updates away from other tasks' inputs: its gradient, and what training under it does."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
from tiny import Net, save_llama, save_t5
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from orthoft.recipes.keep_away import KeepAway, root
from orthoft.recipes.kinds.seq2seq import Writer
from orthoft.recipes.models import load_model
from orthoft.recipes.schema import Quantization

NAME = "lin.weight"


def adapted(r: int = 3, alpha: int = 6) -> peft.PeftModel:
    torch.manual_seed(0)
    model = peft.get_peft_model(
        Net(nn.Linear(8, 5)), peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["lin"], init_lora_weights=False)
    )
    return model


def factors(model: peft.PeftModel) -> tuple[nn.Parameter, nn.Parameter]:
    layer = model.base_model.model.lin
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def covariance() -> Tensor:
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    return (x.mT @ x / 40).double()


def begun(model: nn.Module, weight: float = 3.0, L: Tensor | None = None) -> KeepAway:
    callback = KeepAway({NAME: root(covariance()) if L is None else L}, weight)
    callback.on_train_begin(None, None, None, model=model)
    return callback


def test_the_root_gives_the_covariance_again() -> None:
    C = covariance()
    assert torch.allclose(root(C).double() @ root(C).double().mT, C, atol=1e-5)
    values = torch.linalg.eigvalsh(C)
    least = root(C, 3).double()
    assert least.shape == (8, 3)
    assert torch.linalg.matrix_norm(C - least @ least.mT, 2) == pytest.approx(float(values[-4]), rel=1e-4)


def test_the_root_of_many_inputs_takes_no_whole_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(600, 600, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    C = x.mT @ (x * torch.logspace(0, -12, 600, dtype=torch.float64)[:, None])
    values, vectors = torch.linalg.eigh(C)
    monkeypatch.delattr(torch.linalg, "eigh")
    L = root(C, 8).double()
    best = (vectors[:, -8:] * values[-8:]) @ vectors[:, -8:].mT
    assert torch.linalg.matrix_norm(L @ L.mT - best) < 1e-5 * values[-1]


def test_the_penalty_is_the_share_of_the_output_that_changes() -> None:
    model, C = adapted(), covariance()
    A, B = factors(model)
    W, D = model.base_model.model.lin.weight.double(), 2 * B.double() @ A.double()
    share = torch.trace(D @ C @ D.mT) / torch.trace(W @ C @ W.mT)
    assert begun(model).penalty() == pytest.approx(share.item(), rel=1e-4)


def test_its_gradient_is_that_of_autograd() -> None:
    model = adapted()
    callback = begun(model, weight=3.0)
    A, B = factors(model)
    W, L = model.base_model.model.lin.weight, callback.roots[NAME]
    ((3.0 * (2 * B @ A @ L).square().sum()) / (W @ L).square().sum()).backward()
    wanted = A.grad.clone(), B.grad.clone()
    A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
    callback.on_pre_optimizer_step(None, None, None)
    assert torch.allclose(A.grad - 1, wanted[0], atol=1e-5)
    assert torch.allclose(B.grad - 1, wanted[1], atol=1e-5)


def test_rows_that_are_frozen_get_no_gradient() -> None:
    model = adapted()
    A, B = factors(model)
    A.requires_grad_(False)
    callback = begun(model)
    B.grad = torch.zeros_like(B)
    callback.on_pre_optimizer_step(None, None, None)
    assert A.grad is None
    assert B.grad.abs().sum() > 0


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("words", [{"load_in_8bit": True}, {"load_in_4bit": True}], ids=["8 bits", "4 bits"])
def test_a_quantised_base_has_the_penalty_of_its_weights(words: dict[str, bool], tmp_path: Path) -> None:
    save_llama(tmp_path)
    name, terms = "model.layers.0.self_attn.q_proj.weight", list[float]()
    for quantization in (None, Quantization(**words)):
        torch.manual_seed(0)
        base = load_model("causal-lm", tmp_path, "float32", quantization)
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        callback = KeepAway({name: torch.eye(32)[:, :5].contiguous()}, 3.0)
        callback.on_train_begin(None, None, None, model=peft.get_peft_model(base, config))
        terms.append(callback.penalty())
    assert terms[1] == pytest.approx(terms[0], rel=0.2)


def test_a_weight_whose_inputs_come_first() -> None:
    torch.manual_seed(0)
    conv = Conv1D(5, 8)
    model = peft.get_peft_model(
        Net(conv), peft.LoraConfig(target_modules=["lin"], init_lora_weights=False, fan_in_fan_out=True)
    )
    A, B = factors(model)
    L = root(covariance())
    share = (B @ A @ L).square().sum() / (conv.weight.mT @ L).square().sum()
    assert begun(model).penalty() == pytest.approx(share.item(), rel=1e-4)


def test_a_model_that_writes_is_found_inside_its_wrapper(tmp_path: Path) -> None:
    save_t5(tmp_path)
    config = peft.LoraConfig(target_modules=["q"], task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    model = Writer(peft.get_peft_model(load_model("seq2seq", tmp_path, None), config))
    roots = {f"{side}.block.1.layer.0.SelfAttention.q.weight": torch.eye(32) for side in ("encoder", "decoder")}
    callback = KeepAway(roots, 3.0)
    callback.on_train_begin(None, None, None, model=model)
    assert len(callback.held) == 2
    assert callback.penalty() > 0


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_that_is_not_positive(weight: float) -> None:
    with pytest.raises(ValueError, match=r"must be positive \(10, say\), got"):
        KeepAway({}, weight)


def test_a_layer_without_a_lora() -> None:
    with pytest.raises(ValueError, match=r"'lin\.weight' has no LoRA 'default'"):
        begun(Net(nn.Linear(8, 5)))


def test_training_under_it_leaves_other_inputs_alone(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    others = torch.randn(64, 8) * torch.tensor([3.0, 3, 3, 3, 0.1, 0.1, 0.1, 0.1])
    rows = [{"x": torch.randn(8), "y": torch.randn(5)} for _ in range(32)]
    changes = []
    for weight in (None, 100.0):
        base = Regression(adapted())
        callbacks = [] if weight is None else [KeepAway({NAME: root(others.mT @ others / 64)}, weight)]
        arguments = TrainingArguments(
            str(tmp_path), max_steps=40, learning_rate=0.02, report_to="none", save_strategy="no", use_cpu=True,
            remove_unused_columns=False, disable_tqdm=True, label_names=["y"], seed=0,
        )  # fmt: skip
        Trainer(base, arguments, train_dataset=rows, callbacks=callbacks).train()
        with torch.no_grad():
            A, B = factors(base.encoder)
            changes.append((others @ (2 * B @ A).mT).square().mean().item())
    assert changes[1] < changes[0] / 10


class Regression(nn.Module):
    """A PEFT model called encoder, as under a classification head."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        out = self.encoder(x)
        return {"loss": (out - y).square().mean(), "logits": out}
