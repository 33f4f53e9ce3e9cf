"""How the base stores a weight: outputs or inputs first, one matrix or the experts of a mixture in one tensor."""

from __future__ import annotations

import re
from functools import cached_property

from orthoft.merging.files.tensors import TensorFolder, matrix_shape

EXPERTS = re.compile(r"(.*[._])?(experts|moe)[._].*")
TWINS = {"gate_up_proj": "down_proj", "down_proj": "gate_up_proj"}


def is_stacked(name: str, shape: tuple[int, ...]) -> bool:
    """Say whether a tensor holds the matrices or the biases of several experts, one behind the other.

    The name tells: the kernels of a Conv1d have three axes as well.
    """
    axes = 2 if name.endswith("bias") else 3
    return len(shape) == axes and EXPERTS.fullmatch(name) is not None


def is_vector(name: str, shape: tuple[int, ...]) -> bool:
    """Say whether a tensor, or what each expert has of it, has one row or one column alone."""
    return min(matrix_shape(shape[1:] if is_stacked(name, shape) else shape)) == 1


class Orientation:
    """Tells which weights a base stores as (inputs, outputs), as the Conv1D of GPT-2 and the experts of Llama 4 do."""

    def __init__(self, base: TensorFolder) -> None:
        self._base = base

    def inputs_first(self, name: str) -> bool:
        """Say whether the base stores a 2-D weight, or each expert of a 3-D one, as (inputs, outputs).

        The bias has one entry per output, which tells for weights that are not square. A square weight with a bias is
        stored like the nearest such weight, by the length of the name they share. For experts without a bias, the
        projections up and down share their sizes.
        """
        if is_stacked(name, self._base.shape(name)):
            return not name.endswith("bias") and self._experts_say(name)
        if _bias(name) not in self._base:
            return False
        own = self._bias_says(name)
        if own is not None:
            return own
        parts = name.split(".")
        leading = (".".join(parts[:end]) for end in range(len(parts), -1, -1))
        return next((self._nearest[prefix] for prefix in leading if prefix in self._nearest), False)

    @cached_property
    def _nearest(self) -> dict[str, bool]:
        """What the first weight below each prefix says, of those that are not square."""
        found: dict[str, bool] = {}
        for name in self._base:
            says = self._bias_says(name) if name.endswith(".weight") else None
            if says is not None:
                parts = name.split(".")
                for end in range(len(parts) + 1):
                    found.setdefault(".".join(parts[:end]), says)
        return found

    def _bias_says(self, name: str) -> bool | None:
        bias, shape = _bias(name), self._base.shape(name)
        if bias not in self._base or len(shape) != 2 or shape[0] == shape[1]:
            return None
        return self._base.shape(bias)[-1:] == shape[1:]

    def _experts_say(self, name: str) -> bool:
        _, rows, columns = self._base.shape(name)
        bias, (path, _, last) = f"{name}_bias", name.rpartition(".")
        if bias in self._base and rows != columns:
            return self._base.shape(bias)[-1] == columns
        twin = f"{path}.{TWINS.get(last)}"
        if twin not in self._base or len(self._base.shape(twin)) != 3:
            return False
        names = (name, twin) if last == "gate_up_proj" else (twin, name)
        up, down = (self._base.shape(one)[1:] for one in names)  # (n, 2 k) and (k, n) if inputs are first
        return up == (down[1], 2 * down[0])


def _bias(name: str) -> str:
    return f"{name.removesuffix('.weight')}.bias"
