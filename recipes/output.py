"""The output folder of a recipe: locked, opened once all is checked, given back as it was if nothing comes of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from orthoft.hub_place import hub_place
from orthoft.merging.resume.lock import locked
from orthoft.merging.resume.partial import partial_of
from orthoft.merging.statistics import KINDS
from orthoft.recipes.layout import (
    ALL,
    EXPERTS,
    FINISHED,
    HEADS,
    MADE_OF_EXPERTS,
    RECIPE,
    RESULTS,
    STATISTICS,
    expert_folder,
    head_file,
    statistics_of,
    trainer_folder,
)
from orthoft.recipes.schema import Again, Recipe
from orthoft.recipes.whole import write_whole_text

OF_TASKS = (EXPERTS, HEADS, STATISTICS)  # folders with something of each task
LOCK = ".lock"
BEFORE = ".before"  # what a run replaces, until it has succeeded
TRAINS = ("base", "dtype", "quantization", "seed", "tasks", "train_to_merge")  # words that experts depend on
Say = Callable[[str], None]


@contextmanager
def tasks_locked(out: Path, tasks: Sequence[str]) -> Iterator[None]:
    """Hold the locks of tasks of an output: processes that train others of its tasks do not disturb each other.

    Raises:
        FileExistsError: another process works on one of them.
    """
    with ExitStack() as locks:
        place = out.resolve()  # "." has no name
        inside = place.is_dir() and not os.access(place.parent, os.W_OK)  # as where a volume is mounted
        for name in dict.fromkeys(tasks):
            file = place / f".{name}{LOCK}" if inside else place.with_name(f".{place.name}.{name}{LOCK}")
            locks.enter_context(locked(expert_folder(out, name), file))
        yield


@contextmanager
def output_opened(
    recipe: Recipe, out: Path, again: Again, tasks: Sequence[str] | None, say: Say, outdated: Sequence[str] = ()
) -> Iterator[None]:
    """Lock the output folder and write the recipe into it; an unfinished run of the same training is taken up again.

    ``again`` says what becomes of another run, or a finished one. Overwriting replaces what a run writes, and nothing
    else: of a choice of tasks, their experts alone. Keeping the experts replaces what was made of them, as both do, and
    the ``outdated`` ones, which train again.
    What is replaced waits in ``.before`` until the block has succeeded, and is put back if it fails with nothing made.

    Raises:
        FileExistsError: there is something else, a finished run, or one that trains otherwise; or another process
            writes it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tasks_locked(out, [task.name for task in recipe.tasks] if tasks is None else tasks):
        _refuse(recipe, out, again)
        out.mkdir(parents=True, exist_ok=True)
        _remove_dead(out)
        replaced = [] if again == "no" else _replaced(out, again, tasks)
        old = [path for name in outdated for path in _of_expert(out, name)]
        waiting = _set_aside(out, [*replaced, *(path for path in old if path.exists())])
        known = _made(out)
        try:
            write_whole_text(out / RECIPE, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
            yield
        except BaseException:
            if _made(out) <= known:
                _give_back(out, waiting)
            elif waiting:
                say(f"what this run was to replace waits in {out / BEFORE} until a run succeeds")
            raise
        for path in (*waiting, *_replaced(out, "overwrite", tasks)):
            if tasks is None or path.parent != out or path in waiting:  # a run of other tasks may want the others back
                _remove(out / BEFORE / path.relative_to(out))
        _tidy(out)


def _remove_dead(out: Path) -> None:
    """Remove locks that processes left when they were killed, with what was half written under them."""
    for left in (*out.glob(f".*{LOCK}"), *(out / STATISTICS).glob(f".*{LOCK}")):
        with suppress(FileExistsError), locked(left, left):
            partial = partial_of(left.with_name(left.name.removeprefix(".").removesuffix(LOCK)))
            if partial.is_file():
                partial.unlink()


def refuse_own_inputs(recipe: Recipe, base: Path, out: Path) -> None:
    """Check that a run does not write what it reads.

    Raises:
        ValueError: it would.
    """
    general = recipe.train_to_merge.general if recipe.train_to_merge else None
    data = [(f"data of {t.name}", file) for t in recipe.tasks for file in (t.data.train, t.data.tuning, t.data.test)]
    written = [(out / name).resolve() for name in ALL]
    given = [(f"expert of {t.name}", t.expert) for t in recipe.tasks]
    found = recipe.merge.others if recipe.merge else ()
    others = [(f"merge.sources, {one.called}", path) for one in found for path in (one.path, one.statistics)]
    places = [("base", recipe.base), *given, *((f"merge.sources, {one.called}", one.path) for one in found)]
    for what, place in places:
        if hub_place(place or Path()) is not None and out.resolve().is_relative_to(Path(str(place)).resolve()):
            raise ValueError(f"{what}: {place} on the Hub would be taken for the folder {out}: choose another output")
    for what, path in [("base", base), ("train_to_merge.general", general), *data, *given, *others]:
        if path is not None and any(Path(path).resolve().is_relative_to(place) for place in written):
            raise ValueError(f"{what}: {path} is among what this run writes to {out}: choose another output")


def _refuse(recipe: Recipe, out: Path, again: Again) -> None:
    known = (out / RECIPE).is_file() or (out / BEFORE).is_dir()
    if out.exists() and not (out.is_dir() and (known or all(_begun(path) for path in out.iterdir()))):
        raise FileExistsError(f"{out} exists and is not a run of a recipe: choose another output")
    if again != "no":
        return
    if (out / RESULTS).is_file():
        raise FileExistsError(
            f"{out} holds a finished run: `orthoft run` with --keep-experts merges anew, --overwrite trains again; "
            "or choose another output"
        )
    if (out / RECIPE).is_file():
        before = yaml.safe_load((out / RECIPE).read_text(encoding="utf-8"))  # as it was written
        words = recipe.model_dump(mode="json")
        if any(_given(before.get(key)) != _given(words[key]) for key in TRAINS):
            raise FileExistsError(
                f"{out} holds a run of another recipe: --keep-experts trains only what changed, --overwrite starts "
                "again; or choose another output"
            )


def _begun(path: Path) -> bool:
    """Return whether a path in an output is of a run that had not even written its recipe when it was killed."""
    return path.suffix == LOCK or path == partial_of(path.with_name(RECIPE))


def _given(words: Any) -> Any:
    """Return words of a recipe without those that are not given, which an older version may not know."""
    if isinstance(words, dict):
        return {key: _given(one) for key, one in words.items() if one is not None}
    return [_given(one) for one in words] if isinstance(words, list) else words


def _replaced(out: Path, again: Again, tasks: Sequence[str] | None) -> list[Path]:
    """Return what a run replaces."""
    if again == "overwrite" and tasks is None:
        return [out / name for name in ALL]
    of_tasks = chain.from_iterable(_of_expert(out, name) for name in tasks or ()) if again == "overwrite" else ()
    return [*(out / name for name in (RECIPE, *MADE_OF_EXPERTS)), *of_tasks]


def _of_expert(out: Path, name: str) -> Iterator[Path]:
    """Yield all that there is of an expert: its checkpoints, its statistics and its head, too."""
    folder = expert_folder(out, name)
    head = head_file(folder)
    yield from (folder, trainer_folder(folder), head, head.with_suffix(".json"))
    yield from (statistics_of(out / STATISTICS, name, kind) for kind in KINDS)


def _set_aside(out: Path, paths: Iterable[Path]) -> list[Path]:
    """Move what is replaced, and return of what something waits; what waits of an earlier run stays."""
    waiting = []
    for path in paths:
        place = out / BEFORE / path.relative_to(out)
        if path.parent == out and path.name in OF_TASKS and place.is_dir():  # something of some tasks waits
            inner = [*place.iterdir(), *(path.iterdir() if path.is_dir() else ())]
            waiting += _set_aside(out, dict.fromkeys(path / one.name for one in inner))
            _remove(path)
            continue
        if place.exists():
            _remove(path)
        elif path.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
        else:
            continue
        waiting.append(path)
    return waiting


def _give_back(out: Path, waiting: Sequence[Path]) -> None:
    for path in waiting:
        if (place := out / BEFORE / path.relative_to(out)).exists():
            _remove(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            place.rename(path)
    _tidy(out)


def _tidy(out: Path) -> None:
    """Remove the place of what waits if nothing does."""
    if not any(path.is_file() for path in (out / BEFORE).rglob("*")):
        shutil.rmtree(out / BEFORE, ignore_errors=True)


def _made(out: Path) -> set[tuple[Path, int]]:
    """Return what a next run could go on from, with times: experts, checkpoints, what was made of experts."""
    experts = out / EXPERTS
    found = (*experts.glob(f"*/{FINISHED}"), *experts.glob(".*.trainer/checkpoint-*"))
    return {
        (path, path.stat().st_mtime_ns) for path in (*found, *(out / name for name in MADE_OF_EXPERTS)) if path.exists()
    }


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
