"""Before the work: what only the registries can check, and quiet libraries."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import transformers
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from orthoft.merging import READERS
from orthoft.merging.files.hub import find_folder
from orthoft.merging.wish import Wish, wish_for
from orthoft.recipes.devices import check_device, check_launch, in_parts, set_up, with_deepspeed
from orthoft.recipes.finetune import training_arguments
from orthoft.recipes.load import RecipeError
from orthoft.recipes.models import config_of
from orthoft.recipes.schema import Merge, Recipe
from orthoft.recipes.search_setup import check_search
from orthoft.recipes.sources import others_of, refuse_without_statistics
from orthoft.recipes.task_schema import Task

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
        except (ValueError, TypeError, ImportError, FileNotFoundError) as error:
            mistakes.append(f"{place}: {' '.join(str(error).split())}")

    attempt("device", partial(check_device, recipe.device))
    attempt("accelerate launch", check_launch)
    trainable = not mistakes  # else every task would tell of it
    for i, task in enumerate(recipe.tasks):
        attempt(f"tasks[{i}].{task.given}", partial(_mergeable, recipe, task))
        if trainable and task.expert is None:
            attempt(f"tasks[{i}].training", partial(training_arguments, recipe, task, Path(recipe.output)))
    if trainable and all(task.expert is not None for task in recipe.tasks):
        set_up(recipe.device)
    attempt("train_to_merge.penalty", partial(_penalised, recipe))
    for i, other in enumerate(others_of(recipe)):
        attempt(f"merge.sources[{i}]", partial(find_folder, other.path, "source"))
    if (wanted := recipe.merge) is not None:
        attempt("merge", lambda: wished(wanted, len(recipe.tasks)))
        attempt("merge", partial(refuse_without_statistics, recipe))
        if (search := wanted.search) is not None:
            attempt("merge.search", partial(check_search, search))
    if mistakes:
        raise RecipeError("\n".join(mistakes))


def wished(merge: Merge, tasks: int) -> Wish:
    """Return what a recipe's merge asks for, checked."""
    return wish_for(tasks + len(merge.sources), weights=merge.all_weights(tasks), **merge.words())


def _mergeable(recipe: Recipe, task: Task) -> None:
    config = config_of(task)
    if recipe.merge is not None and config.peft_type not in READERS:
        name = getattr(config.peft_type, "value", config.peft_type) if task.expert else task.trained.type
        raise ValueError(f"type {name!r} cannot be merged, only {', '.join(READERS)} can")


def _penalised(recipe: Recipe) -> None:
    if recipe.train_to_merge is None or recipe.train_to_merge.penalty is None:
        return
    trained = [task.training for task in recipe.tasks if task.expert is None]
    if in_parts() or with_deepspeed() or any(words.get(word) for words in trained for word in SHARDING):
        raise ValueError("it needs whole weights and gradients, which FSDP and DeepSpeed do not leave: launch with DDP")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' hints and bars, for the block only: what matters is said by the pipeline.

    The Hub's bars stay: a download of a model is long work.
    """
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    downloads = not are_progress_bars_disabled()
    log.disable_progress_bar()  # and the Hub's
    if downloads:
        enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(peft|transformers|torch|accelerate|datasets)\b")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
        if not downloads:
            disable_progress_bars()
