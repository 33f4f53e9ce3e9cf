"""From a YAML file to a `Recipe`, or to one line per mistake, each with its place in the file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from orthoft.hub_place import hub_place
from orthoft.recipes.schema import Recipe
from orthoft.recipes.strict import shown

Place = tuple[str | int, ...]
MANY = 100_000  # values that a YAML text may have by aliases
_DID_YOU_MEAN = re.compile(r"unknown key, did you mean '(.*)'")


class RecipeError(ValueError):
    """What is wrong with a recipe, one line per mistake."""


class _Loader(yaml.SafeLoader):
    """YAML in which ``2e-3`` is a number, and a mistake is a key given twice or aliases that stand for too much."""

    def get_single_node(self) -> yaml.Node | None:
        root: yaml.Node | None = super().get_single_node()
        if root is not None:
            sizes: dict[int, int] = {}
            if _spelt_out(root, sizes) > max(MANY, 10 * len(sizes)):
                problem = f"with its aliases spelt out it has more than {MANY:,} values"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=root.start_mark)
        return root

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = f"a key is a word, not a {'list' if isinstance(key, yaml.SequenceNode) else 'mapping'}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _spelt_out(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return how many values a node stands for if each alias in it is replaced by what it names.

    ``sizes`` holds those of nodes that are known, by identity, and 0 for those that are being counted.
    """
    known = sizes.get(id(node))
    if known == 0:
        raise yaml.MarkedYAMLError(problem="an anchor stands within itself", problem_mark=node.start_mark)
    if known is not None:
        return known
    sizes[id(node)] = 0
    inner = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
    more = 0 if isinstance(node, yaml.ScalarNode) else sum(_spelt_out(each, sizes) for each in inner)
    sizes[id(node)] = 1 + more
    return 1 + more


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("+-0123456789")
)


def load(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Return the checked recipe of a YAML file or a mapping, after overrides as ``tasks.0.training.max_steps=5``.

    Raises:
        FileNotFoundError: the recipe, its base folder or a data file is not there; it says where it looked.
        RecipeError: anything else; one line per mistake.
    """
    raw = dict(recipe) if isinstance(recipe, Mapping) else read_yaml(Path(recipe).expanduser())
    for override in overrides:
        raw = overridden(raw, override)
    try:
        checked = Recipe.model_validate(with_defaults(raw))
    except ValidationError as error:
        raise RecipeError("\n".join(error_lines(error, raw))) from None
    if absent := missing_files(checked):
        raise FileNotFoundError("\n".join(absent))
    return checked


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, which is read as UTF-8."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path.absolute()}")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise RecipeError(f"{path}{place}: {error.problem}") from None
    except RecursionError:
        raise RecipeError(f"{path}: not a YAML text (its lists and mappings are nested too deeply)") from None
    except (yaml.YAMLError, ValueError) as error:  # of a day such as 2026-02-30, too
        raise RecipeError(f"{path}: not a YAML text ({' '.join(str(error).split())})") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: expected a mapping of keys, got {type(raw).__name__}")
    return raw


def overridden(raw: Any, override: str) -> dict[str, Any]:
    """Return a copy of ``raw`` with one dotted place set to a value, which is read as YAML.

    Raises:
        RecipeError: the override is not ``place=value``, or its place leads through something that has no keys.
    """
    place, equals, text = override.partition("=")
    if not equals or not all(parts := place.split(".")):
        raise RecipeError(f"--set takes place=value as in tasks.0.training.max_steps=5, got {override!r}")
    result: dict[str, Any] = _placed(raw, parts, value_of(text), override)
    return result


def value_of(text: str) -> Any:
    """Return the value a piece of YAML stands for: ``3``, ``2e-3``, ``true``, ``[a, b]``, ``text``."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ValueError(f"{text!r} is not a YAML value") from None


def _placed(node: Any, parts: list[str], value: Any, override: str) -> Any:
    if not parts:
        return value
    key, rest = parts[0], parts[1:]
    if isinstance(node, list):
        if not key.isdecimal() or int(key) >= len(node):
            raise RecipeError(f"--set {override}: {key!r} is not one of 0 to {len(node) - 1}")
        return [_placed(item, rest, value, override) if i == int(key) else item for i, item in enumerate(node)]
    if node is None or isinstance(node, dict):
        return {**(node or {}), key: _placed((node or {}).get(key), rest, value, override)}
    raise RecipeError(f"--set {override}: there is {shown(node)} where {key!r} should be a key")


def with_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe with ``defaults`` under every task, key by key, and no longer beside them."""
    defaults, tasks = raw.get("defaults"), raw.get("tasks")
    rest = {key: value for key, value in raw.items() if key != "defaults"}
    if defaults is None or not isinstance(tasks, list):
        return rest
    if not isinstance(defaults, dict):
        raise RecipeError(f"defaults: expected a mapping, got {shown(defaults)}")
    return rest | {"tasks": [_over(defaults, task) for task in tasks]}


def _over(below: Any, above: Any) -> Any:
    """Return ``above`` laid over ``below``: mappings key by key, anything else as a whole."""
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: _over(below.get(key), value) for key, value in above.items()}
    return above


def error_lines(error: ValidationError, raw: Any) -> list[str]:
    """Return one line per place; the branches of a union that failed there share it."""
    found: dict[Place, list[str]] = {}
    for e in error.errors():
        place = _place(e["loc"], raw, e["type"] in ("missing", "unknown_key"))
        message, messages = e["msg"].removeprefix("Value error, "), found.setdefault(place, [])
        if message not in messages:
            messages.append(message)
    meant = {(*place[:-1], key) for place, (message, *_) in found.items() for key in _DID_YOU_MEAN.findall(message)}
    inner = {place[:n] for place in found for n in range(1, len(place))}
    told = {p: m for p, m in found.items() if not (m == ["missing"] and p in meant) and p not in inner}
    return [
        f"{_written(place)}: {_joined(messages)}" if place else _joined(messages) for place, messages in told.items()
    ]


def _place(loc: Place, raw: Any, names_key: bool) -> Place:
    """Return the place as it stands in the file: without pydantic's names of branches, and in ``defaults`` if there."""
    body, last = (loc[:-1], loc[-1:]) if names_key else (loc, ())
    place, node = _walk(raw, body)
    if place[:1] == ("tasks",) and len(place) > 1 and isinstance(raw.get("defaults"), dict):
        in_defaults, default = _walk(raw["defaults"], body[2:])
        own_lacks = last and not (isinstance(node, dict) and last[0] in node)
        if len(in_defaults) > len(place) - 2 or (own_lacks and isinstance(default, dict) and last[0] in default):
            place = ("defaults", *in_defaults)
    return place + last


def _walk(node: Any, loc: Place) -> tuple[Place, Any]:
    place: Place = ()
    for part in loc:
        inside = isinstance(node, dict) and part in node
        if inside or (isinstance(node, list) and isinstance(part, int) and part < len(node)):
            place, node = (*place, part), node[part]
    return place, node


def _written(place: Place) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")


def _joined(messages: list[str]) -> str:
    """Join ``expected a, got x`` and ``expected b, got x`` into ``expected a or b, got x``."""
    pairs = [re.fullmatch(r"expected (.*), got (.*)", message, re.DOTALL) for message in messages]
    matches = [pair for pair in pairs if pair]
    if len(messages) > 1 and len(matches) == len(messages):
        return f"expected {' or '.join(m[1] for m in matches)}, got {matches[0][2]}"
    return "; ".join(messages)


def missing_files(recipe: Recipe) -> list[str]:
    """Return a line for each folder of a model and every data file that is not there."""
    absent = []
    if _is_path(recipe.base) and not Path(recipe.base).is_dir():
        absent.append(f"base: no such folder: {Path(recipe.base).absolute()}")
    elif Path(recipe.base).is_dir() and not Path(recipe.base, "config.json").is_file():
        absent.append(f"base: no config.json in {Path(recipe.base).absolute()}, so it is no model")
    for i, task in enumerate(recipe.tasks):
        splits = {"train": task.data.train, "tuning": task.data.tuning, "test": task.data.test}
        for split, path in splits.items():
            if task.data.dataset is None and path is not None and not Path(path).is_file():
                absent.append(f"tasks[{i}].data.{split}: no such file: {Path(path).absolute()}")
        if task.expert is not None and _is_path(task.expert) and not Path(task.expert).is_dir():
            absent.append(f"tasks[{i}].expert: no such folder: {Path(task.expert).absolute()}")
    for i, one in enumerate(recipe.merge.others if recipe.merge else ()):
        if _is_path(one.path) and not Path(one.path).is_dir():
            absent.append(f"merge.sources[{i}]: no such folder: {Path(one.path).absolute()}")
        if one.statistics is not None and not Path(one.statistics).exists():
            absent.append(f"merge.sources[{i}].statistics: no such file: {Path(one.statistics).absolute()}")
    general = None if recipe.train_to_merge is None else recipe.train_to_merge.general
    if general is not None and not Path(general).is_file():
        absent.append(f"train_to_merge.general: no such file: {Path(general).absolute()}")
    return absent


def _is_path(model: str) -> bool:
    """Say whether a model counts as a folder: it is there, or it is written as no place on the Hub is (``./x``, ``/x``,
    ``~/x``, more than one slash without a state).
    """
    return hub_place(model) is None
