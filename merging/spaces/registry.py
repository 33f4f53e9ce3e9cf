"""What a space is, and where spaces are found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from orthoft.delta import Delta
from orthoft.errors import unknown
from orthoft.merging.parameters import Parameters

Decode = Callable[[Tensor], Delta]
Encode = Callable[..., tuple[Tensor, Decode]]


@dataclass(frozen=True)
class Space:
    """``encode(deltas, base, weights, *, params) -> x (T, p, q), decode``: coordinates, and the way back.

    ``base`` is the weight (m, n) or None where nobody gave it; ``weights`` (T,) are those of the tasks, which the space
    does not apply: the method does. Keyword-only parameters of the encoder are the configuration of the space.

    Args:
        needs_factors: every delta has to have factors.
        keeps_factors: if all deltas have factors, the result has, of at most the sum of their ranks.
        isometric: Frobenius norms and inner products of the coordinates are those of the deltas.
        commuting: parameters that hold, unless the user gives them, for methods that commute: these see no difference.
    """

    name: str
    encode: Encode
    parameters: Parameters
    needs_factors: bool
    keeps_factors: bool
    isometric: bool
    commuting: Mapping[str, Any]


SPACES: dict[str, Space] = {}


def space(
    name: str,
    *,
    needs_factors: bool = False,
    keeps_factors: bool = False,
    isometric: bool = True,
    commuting: Mapping[str, Any] | None = None,
) -> Callable[[Encode], Encode]:
    """Register an encoder as the space of this name; see `Space`."""

    def register(encode: Encode) -> Encode:
        parameters = Parameters(f"space {name!r}", encode)
        SPACES[name] = Space(name, encode, parameters, needs_factors, keeps_factors, isometric, commuting or {})
        return encode

    return register


def get_space(name: str) -> Space | None:
    """Return a space by name, None for "auto", or raise a ValueError that lists them and names the nearest."""
    if name == "auto":
        return None
    if name not in SPACES:
        raise unknown("space", name, ["auto", *SPACES])
    return SPACES[name]


def choose_space(name: str, method: str, *, commutes: bool, entries: bool, factored: bool) -> Space:
    """Return the space of this name; "auto" is ``core`` where that provably makes no difference, else ``full``.

    Args:
        method: its name, for the messages.
        commutes: the method commutes with orthogonal changes of basis on both sides.
        entries: the method is about the entries of the weight itself.
        factored: all deltas have factors.

    Raises:
        ValueError: the name is unknown, the method does not work there, or the space needs factors that a delta does
            not have.
    """
    found = get_space(name)
    if found is None:
        return SPACES["core" if commutes and factored and not entries else "full"]
    if entries and name != "full":
        raise ValueError(
            f"method {method!r} needs the entries of the weights themselves here: take space 'full' or 'auto', "
            f"got {name!r}"
        )
    if found.needs_factors and not factored:
        raise ValueError(
            f"space {name!r} needs low-rank factors, which not all sources have here: take 'full' or 'auto'"
        )
    return found
