"""What a search of merges may try: methods, their spaces, and ranges of their parameters by name and type."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from orthoft.merging import METHODS, SPACES
from orthoft.merging.methods import Method, get_method
from orthoft.merging.parameters import Parameters
from orthoft.merging.spaces import get_space
from orthoft.merging.statistics import STATISTICS_OF

if TYPE_CHECKING:
    from optuna.trial import Trial


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, evenly or evenly in their logarithm."""

    low: float
    high: float
    log: bool = False


SCALE = Range(0.1, 4.0, log=True)  # lambda: the mean of four tasks becomes their sum
WEIGHT = Range(0.5, 2.0, log=True)  # of a task, before all are brought to a mean of 1
RANGES = {  # by "method.parameter" or by the parameter's name alone
    "alpha": Range(0.0, 1.0),
    "clip": Range(0.001, 0.1, log=True),
    "common_fraction": Range(0.1, 1.0),
    "della.density": Range(0.2, 0.8),
    "density": Range(0.02, 1.0),
    "drop": Range(0.0, 0.95),
    "epsilon": Range(0.01, 0.19),
    "gamma": Range(0.001, 0.1, log=True),
    "rank_fraction": Range(0.01, 0.5, log=True),
    "residual_scale": Range(0.0, 1.5),
    "scaling": Range(0.02, 1.0, log=True),
}
# Left at their defaults: how long to iterate, where on an arc (the tasks' weights say that), forms and bases that hold
# only in the full space or are the same merge.
FIXED = ("basis", "max_iter", "on", "range", "steps", "t", "tol")
SPREAD = 4.0  # a number without a range is tried from a quarter to four times its default


@dataclass(frozen=True)
class Candidate:
    """A method and the spaces it is tried in."""

    method: Method
    spaces: tuple[str, ...]


def candidates(
    methods: Sequence[str] | None,
    spaces: Sequence[str] | None,
    default_spaces: Sequence[str],
    works: Callable[[str, str], None],
    statistics: Container[str] = (),
) -> tuple[list[Candidate], list[str]]:
    """Return what is tried, and a line for each method that is left out.

    Args:
        methods, spaces: only these, or all that do.
        default_spaces: tried without ``spaces``. A method that commutes is the same in all isometric ones: of these
            "auto" stands for all.
        works: raises the ValueError or TypeError of a method in a space.
        statistics: the kinds that there are of every task.

    Raises:
        ValueError: an unknown name, or a method that was asked for and cannot be tried.
    """
    for name in spaces or ():
        get_space(name)
    found, notes = [], list[str]()
    for method in [get_method(name) for name in methods] if methods else METHODS.values():
        try:
            check_statistics(method, statistics)
            found.append(Candidate(method, _spaces_of(method, spaces, default_spaces, works)))
        except (ValueError, TypeError) as error:
            if methods:
                raise ValueError(f"{method.name} cannot be tried here: {error}") from None
            notes.append(f"{method.name} is left out: {error}")
    if not found:
        raise ValueError(f"no method can be tried in {', '.join(spaces or default_spaces)}: {notes[0]}")
    return found, notes


def check_statistics(method: Method, known: Container[str]) -> None:
    """Check that there is what a method takes of every task's data.

    Raises:
        ValueError: there is not.
    """
    kind = STATISTICS_OF.get(method.name)
    if method.needs("statistics") and (kind is None or kind not in known):
        how = f"{kind} statistics of each task: `orthoft statistics --kind {kind}` measures them"
        raise ValueError(f"it needs {how if kind else 'statistics of a kind that is not known'}")


def _spaces_of(
    method: Method, spaces: Sequence[str] | None, default_spaces: Sequence[str], works: Callable[[str, str], None]
) -> tuple[str, ...]:
    params = method.bind({})
    if not spaces:
        if method.commutes(params):
            default_spaces = ["auto", *(name for name in default_spaces if not SPACES[name].isometric)]
        default_spaces = ["full"] if method.entries(params) else default_spaces
    possible, refused = [], list[ValueError | TypeError]()
    for name in spaces or default_spaces:
        try:
            works(method.name, name)
            possible.append(name)
        except (ValueError, TypeError) as error:
            refused.append(error)
    if not possible:
        raise refused[0]
    return tuple(possible)


def suggest(trial: Trial, candidates: Sequence[Candidate], tasks: Sequence[str], equal_weights: bool) -> dict[str, Any]:
    """Return the words of one merge, as the ``merge`` section of a recipe has them.

    Weights are drawn task by task and brought to a mean of 1: how far the merge goes is what the scale says.
    """
    by_name = {candidate.method.name: candidate for candidate in candidates}
    chosen = by_name[trial.suggest_categorical("method", list(by_name))]
    name = chosen.method.name
    space = trial.suggest_categorical(f"{name}.space", chosen.spaces)
    words: dict[str, Any] = {"method": name, "space": space}
    words["scale"] = trial.suggest_float(f"{name}.scale", SCALE.low, SCALE.high, log=SCALE.log)
    if not equal_weights and len(tasks) > 1:
        drawn = [trial.suggest_float(f"weight.{task}", WEIGHT.low, WEIGHT.high, log=WEIGHT.log) for task in tasks]
        words["weights"] = [weight * len(drawn) / sum(drawn) for weight in drawn]
    params = drawn_params(trial, name, chosen.method.parameters)
    if space in SPACES:
        params |= drawn_params(trial, f"{name}.{space}", SPACES[space].parameters)
    return {**words, "params": params}


def start(candidate: Candidate, tasks: Sequence[str]) -> dict[str, Any]:
    """Return the parameters of a trial with a method's defaults, scale 1 and equal weights."""
    name, space = candidate.method.name, candidate.spaces[0]
    own = {f"{name}.{key}": value for key, value in candidate.method.parameters.defaults.items()}
    more = SPACES[space].parameters.defaults if space in SPACES else {}
    of_space = {f"{name}.{space}.{key}": value for key, value in more.items()}
    return {"method": name, f"{name}.space": space, f"{name}.scale": 1.0, **own, **of_space} | {
        f"weight.{task}": 1.0 for task in tasks
    }


def drawn_params(trial: Trial, prefix: str, parameters: Parameters) -> dict[str, Any]:
    """Return a value for each parameter that has choices or a range; the others keep their defaults."""
    drawn = {}
    for name, kind in parameters.types.items():
        possible = choices(prefix, name, kind, parameters.defaults[name])
        if isinstance(possible, Range):
            drawn[name] = trial.suggest_float(f"{prefix}.{name}", possible.low, possible.high, log=possible.log)
        elif possible:
            drawn[name] = trial.suggest_categorical(f"{prefix}.{name}", possible)
    return drawn


def choices(prefix: str, name: str, kind: Any, default: Any) -> Range | tuple[Any, ...]:
    """Return what a parameter may be: a range of numbers, some words, or nothing if it stays at its default."""
    if name in FIXED:
        return ()
    if kind is bool:
        return (False, True)
    if get_origin(kind) is Literal:
        return get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        parts = [part for part in get_args(kind) if part is not NoneType]
        words = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
        return (None, *words) if words else ()
    if kind is not float:
        return ()
    known = RANGES.get(f"{prefix}.{name}") or RANGES.get(name)
    if known is not None or not isinstance(default, int | float) or default <= 0:
        return known or ()
    return Range(default / SPREAD, min(default * SPREAD, 1.0) if default <= 1 else default * SPREAD, log=True)


def tidy(words: Mapping[str, Any], digits: int = 4) -> dict[str, Any]:
    """Return the words with numbers that people can read: what is tried is what is written, digit by digit."""
    return {key: _rounded(value, digits) for key, value in words.items() if value != {}}


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one, digits) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one, digits) for one in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
