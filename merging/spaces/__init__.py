"""Common coordinates for the deltas of one weight: one encoder per file, found by name in `SPACES`."""

from orthoft.merging.spaces import core, full, knots, rotation
from orthoft.merging.spaces.registry import SPACES, Decode, Space, choose_space, get_space, space

__all__ = ["SPACES", "Decode", "Space", "choose_space", "core", "full", "get_space", "knots", "rotation", "space"]
