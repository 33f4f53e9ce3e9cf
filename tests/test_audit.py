"""The audit of pinned packages says how many it looked up, and fails for what is known to be vulnerable."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))


def found(*packages: dict[str, Any]) -> dict[str, Any]:
    return {"dependencies": list(packages), "fixes": []}


GOOD = {"name": "a", "version": "1", "vulns": []}
SKIPPED = {"name": "b", "skip_reason": "not found"}
BAD = {"name": "c", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"]}]}


@pytest.mark.parametrize(
    ("report", "code", "lines"),
    [
        (None, 0, ["not audited: pip-audit is not there, or its service cannot be reached"]),
        (found(GOOD), 0, ["audited 1 of 1 pinned packages"]),
        (found(SKIPPED), 0, ["audited 0 of 1 pinned packages", "not audited, unknown to the service: b"]),
        (found(GOOD, BAD), 1, ["audited 2 of 2 pinned packages", "c 2: PYSEC-1, mended in 2.1"]),
    ],
)
def test_the_verdict_counts_what_was_looked_up(report: dict[str, Any] | None, code: int, lines: list[str]) -> None:
    from audit import verdict

    assert verdict(report) == (code, lines)


def test_what_cannot_ask_reports_nothing(tmp_path: Path) -> None:
    from audit import audit

    assert audit([str(tmp_path / "no-such-program")], tmp_path) is None
    assert audit([sys.executable, "-c", "raise SystemExit(1)"], tmp_path) is None
    report = "import json, sys; json.dump({'dependencies': []}, open(sys.argv[sys.argv.index('--output') + 1], 'w'))"
    assert audit([sys.executable, "-c", report], tmp_path) == {"dependencies": []}
