"""Measured numbers on disk, one JSON file a row: what is there is not measured again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orthoft.recipes.whole import write_whole_text


class Cells:
    """Nested numbers in one file, written at once after each change.

    Raises:
        ValueError: the file holds numbers of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.numbers: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        wanted = json.loads(json.dumps(settings))
        if self.numbers.setdefault("settings", wanted) != wanted:
            changed = [key for key in wanted if self.numbers["settings"].get(key) != wanted[key]] or [*wanted]
            raise ValueError(f"{path} was measured with other {', '.join(changed)}: move it away to measure again")

    def get(self, *place: str) -> Any:
        """Return what stands at a place, None if nothing does."""
        found: Any = self.numbers
        for key in place:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def put(self, value: Any, *place: str) -> None:
        """Write a value at a place; the file appears or changes as a whole."""
        inner = self.numbers
        for key in place[:-1]:
            inner = inner.setdefault(key, {})
        inner[place[-1]] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole_text(self.path, json.dumps(self.numbers, indent=1, sort_keys=True) + "\n")
