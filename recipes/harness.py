"""Benchmarks of lm-evaluation-harness on a merged export, and the command line that runs the same."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import PartialState

from orthoft.recipes.schema import Harness, Recipe


def run_harness(recipe: Recipe, wanted: Harness, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the harness's ``scores`` of the model in a folder, by task and metric, and its ``command``.

    Where it is not installed, or fails (its tasks load data from a hub), the rest of the recipe's results stand: then
    this is said, and there is an ``error`` in place of scores.
    """
    words = harness_words(recipe, wanted, folder)
    told: dict[str, Any] = {"command": command(words)}
    say(f"lm-evaluation-harness: {told['command']}")
    if find_spec("lm_eval") is None:
        return told | _failed("it is not installed: pip install 'orthoft[harness]'", say)
    try:
        scores = _numbers(_evaluated(words))
    except Exception as error:  # of a library that calls many others: hours of training must not go with it
        return told | _failed(f"{type(error).__name__}: {' '.join(str(error).split())}", say)
    for task, values in scores.items():
        say(f"  {task}: {', '.join(f'{metric} {value:.4g}' for metric, value in values.items())}")
    return told | {"scores": scores}


def harness_words(recipe: Recipe, wanted: Harness, folder: Path) -> dict[str, Any]:
    """Return the options of ``lm_eval`` by their names on its command line."""
    given = wanted.model_dump(exclude_none=True) | {"batch_size": wanted.batch_size or recipe.evaluate.batch_size}
    model_args = {"pretrained": str(folder), "dtype": recipe.dtype or "auto"}
    return {"model": "hf", "model_args": model_args, "device": str(PartialState().device), **given}


def command(words: Mapping[str, Any]) -> str:
    """Return the line that runs the harness with these options."""
    line = ["lm_eval"]
    for name, value in words.items():
        if isinstance(value, dict):
            value = ",".join(f"{key}={one}" for key, one in value.items())
        elif isinstance(value, list):
            value = ",".join(value)
        line += [f"--{name}"] if value is True else [] if value is False else [f"--{name}", str(value)]
    return shlex.join(line)


def _evaluated(words: Mapping[str, Any]) -> Mapping[str, Any]:
    own = {name: value for name, value in words.items() if name != "include_path"}
    if (folder := words.get("include_path")) is not None:
        own["task_manager"] = importlib.import_module("lm_eval.tasks").TaskManager(include_path=folder)
    found: Mapping[str, Any] = importlib.import_module("lm_eval").simple_evaluate(**own, log_samples=False)["results"]
    return found


def _numbers(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return what is a number in the harness's results."""
    return {
        task: {metric: float(value) for metric, value in values.items() if isinstance(value, int | float)}
        for task, values in results.items()
    }


def _failed(why: str, say: Callable[[str], None]) -> dict[str, str]:
    say(f"  not run, {why}")
    return {"error": why}
