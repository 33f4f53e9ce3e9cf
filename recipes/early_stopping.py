"""Training that ends when the tuning split gains nothing more, and keeps what was best there."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from orthoft.recipes.checkpoints import put
from orthoft.recipes.task_schema import EarlyStopping


class KeepBest(TrainerCallback):
    """Watch the loss of each evaluation: stop after ``patience`` of them without a gain of more than ``threshold``.

    The trained tensors of the best one are kept in memory and put back at the end. The last step is evaluated, too.
    """

    def __init__(self, wanted: EarlyStopping) -> None:
        self.wanted = wanted
        self.loss, self.step, self.in_vain = float("inf"), 0, 0
        self.best: dict[str, Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, model: Any = None, **kwargs: Any
    ) -> None:
        loss = float(metrics["eval_loss"])
        if loss < self.loss - self.wanted.threshold:
            self.loss, self.step, self.in_vain = loss, state.global_step, 0
            trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
            self.best = {name: p.detach().clone() for name, p in trained}
        else:
            self.in_vain += 1
            control.should_training_stop |= self.in_vain >= self.wanted.patience

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        put(self.best, model)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold for an interrupted training to stop where an uninterrupted one does."""
        return {"loss": self.loss, "step": self.step, "in_vain": self.in_vain, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.loss, self.step, self.in_vain = state["loss"], state["step"], state["in_vain"]
        self.best = state["best"]

    def told(self) -> dict[str, Any]:
        """Return which step was kept, and its loss on the tuning split."""
        return {"step": self.step, "loss": self.loss if self.best else None}
