"""The merge of one weight, in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from orthoft.delta import Delta, Dense, LowRank, of_one_dtype
from orthoft.errors import unknown
from orthoft.linalg import frobenius_norm
from orthoft.merging.methods import Finish, Method
from orthoft.merging.methods.opcm import mean_task_norm
from orthoft.merging.spaces import Space
from orthoft.merging.spectra import isotropised

Rescale = Literal["none", "weight", "model"]
RESCALE = ("none", "weight", "model")
SLICE = 1 << 17  # entries of one task in a slice of rows: small enough that all tasks' slices stay in the caches
Statistics = Sequence[Tensor | None]


@dataclass(frozen=True)
class Post:
    """What happens to a merged delta before it is used, in this order.

    Args:
        isotropise: its singular values, on the numerical range, become their mean; not of vectors.
        rescale: its norm becomes the mean norm of the weighted tasks, over each "weight" or over the whole "model".
        scale: and then it is multiplied by this.
    """

    isotropise: bool = False
    rescale: Rescale = "none"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.rescale not in RESCALE:
            raise unknown("rescale", self.rescale, RESCALE)


@dataclass(frozen=True)
class Choice:
    """How one weight is merged: the method and its parameters, the space and its own, the tasks' weights, the rest."""

    method: Method
    params: Mapping[str, Any]
    space: Space
    space_params: Mapping[str, Any]
    weights: Tensor  # (T,)
    post: Post = field(default_factory=Post)

    @property
    def finish(self) -> Finish | None:
        """The scale of the whole model: the method's own, or that of ``rescale="model"``."""
        return self.method.finish or (mean_task_norm if self.post.rescale == "model" else None)

    @property
    def by_rows(self) -> bool:
        """Whether large weights are merged in slices of rows."""
        return self.space.name == "full" and self.method.rowwise


@dataclass(frozen=True)
class Merged:
    """The merged delta of one weight, its norm, and the norms of the tasks (before their weights)."""

    delta: Delta
    norm: float
    task_norms: list[float]


def merge_weight(
    deltas: Sequence[Delta],
    choice: Choice,
    base: Tensor | None,
    generator: torch.Generator,
    statistics: Statistics | None = None,
    scale: float = 1.0,
) -> Merged:
    """Encode, merge, decode; the result is multiplied by ``scale``. Norms are those of the deltas.

    In coordinates that do not keep lengths, nothing but the scale follows the merge.

    A row-wise method in the full space goes through slices of rows, so that no more than one task at a time is ever
    whole in memory.
    """
    method, space, deltas = choice.method, choice.space, of_one_dtype(deltas)
    if method.coefficients is not None and _stays_factored(deltas, choice):
        return _summed(deltas, method.coefficients(choice.weights), choice, scale)
    given = {"generator": generator, "base": base if space.name == "full" else None, "statistics": statistics}
    extras = {name: extra for name, extra in given.items() if method.needs(name)}
    decode: Callable[[Tensor], Delta] = Dense
    if choice.by_rows:
        merged, norms = _by_rows(deltas, choice, extras)  # (m, n), (T,)
    else:
        x, decode = space.encode(deltas, base, choice.weights, **choice.space_params)  # (T, p, q)
        merged = method.merge(x, choice.weights, **choice.params, **extras)  # (p, q)
        norms = frobenius_norm(x, 1).tolist()
    if space.isometric:
        merged = _finished(merged, norms, choice) * scale
        return Merged(decode(merged), float(frobenius_norm(merged)), norms)
    delta = decode(merged)
    delta = delta if scale == 1.0 else delta.scaled(scale)
    return Merged(delta, float(delta.norm()), [float(task.norm()) for task in deltas])


def weighted_norms(merged: Merged, weights: Tensor) -> list[float]:
    """Return ``|w_t| ||D_t||``."""
    return [abs(w) * norm for w, norm in zip(weights.tolist(), merged.task_norms, strict=True)]


def weight_generator(seed: int, name: str) -> torch.Generator:
    """Return the random generator of one weight, which depends on nothing but the seed and its name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _stays_factored(deltas: Sequence[Delta], choice: Choice) -> bool:
    """Say whether factors side by side are the result of a linear method: no more of them than the weight has rank."""
    ranks = [delta.rank() for delta in deltas]
    total = sum(rank or 0 for rank in ranks)
    factored = choice.space.keeps_factors and None not in ranks and total <= min(deltas[0].shape)
    return factored and not choice.post.isotropise


def _summed(deltas: Sequence[Delta], coefficients: Tensor, choice: Choice, scale: float) -> Merged:
    """Return ``sum_t c_t B_t A_t = [c_1 B_1 ... c_T B_T] [A_1; ...; A_T]``, which needs no common bases.

    Norms come from the inner products ``<B_s A_s, B_t A_t>``, sums over blocks of ``(B^T B) o (A A^T)`` in float64.
    """
    factors = [found for delta in deltas if (found := delta.factors()) is not None]
    sizes = torch.tensor([B.shape[1] for B, _ in factors])
    B, A = torch.cat([B for B, _ in factors], 1), torch.cat([A for _, A in factors])  # (m, R), (R, n)
    products = (B.mT.double() @ B.double()) * (A.double() @ A.mT.double())
    own = torch.arange(len(sizes)).repeat_interleave(sizes)  # (R,), the task of each factor
    blocks = (own == torch.arange(len(sizes))[:, None]).to(products)  # (T, R)
    gram = blocks @ products @ blocks.mT  # (T, T)
    norms: list[float] = gram.diagonal().clamp(min=0).sqrt().tolist()
    c = coefficients.to(gram)
    norm = float((c @ gram @ c).clamp(min=0).sqrt())
    if choice.post.rescale == "weight":
        scale *= mean_task_norm(norm, [abs(w) * n for w, n in zip(choice.weights.tolist(), norms, strict=True)])
    each = (scale * coefficients).repeat_interleave(sizes).to(B)
    return Merged(LowRank(B * each, A), abs(scale) * norm, norms)


def _by_rows(deltas: Sequence[Delta], choice: Choice, extras: Mapping[str, Any]) -> tuple[Tensor, list[float]]:
    """Merge slices of rows by a row-wise method; return the result (m, n) and the tasks' norms (T,)."""
    method, (m, n) = choice.method, deltas[0].shape
    if method.prepare is not None:
        prepared = torch.stack([method.prepare(delta.dense(), **choice.params) for delta in deltas])
        extras = {**extras, "prepared": prepared}
    squares: list[Tensor] = []  # (T,) of each slice, added where they are: a GPU is not waited for
    merged: Tensor | None = None
    rows = max(1, SLICE // n)
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        x = torch.stack([delta.rows(start, stop) for delta in deltas])  # (T, rows, n)
        squares.append(frobenius_norm(x, 1).double() ** 2)
        own = {name: _rows_of(name, extra, start, stop) for name, extra in extras.items()}
        merged = x.new_empty(m, n) if merged is None else merged
        merged[start:stop] = method.merge(x, choice.weights, **choice.params, **own)
    assert merged is not None
    return merged, torch.stack(squares).sum(0).sqrt().tolist()


def _rows_of(name: str, extra: Any, start: int, stop: int) -> Any:
    if name == "base":
        return None if extra is None else extra[start:stop]
    if name == "statistics":
        return None if extra is None else [None if one is None else one[start:stop] for one in extra]
    return extra


def _finished(merged: Tensor, norms: Sequence[float], choice: Choice) -> Tensor:
    post = choice.post
    if post.isotropise and min(merged.shape) > 1:
        merged = isotropised(merged)
    if post.rescale == "weight":
        tasks = [abs(w) * norm for w, norm in zip(choice.weights.tolist(), norms, strict=True)]
        merged = merged * mean_task_norm(float(frobenius_norm(merged)), tasks)
    return merged
