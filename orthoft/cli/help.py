"""Help that teaches: commands grouped by job, options of all commands apart, examples that can be copied."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

TAUGHT = {"Example": "Examples", "In Python": "In Python"}  # paragraphs of a docstring, and their headings


class Command(TyperCommand):
    """A command whose docstring may end with paragraphs ``Example: ...`` and ``In Python: ...``."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        write_text(self, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        write_options(self, ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        write_taught(self, formatter)


class Group(TyperGroup):
    """Commands under the headings that their ``rich_help_panel`` names, with the first sentence of each docstring."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        write_text(self, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        self.format_commands(ctx, formatter)
        write_options(self, ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            panel = getattr(command, "rich_help_panel", None)
            panels.setdefault(panel if isinstance(panel, str) else "Commands", []).append((name, sentence(command)))
        wide = max(len(name) for rows in panels.values() for name, _ in rows)
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl([(name.ljust(wide), says) for name, says in rows])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        write_taught(self, formatter)


def sentence(command: Any) -> str:
    """Return the first sentence of a command's help."""
    return re.split(r"(?<=\.)\s", " ".join((command.help or "").split()))[0]


def paragraphs(command: Any) -> tuple[list[str], dict[str, list[str]]]:
    """Return a command's paragraphs of words, and what it teaches by the word each begins with."""
    words: list[str] = []
    taught: dict[str, list[str]] = {}
    for paragraph in (command.help or "").split("\n\n"):
        text = " ".join(paragraph.split())
        key, colon, rest = text.partition(": ")
        if colon and key in TAUGHT:
            taught.setdefault(key, []).append(rest)
        elif text:
            words.append(text)
    return words, taught


def write_text(command: Any, formatter: Any) -> None:
    for paragraph in paragraphs(command)[0]:
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(paragraph)


def write_taught(command: Any, formatter: Any) -> None:
    """Write examples and the Python call without wrapping them: they are copied."""
    for key, lines in paragraphs(command)[1].items():
        formatter.write(f"\n{TAUGHT[key]}:\n" + "".join(f"  {line}\n" for line in lines))


def write_options(command: Any, ctx: Any, formatter: Any) -> None:
    """Write arguments and options, those under a heading of their own last."""
    for panel, rows in panelled(command.get_params(ctx), ctx).items():
        with formatter.section(panel):
            formatter.write_dl(rows)


def panelled(params: Iterable[Any], ctx: Any) -> Mapping[str, Sequence[tuple[str, str]]]:
    """Return the lines of help of parameters by their heading."""
    found: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for param in params:
        if (row := param.get_help_record(ctx)) is not None:
            panel = "Arguments" if param.param_type_name == "argument" else param.rich_help_panel or "Options"
            found.setdefault(panel, []).append(row)
    return {panel: rows for panel, rows in found.items() if rows}
