"""What several files of tests share."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kind_cases import Case


def pytest_collection_finish() -> None:
    """Hide all that is imported from the garbage collector: every training collects, and would look through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Bases and data of the cases, made once each."""
    made: dict[str, Path] = {}

    def of(case: Case) -> Path:
        if (name := f"{case.kind}-{case.architecture}") not in made:
            folder = made[name] = tmp_path_factory.mktemp(name)
            (folder / "base").mkdir()
            case.base(folder / "base")
            for which, task in enumerate("ab"):
                case.data(folder / task, which, seed=which)
        return made[name]

    return of
