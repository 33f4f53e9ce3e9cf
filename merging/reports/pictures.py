"""Pictures as inline HTML and SVG: heat maps, bars and curves that need no library, no network and no script."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

Cells = Sequence[Sequence[float | None]]
MOST_ROWS, MOST_COLUMNS = 100, 24  # of a heat map of layers: beyond, neighbours share a row and the rest a column
WORDED = 600  # cells of a heat map that still carry a number
COLOURS = 8  # of curves, see --c0 ... in the style sheet
DECADES = 4  # of a logarithmic axis
NOTHING = "–"  # stands for a number that there is not


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Cells,
    *,
    corner: str = "",
    top: float = 0.0,
    middle: float = 0.0,
) -> str:
    """Return a table whose cells are the stronger in colour the farther their number is from the middle.

    Those below it are orange, those above it blue.

    Args:
        cells: (rows, columns), None where there is nothing to show.
        top: the number of the full colour, or the farthest from the middle if that is more.
        middle: the number without colour.
    """
    values = [value for row in cells for value in row if value is not None]
    reach = max((top - middle, *(abs(value - middle) for value in values))) or 1.0
    worded = len(values) <= WORDED
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in columns)
    form = ("{:.2f}" if reach >= 0.1 else "{:.2g}") if worded else ""
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(_cell(value, middle, reach, form) for value in row)}</tr>'
        for name, row in zip(rows, cells, strict=True)
    )
    return (
        f'<div class="wide"><table class="heat"><thead><tr><th>{escape(corner)}</th>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _cell(value: float | None, middle: float, reach: float, form: str) -> str:
    if value is None:
        return '<td class="none"></td>'
    share = abs(value - middle) / reach
    kinds = [name for name, applies in (("neg", value < middle), ("full", share > 0.6)) if applies]
    of_kind = f' class="{" ".join(kinds)}"' if kinds else ""
    return f'<td{of_kind} style="--v:{share:.2f}">{form.format(value).replace("-0.00", "0.00")}</td>'


@dataclass(frozen=True)
class Bar:
    """A bar from zero to ``value``, its part ``other`` drawn over it, and what is written beside it."""

    label: str
    value: float
    other: float
    text: str


def bars(lines: Iterable[Bar], mark: float = 1.0) -> str:
    """Return horizontal bars on one axis from zero, with a line at ``mark``; negative values are orange."""
    every = list(lines)
    top = max((abs(size) for bar in every for size in (bar.value, bar.other, mark)), default=1.0) or 1.0

    def drawn(kind: str, value: float) -> str:
        return f'<i class="{kind}{" neg" if value < 0 else ""}" style="width:{100 * abs(value) / top:.1f}%"></i>'

    rows = "".join(
        f'<tr><th scope="row">{escape(bar.label)}</th><td class="track">{drawn("bar", bar.value)}'
        f'{drawn("part", bar.other)}<i class="mark" style="left:{100 * mark / top:.1f}%"></i></td>'
        f"<td>{escape(bar.text)}</td></tr>"
        for bar in every
    )
    return f'<table class="bars"><tbody>{rows}</tbody></table>'


def curves(title: str, lines: Mapping[str, Sequence[float]], strong: str | None = None) -> str:
    """Return positive falling sequences over a logarithmic axis of four decades; ``strong`` is drawn thick."""
    width, height, left, below = 300, 170, 40, 22
    top = max((values[0] for values in lines.values() if values and values[0] > 0), default=1.0)
    longest = max((len(values) for values in lines.values()), default=1)
    high = math.ceil(math.log10(top))

    def place(index: int, value: float) -> str:
        down = min(1.0, (high - math.log10(value)) / DECADES)
        return f"{left + index * (width - left - 6) / max(1, longest - 1):.1f},{6 + down * (height - below - 6):.1f}"

    drawn = []
    for index, (name, values) in enumerate(lines.items()):
        points = " ".join(place(i, value) for i, value in enumerate(values) if value > 0)
        kind = "strong" if name == strong else f"c{index % COLOURS}"
        drawn.append(f'<polyline class="{kind}" points="{points}"><title>{escape(name)}</title></polyline>')
    ticks = "".join(
        f'<line class="grid" x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{left - 4}" y="{y + 4:.1f}" text-anchor="end">{10 ** (high - step):.2g}</text>'
        for step in range(DECADES + 1)
        for y in [6 + step * (height - below - 6) / DECADES]
    )
    foot = height - 6
    axis = f'<text x="{left}" y="{foot}">1</text><text x="{width}" y="{foot}" text-anchor="end">{longest}</text>'
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {width + 6} {height}" role="img" '
        f'aria-label="{escape(title)}">{ticks}{axis}{"".join(drawn)}</svg></figure>'
    )


def legend(names: Sequence[str], strong: str | None = None) -> str:
    """Return the colours of `curves`."""
    kinds = [(f"c{i % COLOURS}", name) for i, name in enumerate(names)] + ([("strong", strong)] if strong else [])
    return (
        '<p class="legend">' + "".join(f'<span class="{kind}">{escape(name)}</span>' for kind, name in kinds) + "</p>"
    )


def number(value: float | None) -> str:
    """Return a number in two or three digits, a dash for None."""
    if value is None:
        return NOTHING
    return f"{value:.2f}".replace("-0.00", "0.00") if 0.01 <= abs(value) < 100 or value == 0 else f"{value:.2g}"


@dataclass(frozen=True)
class Grid:
    """The weights of a model as layers (rows) and modules (columns)."""

    rows: list[str]
    columns: list[str]
    place: dict[str, tuple[int, int]]  # by weight

    def cells(self, values: Mapping[str, float | None]) -> list[list[float | None]]:
        """Return the means of the weights' values by cell."""
        found: dict[tuple[int, int], list[float]] = {}
        for name, value in values.items():
            if value is not None:
                found.setdefault(self.place[name], []).append(value)
        means = {place: sum(each) / len(each) for place, each in found.items()}
        return [[means.get((i, j)) for j in range(len(self.columns))] for i in range(len(self.rows))]


def grid(names: Sequence[str]) -> Grid:
    """Return where each weight stands: its layer is its name up to the first number, its module what follows."""
    split = {name: _layer_and_module(name) for name in names}
    layers = list(dict.fromkeys(layer for layer, _ in split.values()))
    modules = list(dict.fromkeys(module for _, module in split.values()))
    together = -(-len(layers) // MOST_ROWS)
    groups = [layers[i : i + together] for i in range(0, len(layers), together)] if layers else []
    row_of = {layer: i for i, group in enumerate(groups) for layer in group}
    shown = modules if len(modules) <= MOST_COLUMNS else [*modules[: MOST_COLUMNS - 1], "other modules"]
    column_of = {module: min(j, len(shown) - 1) for j, module in enumerate(modules)}
    place = {name: (row_of[layer], column_of[module]) for name, (layer, module) in split.items()}
    rows = [group[0] if len(group) == 1 else f"{group[0]} … {group[-1]}" for group in groups]
    return Grid(rows, shown, place)


def _layer_and_module(name: str) -> tuple[str, str]:
    name = name.removesuffix(".weight")
    found = re.fullmatch(r"(.*?(?:^|\.)\d+)\.(.+)", name)
    if not found:
        return "outside the layers", name
    return found[1], re.sub(r"(?<=\.)\d+(?=\.|$)", "*", found[2])  # experts share a column
