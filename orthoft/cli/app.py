"""The command line's frame: the program itself, options that several commands have, exit codes."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from orthoft.cli.commands import AsJson, Commands, Debug, Quiet, Threads
from orthoft.cli.output import Output

app = Commands(pretty_exceptions_enable=False)
INTERRUPTED = 130
TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")  # imported, they tell of kernels that they do without
BAD_INPUT = (
    *(ValueError, TypeError, KeyError),
    *(FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError),
)
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="PLACE=VALUE", help="Override, e.g. tasks.0.training.max_steps=5.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start again where the output folder holds a run.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; what there is unless given (--set device=...).")
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16 of the base; its own unless given (--set dtype=...).")
]


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
    quiet: Quiet = False,
    as_json: AsJson = False,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Orthogonal fine-tuning of Hugging Face models, and merging of what was trained.

    Exit codes: 0 done, 1 a failure while working, 2 bad input, 130 interrupted. An error is one line a mistake.

    Example: orthoft recipes cp minilm mine.yaml

    Example: orthoft run mine.yaml --device cpu --threads 2

    Example: orthoft merge --help
    """
    context.find_root().obj = Output(quiet, as_json, threads)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0; 2 for bad input, 1 for a failure, 130 for Ctrl-C, with one line an error."""
    # Two OpenMP threads that spin on a busy machine are slower than one; read when torch is imported, so set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a text that a model wrote must not end a run in ASCII
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    for name in () if "--debug" in arguments else TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
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
            words = usage().removesuffix(".").replace("Value error, ", "")
            _fail(2, f"{words} (see {place} --help)")
        if isinstance(error, BAD_INPUT):
            _fail(2, told(error))
        _fail(1, f"{type(error).__name__}: {' '.join(told(error).split())}")


def told(error: Exception) -> str:
    """Return what an error says, without what Python adds to it."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


def _fail(code: int, message: str) -> None:
    for line in message.splitlines() or ["unknown"]:
        typer.echo(f"error: {line}", err=True)
    sys.exit(code)
