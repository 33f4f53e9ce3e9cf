"""What a recipe merges: its tasks' experts, and fine-tuned models beside them that it has no rows for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orthoft.merging.files.hub import find_folder
from orthoft.merging.files.tensors import TensorFolder
from orthoft.merging.sources.adapter import open_source
from orthoft.merging.sources.orientation import is_vector
from orthoft.merging.statistics import STATISTICS_OF, metadata_in, statistics_file
from orthoft.recipes.layout import STATISTICS, expert_folder, statistics_of
from orthoft.recipes.schema import Recipe, Source


def sources_of(recipe: Recipe) -> list[tuple[str, str | Path]]:
    """Return name and place of all that a recipe merges, experts first."""
    experts = [(task.name, expert_folder(Path(recipe.output), task.name)) for task in recipe.tasks]
    return [*experts, *((other.called, other.path) for other in others_of(recipe))]


def others_of(recipe: Recipe) -> list[Source]:
    """Return what a recipe merges beside its experts."""
    return [] if recipe.merge is None else recipe.merge.others


def files_of(recipe: Recipe, kind: str | None) -> dict[str, Path]:
    """Return the files of statistics of one kind by source, if all that a recipe merges have one; else none."""
    if kind is None:  # of a method that takes none
        return {}
    files = {task.name: statistics_of(Path(recipe.output, STATISTICS), task.name, kind) for task in recipe.tasks}
    others = others_of(recipe)
    files |= {other.called: statistics_file(other.statistics) for other in others if other.statistics is not None}
    there = all(file.is_file() for file in files.values()) and len(files) == len(recipe.tasks) + len(others)
    return files if there and all(kind_of_numbers(other) == kind for other in others) else {}


def kind_of_numbers(source: Source) -> str | None:
    """Return the kind of a source's statistics, if it has some."""
    return None if source.statistics is None else metadata_in(source.statistics).get("kind")


def marks_of_others(recipe: Recipe) -> dict[str, list[Any]]:
    """Return of each model beside the experts its place, and name, size and time of its files."""
    found: dict[str, list[Any]] = {}
    for other in others_of(recipe):
        folder = find_folder(other.path, "source")
        files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json"))
        found[other.called] = [other.path, *([f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files)]
    return found


def refuse_without_statistics(recipe: Recipe) -> None:
    """Check that the methods that a recipe names have numbers from the data of what is merged beside the experts.

    Raises:
        ValueError: one would merge by the mean, as it does without them.
    """
    if recipe.merge is None:
        return
    for method in recipe.merge.methods:
        kind = STATISTICS_OF.get(method)
        for place, other in enumerate(recipe.merge.others if kind else ()):
            if (has := kind_of_numbers(other)) != kind:
                raise ValueError(f"{method!r} takes {kind} statistics of all it merges, sources[{place}] has {has}")


def ranks_of_others(recipe: Recipe, base: TensorFolder) -> dict[str, dict[str, int | None]]:
    """Return by name the matrices that each model beside the experts changes, and the ranks of its factors there.

    Raises:
        FileNotFoundError: one is not there.
        ValueError: it is corrupt, of another base, or nothing that can be merged.
    """
    found = {}
    for other in others_of(recipe):
        opened = open_source(other.called, find_folder(other.path, "source"), base)
        found[other.called] = {n: rank for n, rank in opened.ranks.items() if not is_vector(n, base.shape(n))}
    return found
