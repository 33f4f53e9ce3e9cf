"""The configuration that every orthoft adapter shares with LoRA."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from peft.config import PeftConfig
from peft.utils import PeftType

from orthoft.adapter import Adapter
from orthoft.errors import unknown
from orthoft.peft_compat import peft_type_name, saves_biases, write_load_hint

# What adapters may differ in and still be combined: where they sit, how they were trained.
SET_ASIDE = frozenset(
    {f.name for f in fields(PeftConfig)}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_weights"}
    | {"dropout", "orthogonality_weight"}
)


@dataclass
class OrthoConfig(PeftConfig):
    """What every orthoft adapter has in common with LoRA: where it goes, and what else is trained.

    Args:
        target_modules: names (suffixes), a regular expression, or "all-linear"; by the model's architecture if None.
        exclude_modules: names or a regular expression of what to leave out.
        layers_to_transform: indices of the layers to adapt, all if None.
        layers_pattern: name of the list of layers the indices refer to.
        modules_to_save: modules that are trained and saved whole, such as a new head.
        bias: "none", "all", or "ortho_only" (of the adapted layers).
        init_weights: start as the identity; False draws a random start, for tests.
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of adapted layers."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    bias: str = field(default="none", metadata={"help": "'none', 'all' or 'ortho_only'."})
    init_weights: bool = field(default=True, metadata={"help": "Start as the identity."})

    method: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(peft_type_name(self.method))
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # PEFT's own habit
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        for name in ("rank_pattern", "block_size_pattern"):
            if getattr(self, name, {}) is None:
                setattr(self, name, {})
        if not isinstance(self.init_weights, bool):
            raise ValueError(
                f"init_weights is True (the identity) or False (a random start), got {self.init_weights!r}"
            )
        self._check_choice("bias", ("none", "all", "ortho_only"))
        if self.bias != "none" and not saves_biases():
            raise ValueError("bias needs PEFT 0.21 or newer: PEFT 0.20 trains biases but does not save them")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern names the list that layers_to_transform indexes: give both")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform needs target_modules as a list, not as a regular expression")

    @abstractmethod
    def make_adapter(self, key: str, in_features: int, out_features: int) -> Adapter:
        """Return the adapter of the layer named ``key``, not yet initialised."""

    def combined(self, others: Sequence[Self], keys: Sequence[str]) -> Self:
        """Return the configuration of a weighted combination of this adapter and others, on the layers ``keys``.

        Raises:
            ValueError: they differ in what their common geometry rests on, or have modules of their own beside it.
        """
        if any(config.modules_to_save for config in (self, *others)):
            raise ValueError("adapters with modules_to_save cannot be combined: those modules have no common geometry")
        for name in (f.name for f in fields(self) if f.name not in SET_ASIDE):
            values = [getattr(config, name) for config in (self, *others)]
            if any(value != values[0] for value in values):
                raise ValueError(f"adapters of one combination must agree in {name}, got {values}")
        config = copy(self)
        config.target_modules = set(keys)  # type: ignore[assignment]  # PEFT's own habit
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        write_load_hint(save_directory)

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise unknown(f"value of {name}", getattr(self, name), choices)

    @staticmethod
    def _check_whole(name: str, *sizes: object) -> None:
        for size in sizes:
            if not isinstance(size, int):
                raise ValueError(f"{name} must be a whole number, got {size!r}")

    @staticmethod
    def _by_pattern(pattern: dict[str, int], key: str, default: int) -> int:
        """Look ``key`` up the way PEFT does: the first pattern that matches the end of the module name."""
        return next((v for p, v in pattern.items() if re.match(rf"(.*\.)?({p})$", key)), default)
