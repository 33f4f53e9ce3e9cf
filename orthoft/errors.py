"""Messages for people: what was expected, what came, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NeedsWeights(ValueError):
    """An adapter takes something from a weight that has no values: it is on the meta device."""


def unknown(what: str, name: object, choices: Iterable[str]) -> ValueError:
    """Return the error for a name that is not one of ``choices``: it names the nearest one and lists them all."""
    choices = list(choices)
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f", did you mean {near[0]!r}?" if near else "."
    return ValueError(f"unknown {what} {name!r}{hint} Choose from: {', '.join(choices)}")
