"""The recipes that ship, and what an editor or a person needs to write another: checks and a JSON Schema."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

from orthoft.errors import unknown
from orthoft.recipes.load import load, overridden, read_yaml
from orthoft.recipes.merge_job import MergeJob, load_job
from orthoft.recipes.schema import Recipe
from orthoft.recipes.strict import keys_of
from orthoft.recipes.task_schema import SFT_WORDS, Task, TaskBase, training_model

Kind = Literal["recipe", "merge"]
KINDS: dict[Kind, type[Recipe] | type[MergeJob]] = {"recipe": Recipe, "merge": MergeJob}
TASKS: tuple[type[TaskBase], ...] = get_args(Task)


def shipped() -> dict[str, str]:
    """Return the recipes, and configs for `accelerate launch`, that ship, by name: what the first line of each says."""
    said = {name: file.read_text(encoding="utf-8").partition("\n")[0] for name, file in _files().items()}
    return {name: line.removeprefix("#").strip() for name, line in said.items()}


def copy(name: str, to: str | Path | None = None) -> Path:
    """Copy what ships to a file, or into a folder, and return the file; here under its own name unless given.

    Raises:
        ValueError: there is no recipe of this name.
        FileExistsError: the file exists.
        FileNotFoundError: the folder of the file does not, or ``to`` ends as a folder does and is none.
    """
    files, name = _files(), name.removesuffix(".yaml")
    if name not in files:
        raise unknown("recipe", name, files)
    out = Path("." if to is None else to).expanduser()
    if out.is_dir() or _ends_as_a_folder(to):
        out /= f"{name}.yaml"
    _write(out, files[name].read_text(encoding="utf-8"))
    return out


def validate(config: str | Path, overrides: Sequence[str] = ()) -> Kind:
    """Check the YAML file of a recipe or of a merge, told apart by its keys, and return which it is.

    A recipe's words, its files, and, as `orthoft.recipes.run` does on this machine, its device, adapters, training
    arguments and merge are checked, or the words of a merge. No model is opened, and no row of data read.

    Raises:
        FileNotFoundError: the file, or one that it names, is not there.
        ValueError: anything else, with one line per mistake.
    """
    raw = read_yaml(Path(config).expanduser())
    for override in overrides:
        raw = overridden(raw, override)
    kind = kind_of(raw)
    if kind == "recipe":
        _check(load(raw))
    else:
        job = load_job(raw)
        _wish(len(job.sources), **job.words())
    return kind


def kind_of(raw: Mapping[str, Any]) -> Kind:
    """Return what a mapping is meant to be: a merge where it has more keys that only a merge has."""
    of_recipe, of_merge = ({*keys_of(model)} for model in KINDS.values())
    return "merge" if len(raw.keys() & of_merge - of_recipe) > len(raw.keys() & of_recipe - of_merge) else "recipe"


def json_schema(kind: Kind = "recipe") -> dict[str, Any]:
    """Return the JSON Schema of the YAML file of a recipe or a merge, for editors.

    Of a task it only asks for its name, as ``defaults`` may hold all else. It knows TRL's words in ``training``, and
    what they may be where TRL is installed.
    """
    schema: dict[str, Any] = KINDS[kind].model_json_schema()
    if kind == "recipe":
        training = training_model().model_json_schema()
        of_trl = _training_of_trl()
        definitions = schema["$defs"] | training.pop("$defs", {}) | of_trl.pop("$defs", {})
        names = [task.__name__ for task in TASKS]
        of_data = [definitions[name]["properties"]["data"]["$ref"].rpartition("/")[2] for name in names]
        for name in {*names, *of_data, "Adapter"}:
            definitions[name].pop("required", None)
        for name in names:
            words = definitions[name]["properties"]
            words["training"] = {"$ref": f"#/$defs/{'SFTConfig' if 'trainer' in words else 'TrainingArguments'}"}
        task = {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in names]}
        schema["$defs"] = definitions | {"TrainingArguments": training, "SFTConfig": of_trl}
        schema["properties"]["tasks"] |= {"items": {**task, "required": ["name"]}}
        schema["properties"]["defaults"] = {
            "anyOf": [*task["anyOf"], {"type": "null"}],
            "description": "Laid under every task, key by key.",
        }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _training_of_trl() -> dict[str, Any]:
    if find_spec("trl") is not None:
        return training_model("trl").model_json_schema() | {"title": "SFTConfig"}
    plain = training_model().model_json_schema()
    return plain | {"title": "SFTConfig", "properties": plain["properties"] | {word: {} for word in SFT_WORDS}}


def write_schema(text: str, out: str | Path, overwrite: bool = False) -> None:
    """Write a schema to a file, which may exist only if it is to be overwritten."""
    if _ends_as_a_folder(out):
        raise IsADirectoryError(f"{out} is the name of a folder: a schema is a file, say which in it")
    if overwrite:
        Path(out).unlink(missing_ok=True)
    _write(Path(out), text)


def _check(recipe: Recipe) -> None:
    from orthoft.recipes.prepare import check, quiet  # torch comes in here, after the words are known to be sound

    with quiet():
        check(recipe)


def _wish(tasks: int, **words: Any) -> None:
    from orthoft.merging.wish import wish_for  # torch comes in here, too

    try:
        wish_for(tasks, **words)
    except (ValueError, TypeError) as error:
        raise ValueError(f"merge: {error}") from None


def _files() -> dict[str, Traversable]:
    root = resources.files("orthoft.recipes")
    found = [sorted(root.joinpath(name).iterdir(), key=lambda file: file.name) for name in ("configs", "accelerate")]
    return {file.name.removesuffix(".yaml"): file for file in chain.from_iterable(found)}


def _ends_as_a_folder(name: str | Path | None) -> bool:
    """Say whether a name ends with a separator, which a Path forgets."""
    return isinstance(name, str) and not os.path.basename(name)


def _write(out: Path, text: str) -> None:
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no folder {out.parent.absolute()} to write {out.name} to")
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise FileExistsError(f"file exists: {out}: choose another name, or remove it") from None
