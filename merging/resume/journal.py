"""What a merge has finished, on disk: a killed one goes on from there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orthoft.merging.files.safetensors_file import content_hash
from orthoft.merging.reports.diagnostics import WeightDiagnostics
from orthoft.merging.reports.report import WeightReport


@dataclass(frozen=True)
class Record:
    """A finished file: the key of all that its bytes depend on, their hash, and the reports of its weights."""

    key: str
    file: str  # relative to the folder of the output
    digest: str
    merged: list[WeightReport]


class Journal:
    """The finished files of one output, a line of JSON each; every process writes its own ``<rank>.jsonl``.

    A line that was cut off says nothing, and neither does one whose file has other bytes by now.
    """

    def __init__(self, root: Path, folder: Path, rank: int) -> None:
        self._root, self._own = root, folder / f"{rank}.jsonl"
        self._records: dict[str, Record] = {}
        for file in sorted(folder.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                if (record := _record(line)) is not None:
                    self._records[record.key] = record

    def find(self, key: str) -> Record | None:
        """Return the record of a key if its file is as it was when it was finished."""
        record = self._records.get(key)
        if record is None or not (file := self._root / record.file).is_file():
            return None
        return record if content_hash(file) == record.digest else None

    def files(self) -> list[str]:
        """Return the files that were finished, whether or not they still are as they were."""
        return [record.file for record in self._records.values()]

    def add(self, record: Record) -> None:
        """Write down that a file is finished."""
        self._records[record.key] = record
        with self._own.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(asdict(record)) + "\n")  # a line of its own, also behind one that was cut off


def reports_of(lines: Sequence[dict[str, Any]]) -> list[WeightReport]:
    """Return reports of weights that JSON made plain."""
    reports = []
    for line in lines:
        told = line["diagnostics"]
        diagnostics = None if told is None else WeightDiagnostics.from_dict(told)
        reports.append(WeightReport(**{**line, "shape": tuple(line["shape"]), "diagnostics": diagnostics}))
    return reports


def _record(line: str) -> Record | None:
    try:
        told = json.loads(line)
        return Record(told["key"], told["file"], told["digest"], reports_of(told["merged"]))
    except (ValueError, KeyError, TypeError):
        return None
