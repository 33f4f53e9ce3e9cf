"""The gradients of a loss, one at a time: all of them together would be a second copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def gradients(
    found: Sequence[tuple[str, nn.Parameter]], use: Callable[[str, Tensor], None]
) -> Iterator[Callable[[Tensor], None]]:
    """Give a function that runs a loss backward, on which ``use`` gets each gradient by name, in float32.

    A gradient is forgotten before the next one comes; a parameter that the loss does not depend on has none.
    Afterwards the parameters are as before, their own gradients too.
    """
    before = [(parameter, parameter.requires_grad, parameter.grad) for _, parameter in found]

    def hand_over(name: str, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.float(), None
        use(name, gradient)

    hooks = []
    for name, parameter in found:
        parameter.requires_grad_(True).grad = None
        hooks.append(parameter.register_post_accumulate_grad_hook(partial(hand_over, name)))  # type: ignore[no-untyped-call]
    try:
        yield lambda loss: torch.autograd.backward(loss, inputs=[parameter for _, parameter in found])
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required).grad = gradient
