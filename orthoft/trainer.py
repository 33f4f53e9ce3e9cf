"""Trainers that add the adapters' own regularisers to the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from orthoft.tuner import penalty


class WithPenalty:
    """Mix into a Trainer, in front of it, for ``loss + orthoft.penalty(model)``.

    ``class MyTrainer(WithPenalty, SFTTrainer): ...`` does it for TRL's; `OrthoTrainer` is transformers' own.
    Evaluation, which takes no gradient, reports the loss alone.
    """

    current_gradient_accumulation_steps: int
    model_accepts_loss_kwargs: bool
    compute_loss_func: Any
    loss_is_scaled_for_ga: bool | None = None

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        theirs = super().compute_loss  # type: ignore[misc]  # of the Trainer behind this class
        found = theirs(model, inputs, return_outputs=return_outputs, **kwargs)  # outputs cost TRL a second pass
        loss, outputs = found if return_outputs else (found, None)
        added = penalty(model) if torch.is_grad_enabled() else None
        if added is not None:
            steps = self.current_gradient_accumulation_steps if self._scaled(kwargs.get("num_items_in_batch")) else 1
            loss = loss + added.to(loss.device) / steps
        return (loss, outputs) if return_outputs else loss

    def _scaled(self, items: Any) -> bool:
        """Say whether the Trainer leaves the loss as it is, in place of dividing it by the accumulated steps."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        return (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None


class OrthoTrainer(WithPenalty, Trainer):
    """transformers' Trainer, with the adapters' regularisers in the loss where they have one."""
