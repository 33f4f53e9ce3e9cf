"""Scores of a run under way, on disk as they come: what breaks off an evaluation does not take them with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orthoft.recipes.whole import write_whole_json


class KeptScores:
    """A file of what was found of a model on a task, by a hash of all that it depends on."""

    def __init__(self, file: Path, shared: Any) -> None:
        """Keep them in a file, which need not exist; ``shared`` is what every score depends on, as JSON has it."""
        self.file, self.shared = file, shared

    def find(self, *marks: str) -> dict[str, Any] | None:
        """Return what was kept under these marks, or None."""
        found: dict[str, Any] | None = self._all().get(self._key(marks))
        return found

    def add(self, told: Mapping[str, Any], *marks: str) -> None:
        """Keep what was found under these marks."""
        write_whole_json(self.file, self._all() | {self._key(marks): dict(told)})

    def forget(self) -> None:
        """Remove them all: an expert changed, or the results have them."""
        self.file.unlink(missing_ok=True)

    def _all(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}
        return found

    def _key(self, marks: tuple[str, ...]) -> str:
        return hashlib.sha256(json.dumps([self.shared, marks], sort_keys=True).encode()).hexdigest()
