"""The code of a page of documentation, in its order, and how each kind of it runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli_case import outcome

FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file it is the content of (or none), its text, the line it begins at."""

    language: str
    title: str | None
    text: str
    line: int

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block, continued ones in one."""
        return [line for line in self.text.replace("\\\n", "").splitlines() if line.strip()]


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        yield Block(found[1], found[2], found[3], text[: found.start()].count("\n") + 1)


def run_command(command: str) -> None:
    """Run a command of orthoft in this process; it has to end well."""
    assert outcome(*shlex.split(command)[1:]) == 0, command


def run_python(code: str, name: str, namespace: dict[str, Any]) -> None:
    """Run a block of Python."""
    exec(compile(code, name, "exec"), namespace)
