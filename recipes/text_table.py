"""Tables: aligned text, which remembers its rows so that a terminal can draw them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

Rows = Sequence[Sequence[str]]


class Table(str):
    """A table as plain text, with the ``rows`` it was made of, names of the columns first.

    ``words`` is the number of columns, from the left, that hold words and not numbers; ``notes`` is text under the
    table, which the plain text holds too.
    """

    rows: Rows
    words: int
    notes: str

    def __new__(cls, text: str, rows: Rows, words: int = 1, notes: str = "") -> Self:
        table = super().__new__(cls, text)
        table.rows, table.words, table.notes = rows, words, notes
        return table


def aligned(rows: Rows) -> Table:
    """Return rows as text: the first column to the left, the others to the right, a rule under the first row."""
    widths = [max(len(cell) for cell in cells) for cells in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return Table("\n".join([lines[0], "-" * len(lines[0]), *lines[1:]]), rows)
