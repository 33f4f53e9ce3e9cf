"""The experts of a mixture, which transformers fuses into stacks of matrices: which modules they are."""

from __future__ import annotations

from typing import Any

from torch import nn

FIRST_MATRICES = ("gate_up_proj", "up_proj")  # what reads the input of the experts: with a gate, and without


class Experts:
    """A view of fused experts by which the stack of their first matrices is a ``weight``: (E, m, n), or (E, n, m)."""

    def __init__(self, module: Any) -> None:
        self.module, self.name = module, next(name for name in FIRST_MATRICES if name in module._parameters)

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.module, self.name)  # type: ignore[no-any-return]

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight}


def are_experts(module: nn.Module) -> bool:
    """Say whether a module holds experts in the way of transformers, which computes all of that kind alike.

    Of those its decorator of experts says that their input goes into their first matrices and nowhere else.
    """
    stacks = [p for name in FIRST_MATRICES if (p := module._parameters.get(name)) is not None]
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and [p.ndim for p in stacks] == [3]
