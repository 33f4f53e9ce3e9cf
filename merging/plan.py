"""What a merge will do, decided and checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthoft.merging.hub import find_folder
from orthoft.merging.methods import Method, get_method
from orthoft.merging.source import Source, open_source
from orthoft.merging.spaces import Space, choose_space
from orthoft.merging.tensors import TensorFolder, matrix_shape

PathLike = str | Path
Sources = Sequence[PathLike | tuple[str, PathLike]]


@dataclass(frozen=True)
class WeightPlan:
    """Where one weight of the base will be merged: the sources that change it, the space, the rank of the result."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    space: Space
    rank: int | None  # None if the result will be dense


@dataclass(frozen=True)
class MergePlan:
    """All that is decided beforehand: what is read, how and where each weight is merged."""

    base: TensorFolder
    sources: tuple[Source, ...]
    method: Method
    params: Mapping[str, Any]
    weights: Tensor
    seed: int
    merged: Mapping[str, WeightPlan]
    notes: tuple[str, ...]


def plan(
    base: PathLike,
    sources: Sources,
    *,
    method: str,
    space: str = "auto",
    weights: Sequence[float] | None = None,
    seed: int = 0,
    **params: Any,
) -> MergePlan:
    """Return what `orthoft.merging.merge` will do with the same arguments, from the headers of the files alone.

    A chosen space holds for the weights of which a source has factors; those that all sources hold densely (biases,
    say) merge in the full space, which ``notes`` tell.

    Raises:
        FileNotFoundError: a folder or an adapter's file is missing.
        ValueError, TypeError: an unknown name, a wrong value, a corrupt file, an adapter of another base.
    """
    chosen = get_method(method)
    bound, named = chosen.bind(params), _named(sources)
    numbers = task_weights(weights, len(named))
    choose_space(space, chosen.commutes, factored=True)  # an unknown name is told before any file is opened
    tensors = TensorFolder(find_folder(base, "base"))
    opened = tuple(open_source(name, find_folder(path, f"source {name!r}"), tensors) for name, path in named)
    merged: dict[str, WeightPlan] = {}
    for name in tensors:
        touching = [source for source in opened if name in source.ranks]
        if touching:
            merged[name] = _plan_weight(name, tensors.shape(name), touching, space, chosen)
    if space != "auto" and all(item.space.name != space for item in merged.values()):
        choose_space(space, chosen.commutes, factored=False)
    return MergePlan(tensors, opened, chosen, bound, numbers, seed, merged, tuple(_notes(tensors, opened, merged)))


def task_weights(weights: Sequence[float] | None, tasks: int) -> Tensor:
    """Return the tasks' weights as float64 (T,), ones by default; a ValueError if they do not fit."""
    if weights is None:
        return torch.ones(tasks, dtype=torch.float64)
    numbers = torch.tensor([float(weight) for weight in weights], dtype=torch.float64)
    if len(numbers) != tasks:
        raise ValueError(f"{len(numbers)} weights were given for {tasks} sources: give one each")
    if not torch.isfinite(numbers).all():
        raise ValueError(f"weights must be finite numbers, got {list(weights)}")
    return numbers


def _named(sources: Sources) -> list[tuple[str, PathLike]]:
    if isinstance(sources, str | Path) or not sources:
        raise ValueError(
            f"sources is a sequence of at least one folder, Hub id or (name, folder) pair, got {sources!r}"
        )
    named: list[tuple[str, PathLike]] = []
    for source in sources:
        name, path = source if isinstance(source, tuple) else (Path(source).name, source)
        taken = sum(1 for other, _ in named if other == name or other.startswith(f"{name}#"))
        named.append((f"{name}#{taken + 1}" if taken else name, path))
    return named


def _plan_weight(name: str, shape: tuple[int, ...], sources: list[Source], space: str, method: Method) -> WeightPlan:
    ranks = [source.ranks[name] for source in sources]
    known = [rank for rank in ranks if rank is not None]
    wanted = space if known else "auto"  # a bias, a norm, a saved head: no source has factors of it, and it is noted
    try:
        where = choose_space(wanted, method.commutes, factored=len(known) == len(ranks))
    except ValueError as error:
        dense = [source.name for source in sources if source.ranks[name] is None]
        raise ValueError(f"weight {name!r}: {error} (dense here: {', '.join(dense)})") from error
    rank = min(*matrix_shape(shape), sum(known)) if where.needs_factors else None
    return WeightPlan(name, shape, tuple(source.name for source in sources), where, rank)


def _notes(base: TensorFolder, sources: Sequence[Source], merged: Mapping[str, WeightPlan]) -> list[str]:
    notes = []
    kinds = dict.fromkeys(source.kind for source in sources)
    if len(kinds) > 1:
        notes.append("sources of different kinds: " + ", ".join(f"{source.name} ({source.kind})" for source in sources))
    spaces = [item.space.name for item in merged.values()]
    if len(set(spaces)) > 1:
        notes.append(", ".join(f"{spaces.count(name)} weights in {name}" for name in dict.fromkeys(spaces)))
    for index, source in enumerate(sources):
        for other in sources[index + 1 :]:
            if not source.ranks.keys() & other.ranks.keys():
                notes.append(
                    f"{source.name} and {other.name} change disjoint sets of weights: each counts as zero there"
                )
    if len(sources) > 1:
        alone = sum(1 for item in merged.values() if len(item.sources) < len(sources))
        notes += [f"{alone} of {len(merged)} weights are not changed by all sources"] if alone else []
    for source in sources:
        lacking = [name for name in base if name not in source.ranks] if source.kind == "checkpoint" else []
        notes += [f"{source.name} lacks {len(lacking)} tensors of the base, e.g. {lacking[0]!r}"] if lacking else []
    return notes
