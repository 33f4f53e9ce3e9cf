"""Task data: rows from files or from `datasets`, in three splits."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orthoft.recipes.task_schema import Data, Split

Row = dict[str, Any]
TEXT = "utf-8-sig"  # UTF-8 with the mark in front that Excel writes, or without
SPLITS: tuple[Split, ...] = ("train", "tuning", "test")


def read_file(path: Path) -> list[Row]:
    """Return the rows of a JSONL, CSV or Parquet file.

    Raises:
        ValueError: another kind of file, or a line that is no JSON object.
    """
    kind = path.suffix.lower()
    if kind in (".jsonl", ".json"):
        with path.open(encoding=TEXT) as lines:
            return [_json_row(line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    if kind == ".csv":
        with path.open(encoding=TEXT, newline="") as lines:
            return list(csv.DictReader(lines))
    if kind == ".parquet":
        return named(_datasets().Dataset.from_parquet(str(path)))
    raise ValueError(f"{path}: expected a file named .jsonl, .csv or .parquet")


def _json_row(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object with a field per column, got {type(row).__name__}")
    return row


def _datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError("a dataset by name, or a Parquet file, needs `pip install orthoft[recipes]`") from None
    return datasets


def named(table: Any) -> list[Row]:
    """Return the rows of a `datasets` table with the names of classes for their numbers, and None for -1, no class."""
    inner = {column: getattr(feature, "feature", feature) for column, feature in table.features.items()}
    names = {column: feature.names for column, feature in inner.items() if hasattr(feature, "names")}

    def word(value: Any, of: Sequence[str]) -> Any:
        if isinstance(value, list):
            return [word(each, of) for each in value]
        return None if value is None or value < 0 else of[value]

    rows: list[Row] = table.to_list()
    return [row | {column: word(row[column], of) for column, of in names.items()} for row in rows]


def read_splits(data: Data, seed: int) -> dict[Split, list[Row]]:
    """Return the rows of each split, shuffled by ``seed`` and cut to the limits.

    Without a tuning split, a tenth of the train rows is set aside for it; the test rows are never touched.
    """
    names: dict[Split, str | None] = {"train": data.train, "tuning": data.tuning, "test": data.test}
    rows: dict[Split, list[Row]] = {}
    for split, name in names.items():
        if name is None:
            continue
        if data.dataset is None:
            rows[split] = read_file(Path(name))
        else:
            rows[split] = named(_datasets().load_dataset(data.dataset, data.subset, split=name))
        if not rows[split]:
            raise ValueError(f"{name}: no rows")
        random.Random(seed).shuffle(rows[split])
    if "tuning" not in rows:
        held = max(1, len(rows["train"]) // 10)
        rows["tuning"], rows["train"] = rows["train"][:held], rows["train"][held:]
    return {split: rows[split][: data.limit.get(split)] for split in SPLITS}


def require(rows: Sequence[Row], columns: Sequence[str], where: str) -> None:
    """Raise a ValueError unless every row has every column."""
    for row in rows:
        for name in columns:
            if row.get(name) is None:
                raise ValueError(f"{where}: a row has no {name!r}, its columns are {', '.join(map(str, row))}")
