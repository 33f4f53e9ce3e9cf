"""What a merge will do, decided and checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from orthoft.hub_place import short_name
from orthoft.merging.files.hub import find_folder
from orthoft.merging.files.tensors import TensorFolder, matrix_shape
from orthoft.merging.methods import Finish
from orthoft.merging.sources.adapter import Source, open_source
from orthoft.merging.sources.delta import continued
from orthoft.merging.sources.orientation import Orientation, is_stacked, is_vector
from orthoft.merging.spaces import Space
from orthoft.merging.statistics import STATISTICS_OF, Statistics, statistics_of_tasks
from orthoft.merging.weightwise import Choice
from orthoft.merging.wish import Wish, check_patterns, wish_for

PathLike = str | Path
Sources = Sequence[PathLike | tuple[str, PathLike]]


@dataclass(frozen=True)
class WeightPlan:
    """How one weight of the base will be merged: the sources that change it, the choice, the rank of the result."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    choice: Choice
    rank: int | None  # None if the result will be dense
    inputs_first: bool = False  # stored as (inputs, outputs): merged the other way round

    @property
    def stacked(self) -> bool:
        """Whether it holds several experts, each of which is a matrix of its own."""
        return is_stacked(self.name, self.shape)

    @property
    def vector(self) -> bool:
        """Whether it, or what each expert has of it, is no matrix."""
        return is_vector(self.name, self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of the matrix that it is measured as: (outputs, all else), or all experts one under the other."""
        return (prod(self.shape[:-1]), self.shape[-1]) if self.stacked else matrix_shape(self.shape)

    @property
    def space(self) -> Space:
        """The space it is merged in."""
        return self.choice.space


@dataclass(frozen=True)
class MergePlan:
    """All that is decided beforehand: what is read, how and where each weight is merged."""

    base: TensorFolder
    sources: tuple[Source, ...]
    wish: Wish
    seed: int
    merged: Mapping[str, WeightPlan]
    statistics: Mapping[str, Statistics]
    notes: tuple[str, ...]
    not_carried: Mapping[str, list[str]]  # by source
    earlier_norms: tuple[float, ...]  # of the tasks in a sum that is gone on from

    @property
    def finish(self) -> Finish | None:
        """The scale of the whole model, if the merge has one: method and rescale are the same for all weights."""
        return next((item.choice.finish for item in self.merged.values()), None)

    @property
    def on_experts(self) -> list[str]:
        """The merged tensors of fused experts whose inputs a source rotates."""
        return [name for name in self.merged if any(name in source.on_experts for source in self.sources)]


def plan(
    base: PathLike,
    sources: Sources,
    *,
    statistics: Mapping[str, PathLike] | None = None,
    seed: int = 0,
    **words: Any,
) -> MergePlan:
    """Return what `orthoft.merging.merge` will do with the same arguments.

    Headers of the files alone are read. ``words`` are those of `orthoft.merging.wish.wish_for`. Weights that the space
    cannot encode (biases, say, that all sources hold densely) merge in the full space, which ``notes`` tell.

    Raises:
        FileNotFoundError: a folder or an adapter's file is missing.
        ValueError, TypeError: an unknown name, a wrong value, a corrupt file, an adapter of another base.
    """
    named = named_sources(sources)
    wish = wish_for(len(named), **words)
    tensors = TensorFolder(find_folder(base, "base"))
    opened = tuple(open_source(name, find_folder(path, f"source {name!r}"), tensors) for name, path in named)
    earlier, more = continued(wish.method.name, wish.bound()[0], wish.weights, opened)
    full = [name for name in tensors if prod(tensors.shape(name))]  # an empty tensor has nothing to change
    touched = [name for name in full if any(name in source.ranks for source in opened)]
    check_patterns((*wish.include, *wish.exclude, *wish.overrides), touched)
    flipped = Orientation(tensors).inputs_first
    merged = {name: _plan_weight(name, tensors, opened, wish, flipped) for name in touched if wish.selects(name)}
    if touched and not merged:
        raise ValueError("include and exclude leave no weight to merge")
    _rehearse(merged, bool(earlier))
    if wish.space != "auto" and all(item.space.name != wish.space for item in merged.values()):
        wish.refuse_space()
    numbers = statistics_of_tasks(wish.method.name, statistics or {}, [source.name for source in opened], tensors)
    return MergePlan(
        tensors,
        opened,
        wish,
        seed,
        merged,
        numbers,
        (*tensors.notes, *more, *_notes(opened, merged), *_notes_on_statistics(wish.method.name, numbers, merged)),
        {source.name: source.not_carried + _left_out(source, wish) for source in opened},
        earlier,
    )


def named_sources(sources: Sources) -> list[tuple[str, PathLike]]:
    """Return (name, path) of each source: the name given, or its short name, made unique."""
    if isinstance(sources, str | Path) or not sources:
        raise ValueError(
            f"sources is a sequence of at least one folder, place on the Hub or (name, place) pair, got {sources!r}"
        )
    named: dict[str, PathLike] = {}
    for source in sources:
        name, path = source if isinstance(source, tuple) else (short_name(source), source)
        unique = (name, *(f"{name}#{number}" for number in range(2, len(sources) + 2)))
        named[next(free for free in unique if free not in named)] = path
    return list(named.items())


def _plan_weight(
    name: str, base: TensorFolder, sources: Sequence[Source], wish: Wish, inputs_first: Callable[[str], bool]
) -> WeightPlan:
    shape, stacked = base.shape(name), is_stacked(name, base.shape(name))
    touching = [source for source in sources if name in source.ranks]
    ranks = [None if stacked else source.ranks[name] for source in touching]
    try:
        choice = wish.of(name, [source.name for source in sources]).choice(ranks, is_vector(name, shape))
    except ValueError as error:
        dense = [source.name for source in touching if source.ranks[name] is None]
        these = f" (dense here: {', '.join(dense)})" if dense else ""
        raise ValueError(f"weight {name!r}: {error}{these}") from error
    known = [rank for rank in ranks if rank is not None]
    factored = choice.space.keeps_factors and len(known) == len(ranks)
    rank = min(*matrix_shape(shape), sum(known)) if factored else None
    told = [source.inputs_first[name] for source in touching if name in source.inputs_first]
    flipped = told[0] if told else inputs_first(name)
    return WeightPlan(name, shape, tuple(source.name for source in touching), choice, rank, flipped)


def _rehearse(merged: Mapping[str, WeightPlan], goes_on: bool) -> None:
    """Try the method with the weights and the parameters of each override, before hours are spent on other weights."""
    choices = {(tuple(i.choice.weights.tolist()), repr(i.choice.params)): i for i in merged.values()}
    for item in choices.values():
        first = float(item.choice.weights[0])
        try:
            item.choice.method.rehearse(item.choice.weights, item.choice.params)
            if goes_on and first != 1:
                raise ValueError(f"the result of an OPCM merge goes on with weight 1, got {first}")
        except ValueError as error:
            raise ValueError(f"weight {item.name!r}: {error}") from error


def _left_out(source: Source, wish: Wish) -> list[str]:
    return [f"{name}: left out by a filter" for name in source.ranks if not wish.selects(name)]


def _notes(sources: Sequence[Source], merged: Mapping[str, WeightPlan]) -> list[str]:
    notes = [note for source in sources for note in source.notes]
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
    return notes


def _notes_on_statistics(
    method: str, numbers: Mapping[str, Statistics], merged: Mapping[str, WeightPlan]
) -> Iterator[str]:
    if method not in STATISTICS_OF:
        return
    if not numbers:
        yield f"{method} without statistics is the mean: give the {STATISTICS_OF[method]} statistics of each source"
        return
    lacking = [name for name in merged if any(name not in one.weights for one in numbers.values())]
    if lacking:
        yield f"{len(lacking)} of {len(merged)} weights merge by the mean, without statistics, e.g. {lacking[0]!r}"
    for source, one in numbers.items():
        if one.not_used:
            yield f"{source}: {len(one.not_used)} statistics belong to no weight of the base, e.g. {one.not_used[0]!r}"
