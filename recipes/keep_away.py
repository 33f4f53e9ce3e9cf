"""A penalty that keeps an adapter's update away from the inputs of other tasks while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import TrainerCallback

from orthoft.recipes.base_weights import linear_layers
from orthoft.recipes.eigen import leading_eigenvectors
from orthoft.recipes.initialise import base_weight

DIRECTIONS = 256  # of the others' inputs that count, the strongest


def root(covariance: Tensor, directions: int = DIRECTIONS) -> Tensor:
    """Return ``L`` (n, k) in float32 with ``L L^T`` the best approximation of rank k to the covariance (n, n)."""
    C = covariance.double()
    V = leading_eigenvectors(lambda X: C @ X, len(C), min(directions, len(C)), C)
    values = (V * (C @ V)).sum(0)
    L: Tensor = V * values.clamp(min=0).sqrt()
    return L.float().contiguous()


@dataclass(frozen=True)
class _Held:
    """One adapted layer: ``A`` (r, n), ``B`` (m, r), ``L`` (n, k), and ``s^2 / ||W L||^2``."""

    A: Tensor
    B: Tensor
    L: Tensor
    share: float


class KeepAway(TrainerCallback):
    """Add to each step the gradient of ``weight mean_l ||s B A L||^2 / ||W L||^2`` over the layers l of a LoRA.

    ``L L^T`` is the covariance of the other tasks' inputs of the layer: the penalty is how much, in the mean square,
    the update changes what the layer says to inputs of other tasks, relative to what it says. Adam's or any optimizer's
    gradients get it after they are clipped, whatever the Trainer.

    Args:
        roots: ``L`` (n, k) by the base's names of the weights, see `root`.
        weight: of the penalty beside the loss.

    Raises:
        ValueError: a weight that is not positive; when training begins, a layer without a LoRA.
    """

    def __init__(self, roots: Mapping[str, Tensor], weight: float, adapter: str = "default") -> None:
        if not weight > 0:
            raise ValueError(f"the weight of the penalty must be positive (10, say), got {weight}")
        self.roots, self.weight, self.adapter = roots, weight, adapter
        self.held: list[_Held] = []

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        layers = _layers(model)
        for name, L in self.roots.items():
            layer, inputs_first = layers.get(name, (None, False))
            if not isinstance(layer, LoraLayer) or self.adapter not in layer.lora_A:
                raise ValueError(f"{name!r} has no LoRA {self.adapter!r} that could be kept away from other tasks")
            A, B = layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight
            W, L = base_weight(layer, inputs_first), L.to(A.device, A.dtype)
            size = float((W.to(A.dtype) @ L).square().sum())
            self.held.append(_Held(A, B, L, layer.scaling[self.adapter] ** 2 / size))

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add ``2 c B A L L^T A^T`` to the gradient of B, ``2 c B^T B A L L^T`` to that of A if it trains."""
        for held in self.held:
            c = 2 * self.weight * held.share / len(self.held)
            P = held.A @ held.L  # (r, k)
            BP = held.B @ P  # (m, k)
            if held.B.grad is not None:
                held.B.grad.add_(BP @ P.mT, alpha=c)
            if held.A.grad is not None:
                held.A.grad.add_((held.B.mT @ BP) @ held.L.mT, alpha=c)

    @torch.no_grad()
    def penalty(self) -> float:
        """Return ``mean_l ||s B A L||^2 / ||W L||^2`` as it is now."""
        terms = [held.share * float((held.B @ (held.A @ held.L)).square().sum()) for held in self.held]
        return sum(terms) / max(1, len(terms))


def _layers(model: nn.Module) -> dict[str, tuple[nn.Module, bool]]:
    """Return what `linear_layers` gives by name, of a PEFT model or of the one inside what is trained."""
    return dict(linear_layers(next((part for part in model.modules() if isinstance(part, PeftModel)), model)))
