"""Before the work: what only the registries can check, the output folder, and quiet libraries."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import transformers
import yaml

from orthoft.merging import READERS
from orthoft.merging.wish import Wish, wish_for
from orthoft.recipes.devices import check_device, check_launch, in_parts, with_deepspeed
from orthoft.recipes.expert import STATISTICS, forget, head_file
from orthoft.recipes.finetune import training_arguments
from orthoft.recipes.kept_scores import SCORES
from orthoft.recipes.load import RecipeError
from orthoft.recipes.models import adapter_config
from orthoft.recipes.schema import Again, Merge, Recipe

RESULTS, RECIPE = "results.json", "recipe.yaml"
MADE_OF_EXPERTS = ("merged", "merged-lora", RESULTS)
OURS = ("experts", "heads", "subspaces", "search", STATISTICS, SCORES, *MADE_OF_EXPERTS, RECIPE)

SHARDING = ("fsdp", "deepspeed")  # words of training


def check(recipe: Recipe) -> None:
    """Check adapters, training arguments and the merge against the libraries that define them.

    Raises:
        RecipeError: one line per mistake.
    """
    mistakes: list[str] = []

    def attempt(place: str, check: Callable[[], object]) -> None:
        try:
            check()
        except (ValueError, TypeError, ImportError) as error:
            mistakes.append(f"{place}: {' '.join(str(error).split())}")

    attempt("device", partial(check_device, recipe.device))
    attempt("accelerate launch", check_launch)
    trainable = not mistakes  # else every task would tell of it
    for i, task in enumerate(recipe.tasks):
        attempt(f"tasks[{i}].adapter", partial(_mergeable, recipe, task.adapter, task.kind))
        if trainable:
            attempt(f"tasks[{i}].training", partial(training_arguments, recipe, task, Path(recipe.output)))
    attempt("train_to_merge.penalty", partial(_penalised, recipe))
    if (wanted := recipe.merge) is not None:
        attempt("merge", lambda: wished(wanted, len(recipe.tasks)))
    if mistakes:
        raise RecipeError("\n".join(mistakes))


def wished(merge: Merge, tasks: int) -> Wish:
    """Return what a recipe's merge asks for, checked."""
    return wish_for(tasks, weights=merge.task_weights(tasks), **merge.words())


def _mergeable(recipe: Recipe, adapter: Any, kind: str) -> None:
    config = adapter_config(adapter, kind)
    if recipe.merge is not None and config.peft_type not in READERS:
        raise ValueError(f"type {adapter.type!r} cannot be merged, only {', '.join(READERS)} can")


def _penalised(recipe: Recipe) -> None:
    if recipe.train_to_merge is None or recipe.train_to_merge.penalty is None:
        return
    if in_parts() or with_deepspeed() or any(task.training.get(word) for task in recipe.tasks for word in SHARDING):
        raise ValueError("it needs whole weights and gradients, which FSDP and DeepSpeed do not leave: launch with DDP")


def open_output(recipe: Recipe, out: Path, again: Again, tasks: Sequence[str] | None = None) -> None:
    """Make the output folder and write the recipe into it; an unfinished run of the same training is taken up again.

    ``again`` says what becomes of another run, or a finished one. Overwriting removes what a run writes, and nothing
    else: of a choice of tasks, their experts alone. Keeping the experts removes what was made of them, as both do.

    Raises:
        FileExistsError: there is something else, or a finished run, or one that trains otherwise.
    """
    words = recipe.model_dump(mode="json")
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / RECIPE).is_file())):
        raise FileExistsError(f"{out} exists and is not a run of a recipe: choose another output")
    if again != "no":
        for name in OURS if again == "overwrite" and tasks is None else MADE_OF_EXPERTS:
            _remove(out / name)
        for name in tasks or () if again == "overwrite" else ():
            _remove_expert(out / "experts" / name)
    elif (out / RESULTS).is_file():
        raise FileExistsError(
            f"{out} holds a finished run: `orthoft run` with --keep-experts merges anew, --overwrite trains again; "
            "or choose another output"
        )
    elif (out / RECIPE).is_file():
        before = yaml.safe_load((out / RECIPE).read_text(encoding="utf-8"))
        if any(
            before.get(key) != words[key]
            for key in ("base", "dtype", "quantization", "seed", "tasks", "train_to_merge")
        ):
            raise FileExistsError(
                f"{out} holds a run of another recipe: --keep-experts trains only what changed, --overwrite starts "
                "again; or choose another output"
            )
    out.mkdir(parents=True, exist_ok=True)
    (out / RECIPE).write_text(yaml.safe_dump(words, sort_keys=False), encoding="utf-8")


def _remove_expert(folder: Path) -> None:
    """Remove all that there is of an expert: its checkpoints, its statistics and its head, too."""
    forget(folder)
    head = head_file(folder)
    for path in (folder, folder.with_name(f".{folder.name}.trainer"), head, head.with_suffix(".json")):
        _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' hints and bars, for the block only: what matters is said by the pipeline."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(peft|transformers|torch|accelerate|datasets)\b")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
