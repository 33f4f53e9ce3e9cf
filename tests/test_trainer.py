"""OrthoTrainer: the adapters' regularisers are in the loss of training, and in nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from orthoft import GOFTConfig, HRAConfig, OrthoTrainer, WithPenalty, penalty
from orthoft.config import OrthoConfig

CONFIGS = {
    "hra": HRAConfig(r=4, orthogonality_weight=0.5, target_modules=["hidden"]),
    "goft": GOFTConfig(mode="quasi", orthogonality_weight=0.5, target_modules=["hidden"], init_weights=False),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, 8)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.hidden(x)
        return {"loss": ((out - labels) ** 2).mean(), "logits": out}


def trainer_of(config: OrthoConfig, folder: Path, cls: type[Trainer] = OrthoTrainer, **arguments: Any) -> Trainer:
    torch.manual_seed(0)
    model = get_peft_model(Net(), config)
    rows = [{"x": torch.randn(8), "labels": torch.randn(8)} for _ in range(16)]
    settings = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"} | arguments
    arguments_ = TrainingArguments(output_dir=str(folder), per_device_train_batch_size=4, **settings)
    return cls(model=model, args=arguments_, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("method", CONFIGS)
def test_evaluation_reports_the_loss_alone(method: str, tmp_path: Path) -> None:
    with_penalty, plain = (trainer_of(CONFIGS[method], tmp_path, cls) for cls in (OrthoTrainer, Trainer))
    assert with_penalty.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    trained = trainer_of(CONFIGS[method], tmp_path, eval_on_start=True, eval_strategy="epoch", num_train_epochs=1)
    assert trained.train().training_loss > 0


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_makes_the_penalty_small(method: str, accumulation: int, tmp_path: Path) -> None:
    after = []
    for cls in (Trainer, OrthoTrainer):
        trainer = trainer_of(
            CONFIGS[method],
            tmp_path,
            cls,
            learning_rate=0.05,
            num_train_epochs=8,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        left = penalty(trainer.model)
        assert left is not None
        after.append(left.item())
    assert after[1] < 0.7 * after[0]


def test_mixes_into_any_trainer(tmp_path: Path) -> None:
    class Loud(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(*args, **kwargs)
            return (2 * found[0], found[1]) if isinstance(found, tuple) else 2 * found

    class Mixed(WithPenalty, Loud):
        pass

    batch = {"x": torch.ones(2, 8), "labels": torch.zeros(2, 8)}
    losses = {}
    for cls in (Trainer, Mixed):
        trainer = trainer_of(CONFIGS["hra"], tmp_path, cls)
        trainer.current_gradient_accumulation_steps = 1
        losses[cls] = trainer.compute_loss(trainer.model, dict(batch)).item()
    added = penalty(trainer.model)
    assert added is not None
    assert losses[Mixed] == pytest.approx(2 * losses[Trainer] + added.item(), rel=1e-5)


@pytest.mark.parametrize("how", ["by tokens", "by a function", "it says so", "not"])
def test_the_penalty_does_not_grow_with_the_accumulated_steps(how: str, tmp_path: Path) -> None:
    class One(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return torch.tensor(1.0)

    class Mixed(WithPenalty, One):
        pass

    trainer: Any = trainer_of(CONFIGS["hra"], tmp_path, Mixed)
    trainer.current_gradient_accumulation_steps = 4
    trainer.model_accepts_loss_kwargs = how == "by tokens"
    trainer.loss_is_scaled_for_ga = True if how == "it says so" else None
    trainer.compute_loss_func = print if how == "by a function" else None
    found = trainer.compute_loss(trainer.model, {}, num_items_in_batch=8 if how == "by tokens" else None).item()
    added = penalty(trainer.model)
    assert added is not None
    assert found == pytest.approx(1 + added.item() / (1 if how == "not" else 4), rel=1e-5)
