"""What a command prints: lines on the way and a result, as the options of all commands ask."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

if TYPE_CHECKING:
    from orthoft.recipes.table import Table


@dataclass
class Output:
    """The options of all commands, and how a command prints: `say` is for what happens, `show` for the result."""

    quiet: bool = False
    json: bool = False
    threads: int | None = None
    stdout: TextIO = field(default_factory=lambda: sys.stdout)

    def say(self, text: str) -> None:
        """Print what happens; beside a result in JSON it goes to standard error."""
        if not self.quiet:
            put(text, sys.stdout)

    def show(self, result: object, text: str, said: bool = False) -> None:
        """Print the result, as JSON or as text; the first of several processes does.

        Args:
            said: the text was printed on the way, so that it is only missing where nothing was said.
        """
        if os.environ.get("RANK", "0") != "0":
            return
        if self.json:
            typer.echo(json.dumps(finite(result), indent=2, default=str), file=self.stdout)
        elif self.quiet or not said:
            put(text, self.stdout)

    def overrides(self, given: Sequence[str] | None, **words: str | None) -> list[str]:
        """Return overrides of a recipe: those of options with a name of their own, and over them those given."""
        named = {**words, "threads": self.threads}
        return [f"{place}={value}" for place, value in named.items() if value is not None] + list(given or ())

    @contextmanager
    def streams(self) -> Iterator[None]:
        """Leave standard output to a result in JSON, and standard error without bars where they are not wanted."""
        with ExitStack() as stack:
            if self.quiet or is_log():
                stack.enter_context(redirect_stderr(NoTerminal(sys.stderr)))
            if self.json:
                stack.enter_context(redirect_stdout(sys.stderr))
            yield


class NoTerminal:
    """A stream that says it is not a terminal: whoever draws progress bars draws none."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def isatty(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def is_log() -> bool:
    """Say whether what is printed will be read as a log, or on a terminal that cannot move back."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false") or os.environ.get("TERM") == "dumb"


def check_file(file: Path) -> None:
    """Make the folder of a file that is written at the end, or raise an OSError: before the work, not after it."""
    from orthoft.merging.files.writer import make_parent

    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder: give the name of a file in it")
    make_parent(file)


def put(text: str, stream: TextIO) -> None:
    """Print text; a table is drawn where there is a terminal that may show more than plain letters."""
    rows = getattr(text, "rows", None)
    if rows is None or not stream.isatty() or is_log() or os.environ.get("NO_COLOR"):
        typer.echo(text, file=stream)
    else:
        draw(text, stream)  # type: ignore[arg-type]


def draw(table: Table, stream: TextIO) -> None:
    """Draw a table on a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    header, *rows = table.rows
    for i, name in enumerate(header):
        drawn.add_column(Text(name), justify="left" if i < table.words else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*map(Text, row))
    console = Console(file=stream, highlight=False)
    console.print(drawn)
    if table.notes:
        console.print(Text(table.notes))


def finite(value: Any) -> Any:
    """Return plain values with null for NaN and infinite numbers, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
