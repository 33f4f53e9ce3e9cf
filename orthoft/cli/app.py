"""The command line's frame: the program itself, options of all commands, exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Orthogonal fine-tuning of Hugging Face models, and merging of what was trained.",
)
INTERRUPTED = 130
BAD_INPUT = (ValueError, TypeError, KeyError, FileNotFoundError, FileExistsError)
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="PLACE=VALUE", help="Override, e.g. tasks.0.training.max_steps=5.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start again where the output folder holds a run.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.")]


def show_version(wanted: bool) -> None:
    if wanted:
        from orthoft import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    context.find_root().obj = debug


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0; 2 for bad input, 1 for a failure, 130 for Ctrl-C, with one line an error."""
    # Two OpenMP threads that spin on a busy machine are slower than one; read when torch is imported, so set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="orthoft", standalone_mode=False) or 0
        if code == INTERRUPTED:  # typer turns Ctrl-C into a silent exit
            raise KeyboardInterrupt
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort):
        _fail(INTERRUPTED, "interrupted")
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        if (usage := getattr(error, "format_message", None)) is not None:
            place = getattr(getattr(error, "ctx", None), "command_path", "orthoft")
            _fail(2, f"{usage().rstrip('.')} (see {place} --help)")
        if isinstance(error, BAD_INPUT):
            _fail(2, str(error.args[0] if isinstance(error, KeyError) and error.args else error))
        _fail(1, f"{type(error).__name__}: {' '.join(str(error).split())}")


def _fail(code: int, message: str) -> None:
    for line in message.splitlines() or ["unknown"]:
        typer.echo(f"error: {line}", err=True)
    sys.exit(code)
