"""Strict models: nothing is converted, and a mistake is told in our words."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from orthoft.errors import unknown

S = TypeVar("S", bound="Strict")


class Strict(BaseModel):
    """A model that converts nothing and refuses unknown keys, naming the nearest known one."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="wrap")
    @classmethod
    def _name_unknown_keys(cls: type[S], value: Any, check: Callable[[Any], S]) -> S:
        try:
            return check(value)
        except ValidationError as error:
            raise ValidationError.from_exception_data(
                cls.__name__, [_renamed(e, cls) for e in error.errors()]
            ) from None


def _renamed(error: Any, model: type[BaseModel]) -> InitErrorDetails:
    """Return a line error in our words: an unknown key of ``model`` names the nearest, a wrong type what came."""
    kind, message, loc = error["type"], error["msg"], error["loc"]
    if kind == "extra_forbidden" and len(loc) == 1:
        kind, message = "unknown_key", f"unknown key, {_nearest(loc[0], model)}"
    elif kind == "union_tag_invalid":
        tags = re.findall("'([^']*)'", error["ctx"]["expected_tags"])
        kind, message = (
            "unknown_kind",
            str(unknown(error["ctx"]["discriminator"].strip("'"), error["ctx"]["tag"], tags)),
        )
    elif kind == "union_tag_not_found":
        kind, message = "missing", f"{error['ctx']['discriminator']} is missing"
    elif kind == "missing":
        message = "missing"
    elif message.startswith("Input should be "):
        message = f"expected {message.removeprefix('Input should be ')}, got {shown(error['input'])}"
    return InitErrorDetails(type=PydanticCustomError(kind, message), loc=loc, input=error["input"])


def shown(value: object) -> str:
    """Return a value as Python writes it, in 60 characters at most; no more is looked at of what is long or deep."""
    short = reprlib.Repr()
    short.maxlevel, short.maxdict, short.maxlist, short.maxtuple = 3, 12, 12, 12
    short.maxstring, short.maxlong, short.maxother = 200, 200, 200
    try:
        told = short.repr(value)
    except ValueError:  # a whole number of thousands of digits
        told = f"a very long {type(value).__name__}"
    return told if len(told) <= 60 else f"{told[:57]}..."


def keys_of(model: type[BaseModel]) -> list[str]:
    """Return the keys of a model as they are written in YAML."""
    return [field.alias or name for name, field in model.model_fields.items()]


def _nearest(key: object, model: type[BaseModel]) -> str:
    known = keys_of(model)
    if near := difflib.get_close_matches(str(key), known, n=1, cutoff=0.5):
        return f"did you mean {near[0]!r}?"
    return (
        f"known are {', '.join(known)}" if len(known) <= 20 else f"it is none of the {len(known)} of {model.__name__}"
    )


def expanded(path: str) -> str:
    """Return ``path`` with ``~`` and ``$VAR`` replaced.

    Raises:
        ValueError: a variable is not set.
    """
    path = os.path.expandvars(os.path.expanduser(path))
    if unset := re.search(r"\$(\w+|\{\w+\})", path):
        raise ValueError(f"the environment variable {unset[0]} is not set")
    return path


PathText = Annotated[str, AfterValidator(expanded)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
