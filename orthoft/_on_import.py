"""Load a module of ours in the moment somebody else's is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def after_import(watched: str, ours: str) -> None:
    """Import ``ours`` as the last step of the first import of ``watched``."""
    sys.meta_path.insert(0, _Watcher(watched, ours))


class _Watcher(MetaPathFinder):
    """Finds ``watched`` as the others would, and appends one import to its execution."""

    def __init__(self, watched: str, ours: str) -> None:
        self.watched, self.ours, self.searching = watched, ours, False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.watched or self.searching:
            return None
        self.searching = True  # the search below comes through here again
        try:
            spec = find_spec(name)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_follow(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            import_module(self.ours)

        spec.loader.exec_module = execute_and_follow  # type: ignore[method-assign]
        return spec
