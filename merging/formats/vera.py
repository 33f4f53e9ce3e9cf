"""PEFT's VeRA on disk: two random matrices for the whole model, two trained vectors for each module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orthoft.delta import Delta, LowRank
from orthoft.merging.formats.fields import COUNT, FLAG, SEED, needed
from orthoft.merging.formats.registry import Config, Extent, Shapes, Tensors, reader

FIELDS = {"r": needed(COUNT), "projection_prng_key": SEED, "save_projection": FLAG, "fan_in_fan_out": FLAG}
NAMES = frozenset(["vera_lambda_b", "vera_lambda_d"])


def projections(config: Config, sizes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Return ``vera_A`` (r, n) and ``vera_B`` (m, r) as PEFT draws them, m and n the largest of all (outputs, inputs).

    Kaiming-uniform from one generator, ``A`` first: the bound is ``sqrt(6 / fan_in)`` with the columns as fan-in.
    """
    r, key = config["r"], config.get("projection_prng_key")
    if key is None:
        raise ValueError("it was saved without its projections and without a projection_prng_key to draw them again")
    generator = torch.Generator().manual_seed(key)
    shapes = {"vera_A": (r, max(n for _, n in sizes)), "vera_B": (max(m for m, _ in sizes), r)}
    drawn = {}
    for name, shape in shapes.items():
        bound = (6 / shape[1]) ** 0.5
        drawn[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return drawn


def _extent(config: Config, shapes: Shapes) -> Extent:
    (outputs,), (rank,) = shapes["vera_lambda_b"], shapes["vera_lambda_d"]
    return Extent(outputs, None, rank)


@reader(
    "VERA",
    prefix="vera_lambda_",
    weightless=True,
    extent=_extent,
    fields=FIELDS,
    names=NAMES,
    shared={"base_model.vera_A": "vera_A", "base_model.vera_B": "vera_B"},
    restore=projections,
)
def vera(config: Config, module: str, tensors: Tensors, weight: Tensor) -> Delta:
    """``delta = diag(b) B diag(d) A``, ``A`` and ``B`` the first columns and rows of the model's. arXiv 2310.11454."""
    d, b = tensors["vera_lambda_d"], tensors["vera_lambda_b"]
    A, B = tensors["vera_A"], tensors["vera_B"]
    m, n = weight.shape
    if A.ndim != 2 or B.ndim != 2 or len(A) != len(d) or B.shape[1] != len(d) or A.shape[1] < n or len(B) < m:
        raise ValueError(
            f"module {module!r} ({m} outputs, {n} inputs, rank {len(d)}) needs larger projections than "
            f"{tuple(B.shape)} and {tuple(A.shape)}"
        )
    return LowRank(b[:, None] * B[:m], d[:, None] * A[:, :n])
