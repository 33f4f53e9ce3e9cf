"""The registry of adapter formats on disk: what a reader is, and how one is found.

A reader sees the weight as a matrix (outputs, inputs) in float32, whatever its layout on disk, and returns the delta in
the same orientation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from orthoft.delta import Delta
from orthoft.errors import unknown
from orthoft.merging.files.header import shortened
from orthoft.merging.files.tensors import matrix_shape
from orthoft.merging.formats.fields import LONGEST_NAME, Field, check_fields, expression

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]  # of one module, named by what stands behind the module's name
Shapes = Mapping[str, tuple[int, ...]]
Read = Callable[[Config, str, Tensors, Tensor], Delta]


@dataclass(frozen=True)
class Extent:
    """What an adapter says of its weight before anything is read; None where any number will do."""

    outputs: int | None
    inputs: int | None
    rank: int | None  # of the factors, None if the delta will have none

    def agrees(self, shape: tuple[int, ...]) -> bool:
        """Say whether a matrix (outputs, inputs) has this extent."""
        return self.outputs in (None, shape[0]) and self.inputs in (None, shape[1])

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Say whether a weight of this shape has this extent, stored either way."""
        matrix = matrix_shape(shape)
        return len(shape) >= 2 and (self.agrees(matrix) or self.agrees(matrix[::-1]))


@dataclass(frozen=True)
class Reader:
    """A format: the common beginning of its parameter names, what it says of a weight, its delta, what it
    refuses and what to do then, what is ``unread`` but could be merged by PEFT.

    ``fields`` are what it uses of the configuration, ``names`` the tensors it knows of a module (None if any).
    ``shared`` names tensors of the file that belong to all modules, and ``restore`` makes them if they are not saved,
    from the configuration and the (outputs, inputs) of all adapted weights. ``bias`` is the tensor of a module that
    changes its bias, by the numbers that ``read_bias`` returns of the module's tensors. ``same`` says of the tensors of
    an output head and of an embedding that they are one adapter, of tied weights. ``weightless``: factors, where there
    are some, do not depend on the numbers of the weight.
    """

    peft_type: str
    prefix: str
    read: Read
    extent: Callable[[Config, Shapes], Extent]
    refusals: Callable[[Config], list[str]] = lambda config: []
    advice: Callable[[Config], str] = lambda config: ""
    unread: Callable[[Config], list[str]] = lambda config: []
    fields: Mapping[str, Field] = field(default_factory=dict)
    names: Collection[str] | None = None
    shared: Mapping[str, str] = field(default_factory=dict)  # {name in the file: name among the module's tensors}
    restore: Callable[[Config, Sequence[tuple[int, int]]], dict[str, Tensor]] | None = None
    bias: str | None = None
    read_bias: Callable[[Config, str, Tensors], Tensor] | None = None
    same: Callable[[Tensors, Tensors], bool] | None = None
    weightless: bool = False


READERS: dict[str, Reader] = {}
MERGE_FIRST = "load it in PEFT, merge_and_unload(), save_pretrained(), and merge that checkpoint"
# What PEFT can merge into the weights of a model, and what only adds tokens to its input.
MERGED_BY_PEFT = frozenset(
    [
        *("ADALORA", "C3A", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS"),
        *("RANDLORA", "ROAD", "SHIRA", "UNILORA", "VBLORA", "WAVEFT"),
    ]
)
PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")


def reader(
    peft_type: str, *, prefix: str, extent: Callable[[Config, Shapes], Extent], **rest: Any
) -> Callable[[Read], Read]:
    """Register a function (config, module, its tensors, weight) -> Delta as the `Reader` of a ``peft_type``."""

    def register(read: Read) -> Read:
        READERS[peft_type] = Reader(peft_type, prefix, read, extent, **rest)
        return read

    return register


def get_reader(config: Config) -> Reader:
    """Return the reader of an adapter.

    Raises:
        ValueError: the format is unknown, uses what cannot be merged, or has a field of a wrong type.
    """
    peft_type = config.get("peft_type")
    if isinstance(peft_type, str) and peft_type in MERGED_BY_PEFT:
        raise ValueError(f"its peft_type {peft_type!r} is not read: {MERGE_FIRST}")
    if isinstance(peft_type, str) and peft_type in PROMPTS:
        raise ValueError(f"its peft_type {peft_type!r} is a prompt, which no change of the weights can represent")
    if not isinstance(peft_type, str) or peft_type not in READERS:
        told = peft_type[:60] if isinstance(peft_type, str) else shortened(peft_type)
        raise unknown("peft_type", told, sorted(READERS))
    found = READERS[peft_type]
    if refused := found.refusals(config):
        raise ValueError(
            f"it uses {', '.join(refused)}, which no change of its weights can represent{found.advice(config)}"
        )
    if unread := found.unread(config):
        raise ValueError(f"it uses {', '.join(unread)}, which is not read: {MERGE_FIRST}")
    check_fields(config, found.fields)
    return found


def by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that is the end of the module's name, or is a regular expression for it."""
    if patterns and len(module) > LONGEST_NAME:
        raise ValueError(
            f"{module[:40]}... has {len(module)} characters, too many to look for by patterns: at most {LONGEST_NAME}"
        )
    if patterns and "\n" in module:  # where `.*` stops and is tried again
        raise ValueError(f"{module[:40]!r} has a line break, which the name of a module has not")
    for pattern, value in (patterns or {}).items():
        if expression(pattern).match(module):
            return value
    return default


def block_size(entries: int) -> int:
    """Return the b of a skew b x b matrix with ``b (b - 1) / 2`` entries."""
    return (1 + math.isqrt(1 + 8 * entries)) // 2


def expect_shape(shapes: Shapes, name: str, *sizes: int | None) -> None:
    """Raise a ValueError if there is a tensor of that name without these sizes, None for any."""
    shape = shapes.get(name)
    if shape is not None and (
        len(shape) != len(sizes) or any(size not in (None, own) for size, own in zip(sizes, shape, strict=True))
    ):
        raise ValueError(f"{name} has shape {shape}, not {sizes}")
