"""A hook of mkdocs: the page of commands is made from the help that the command line itself prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

PLACE = "<!-- commands -->"
WIDTH = 96


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page with the help of all commands in its place for them, and any other page as it is."""
    return markdown.replace(PLACE, "\n\n".join(sections())) if PLACE in markdown else markdown


def sections() -> Iterator[str]:
    """Yield a section of Markdown for each command, groups before what is in them."""
    from orthoft.cli import app

    program = typer.main.get_command(app)
    yield from _sections(program, typer.Context(program, info_name="orthoft", terminal_width=WIDTH))


def _sections(command: Any, context: Any) -> Iterator[str]:
    yield f"## {context.command_path}\n\n```text\n{command.get_help(context).strip()}\n```"
    for name, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            yield from _sections(inner, type(context)(inner, info_name=name, parent=context, terminal_width=WIDTH))
