"""The script of faults, in short: every fault leaves the same bytes; and a difference is seen where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
FAULTS = [
    *(f"kill -9, {case}" for case in ("checkpoint", "opcm", "lora", "delta")),
    *("source changed midway", "read-only output", "full disk", "limit on file sizes"),
    *("locale tr_TR.UTF-8", "locale C, ASCII", "files of the year 1970", "files of the year 2100"),
]
RUN = "kill -9, run"
COMMANDS = ["merge, overwrite", "convert, overwrite", "run"]
EACH = [f"each change, {name}" for name in COMMANDS]  # drawn from those of each command


@pytest.fixture(scope="module")
def table() -> dict[str, list[str]]:
    """The rows of the script by their faults: rounds, strikes, seconds, what came out."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPTS / "faults.py"), "--rounds", "5", "--runs", "1", "--seed", "1"]
    command += ["--points", "4", "--commands", *COMMANDS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    rows = {line[:32].rstrip(): line[32:].split(maxsplit=3) for line in done.stdout.splitlines()[1:]}
    assert (done.returncode != 0) == any(row[3].startswith("WRONG") for row in rows.values()), done.stderr
    return rows


@pytest.mark.parametrize("fault", [*FAULTS, RUN, *EACH])
def test_a_fault_leaves_the_same_bytes(fault: str, table: dict[str, list[str]]) -> None:
    if table[fault][3].startswith("skipped"):
        pytest.skip(table[fault][3])
    assert table[fault][3] == "same"


def test_the_faults_struck(table: dict[str, list[str]]) -> None:
    assert list(table) == [*FAULTS, RUN, *EACH]
    assert table[RUN][0] == "1"
    assert int(table[RUN][1]) >= 1
    assert all(table[fault][0] == "4" and int(table[fault][1]) >= 2 for fault in EACH)
    assert sum(int(table[fault][0]) for fault in FAULTS[:4]) == 5
    assert sum(int(table[fault][1]) for fault in FAULTS[:4]) >= 1
    for fault in FAULTS[4:]:
        assert table[fault][1] == "1" or table[fault][3].startswith("skipped"), fault


def test_a_difference_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from fault_world import compared, contents

    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text('{"seconds": 1, "peak_bytes": 2, "output": "o", "norm": 3, "merged": []}')
    (out / "model.safetensors").write_bytes(b"abc")
    want = contents(out)
    assert compared(out, want) == []
    (out / "report.json").write_text('{"seconds": 9, "peak_bytes": 9, "output": "p", "norm": 3, "merged": []}')
    assert compared(out, want) == []
    (out / "model.safetensors").write_bytes(b"abd")
    (tmp_path / ".out.lock").write_text("")
    assert compared(out, want) == ["model.safetensors differs", "left behind: .out.lock"]
    assert compared(tmp_path / "nothing", want) == ["there is no nothing"]


def test_a_difference_of_runs_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from fault_runs import differences, found

    def run(place: str, seconds: int, **changes: str) -> dict[str, Any]:
        """What is found of a run in a folder of its own."""
        out = tmp_path / place / "out"
        (out / "experts").mkdir(parents=True)
        told = {"times": {"a": seconds}, "experts": [{"seconds": seconds, "folder": str(out)}]}
        files = {
            "results.json": json.dumps(told),
            "README.md": f"| steps | 6, in {seconds} s |",
            "recipe.yaml": f"output: {out}",
        }
        for name, text in (files | changes).items():
            (out / name).write_text(text)
        return found(out)

    want = run("first", 1)
    assert differences(run("second", 9), want) == []
    other = run("third", 1, **{"README.md": "| steps | 5, in 1 s |", "../.out.lock": "", "experts/b": ""})
    assert differences(other, want) == ["left behind: .out.lock, out/experts/b", "changed: out/README.md"]
    del other["out/experts"]
    assert differences(other, want)[0] == "missing: out/experts"
