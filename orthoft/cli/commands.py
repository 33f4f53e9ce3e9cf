"""Commands that share options: each may stand before the command's name or after it."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from orthoft.cli.help import Command, Group
from orthoft.cli.output import Output

TRAIN, MERGE, LOOK, START = "Train", "Merge", "Look", "Begin, and find help"  # headings of the list of commands
ALL = "Options of all commands"
KEYWORD = inspect.Parameter.KEYWORD_ONLY
Function = TypeVar("Function", bound=Callable[..., None])

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", rich_help_panel=ALL, help="Only results and errors, no progress.")
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json", rich_help_panel=ALL, help="The result as JSON, alone on standard output; errors stay lines of text."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", min=1, rich_help_panel=ALL, help="Threads that torch works with."),
]
Debug = Annotated[bool, typer.Option("--debug", rich_help_panel=ALL, help="Show the traceback of an error.")]


class Commands(typer.Typer):
    """Commands that take the options of all commands; a parameter of type `Output` is given what they say."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=Group, rich_markup_mode=None, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Function], Function]:
        """Register a command, under the heading ``rich_help_panel``."""
        register = super().command(name, **{"cls": Command, **settings})

        def decorated(function: Function) -> Function:
            register(with_options(function))
            return function

        return decorated


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the options of all commands beside its own."""
    hints = get_type_hints(function, include_extras=True)
    own = [p.replace(annotation=hints[p.name]) for p in inspect.signature(function).parameters.values()]
    outputs = [parameter.name for parameter in own if parameter.annotation is Output]

    @wraps(function)
    def command(
        *, context: typer.Context, quiet: bool, as_json: bool, threads: int | None, debug: bool, **given: Any
    ) -> None:
        out = joined(context.find_root().obj, quiet, as_json, threads)
        if out.threads is not None:
            limit_threads(out.threads)
        with out.streams():
            function(**given, **dict.fromkeys(outputs, out))

    common = {"context": typer.Context, "quiet": Quiet, "as_json": AsJson, "threads": Threads, "debug": Debug}
    defaults = {"context": inspect.Parameter.empty, "threads": None}
    added = [
        inspect.Parameter(name, KEYWORD, default=defaults.get(name, False), annotation=kind)
        for name, kind in common.items()
    ]
    shown = [parameter.replace(kind=KEYWORD) for parameter in own if parameter.name not in outputs]
    command.__signature__ = inspect.Signature([*shown, *added])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*shown, *added]}
    return command


def joined(before: Output, quiet: bool, as_json: bool, threads: int | None) -> Output:
    """Return the options before the command's name together with those after it."""
    return replace(before, quiet=before.quiet or quiet, json=before.json or as_json, threads=threads or before.threads)


def limit_threads(number: int) -> None:
    """Let torch work with this many threads, also if it is imported later: it reads the variables then."""
    os.environ.update(OMP_NUM_THREADS=str(number), MKL_NUM_THREADS=str(number))
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(number)
