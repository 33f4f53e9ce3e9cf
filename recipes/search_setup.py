"""Before a search of merges: experts, live model, what can be tried, and Optuna's study on disk."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from orthoft.delta import Delta, Rotated, SubspaceRotated, Transposed
from orthoft.merging import SPACES, plan
from orthoft.merging.methods import get_method
from orthoft.merging.spaces import get_space
from orthoft.merging.statistics import KINDS, Statistics
from orthoft.recipes.layout import SEARCH
from orthoft.recipes.live_merge import LiveMerge, held_bytes
from orthoft.recipes.models import load_model
from orthoft.recipes.schema import MergeSearch, Objective, Recipe
from orthoft.recipes.search_report import JOB, PAGE, RESULT
from orthoft.recipes.search_space import Candidate, candidates
from orthoft.recipes.sources import files_of, sources_of

if TYPE_CHECKING:
    from optuna import Study

JOURNAL = "search.journal"
IDENTITY = "identity"  # what Optuna keeps of a search beside its trials
ROTATIONS: list[set[type[Delta]]] = [{Rotated}, {SubspaceRotated}]


@dataclass(frozen=True)
class Aim:
    """What is searched for; a search that was broken off goes on only with the same."""

    methods: list[str] | None
    spaces: list[str] | None
    rows: int | None
    objective: Objective
    pareto: bool
    equal_weights: bool
    seed: int


def check_search(words: MergeSearch) -> None:
    """Check what can be known of a search before there are experts.

    Raises:
        ValueError: Optuna is not installed, or a name is unknown.
    """
    optuna_module()
    for method in words.methods or ():
        get_method(method)
    for space in words.spaces or ():
        get_space(space)


def aim_of(words: MergeSearch, recipe: Recipe) -> Aim:
    """Return what a search of a recipe's experts is for."""
    given = words.model_dump(include={"rows", "objective", "pareto", "equal_weights"})
    seed = recipe.seed if words.seed is None else words.seed
    return Aim(methods=words.methods or None, spaces=words.spaces or None, seed=seed, **given)


def optuna_module() -> Any:
    """Return Optuna, quiet, or say how to install it."""
    try:
        import optuna
    except ModuleNotFoundError:
        raise ValueError("the search needs Optuna: pip install 'orthoft[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def left_out(recipe: Recipe) -> list[str]:
    """Return a line for each word of a recipe by which `orthoft run` scores otherwise than a search."""
    notes = []
    if recipe.quantization is not None:
        notes.append("quantization is left out: base, experts and merges are scored whole, by `orthoft run` quantised")
    if recipe.merge is not None and recipe.merge.refit_heads:
        notes.append("merge.refit_heads is left out: every merge is scored with the experts' heads")
    return notes


def open_live(recipe: Recipe, base: Path, memory: float) -> LiveMerge:
    """Return the live model with the experts' deltas, if they fit.

    Raises:
        ValueError: they take more than ``memory`` GB.
    """
    left = recipe.merge
    patterns: dict[str, Any] = {} if left is None else {"include": left.include, "exclude": left.exclude}
    todo = plan(base, sources_of(recipe), method="mean", space="full", seed=recipe.seed, **patterns)
    if (need := held_bytes(todo) / 1e9) > memory:
        raise ValueError(
            f"weights, deltas and a merge take up to {need:.1f} GB, more than the {memory:g} GB of --memory: "
            "allow more, or leave weights out by merge.exclude"
        )
    model = load_model(recipe.tasks[0].kind, base, recipe.dtype)
    dtype = getattr(torch, recipe.export.dtype) if recipe.export.dtype else None
    files = {kind: found for kind in KINDS if (found := files_of(recipe, kind))}
    numbers = {kind: {task: Statistics(file, todo.base) for task, file in files[kind].items()} for kind in files}
    return LiveMerge(todo, model, dtype, numbers)


def tried_here(live: LiveMerge, aim: Aim) -> tuple[list[Candidate], list[str]]:
    """Return what can be tried; spaces of factors or of rotations where all tasks have them."""
    held = [delta for source in live.held for delta in source.deltas.values() if min(delta.shape) > 1]
    factored = all(delta.rank() is not None for delta in held)
    kinds = {type(delta.inner if isinstance(delta, Transposed) else delta) for delta in held}  # of a Conv1D, too
    names = ["full"] + [name for name, space in SPACES.items() if space.keeps_factors and factored]
    names += [name for name, space in SPACES.items() if not space.isometric and kinds in ROTATIONS]

    def works(method: str, space: str) -> None:
        merged = live.planned({"method": method, "space": space}).merged
        if space != "auto" and all(item.space.name != space for item in merged.values()):
            raise ValueError(f"no weight can be merged in space {space!r}")

    return candidates(aim.methods, aim.spaces, names, works, live.numbers)


def changed(out: Path, identity: Mapping[str, Any]) -> list[str]:
    """Return what differs in the search that a folder holds; nothing if it holds none."""
    if not (out / JOURNAL).is_file():
        return []
    now = json.loads(json.dumps(identity))
    studies = optuna_module().get_all_study_summaries(_storage(out), include_best_trial=False)
    known = [study.user_attrs[IDENTITY] for study in studies if IDENTITY in study.user_attrs]
    return [key for before in known for key in now if before.get(key) != now[key]]


def refuse_another(out: Path, identity: Mapping[str, Any]) -> None:
    """Check that a folder holds no search, or one of the same.

    Raises:
        FileExistsError: it holds one of something else.
    """
    if what := changed(out, identity):
        raise FileExistsError(f"{out} holds a search with other {', '.join(what)}: give --overwrite to start again")


def open_study(out: Path, identity: Mapping[str, Any], values: int, overwrite: bool) -> Study:
    """Return the study in a folder, new or to go on with; one of something else is refused as by `refuse_another`."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (JOURNAL, RESULT, PAGE, JOB) if overwrite else ():
        (out / name).unlink(missing_ok=True)
    _mend(out / JOURNAL)
    study: Study = optuna_module().create_study(
        storage=_storage(out), study_name=SEARCH, directions=["maximize"] * values, load_if_exists=True
    )
    if IDENTITY not in study.user_attrs:
        study.set_user_attr(IDENTITY, dict(identity))
    refuse_another(out, identity)  # that was begun since it was asked first
    return study


class _Locked:
    """The lock of Optuna's journal, which has the output's: that of Optuna outlives who is killed by half a minute."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        return None


def _storage(out: Path) -> Any:
    backend = importlib.import_module("optuna.storages.journal")
    return optuna_module().storages.JournalStorage(backend.JournalFileBackend(str(out / JOURNAL), _Locked()))


def _mend(journal: Path) -> None:
    """Remove a last line that was cut off, as by a full disk: Optuna would write behind it, and read neither again."""
    if journal.is_file() and not (content := journal.read_bytes()).endswith(b"\n"):
        os.truncate(journal, content.rfind(b"\n") + 1)
