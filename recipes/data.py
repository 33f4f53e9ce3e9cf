"""Task data: rows from files or from `datasets`, in three splits."""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from orthoft.hub_place import hub_place
from orthoft.recipes.data_schema import Data, Split

Row = dict[str, Any]
TEXT = "utf-8-sig"  # UTF-8 with the mark in front that Excel writes, or without
SPLITS: tuple[Split, ...] = ("train", "tuning", "test")
LONGEST = 2**31 - 1  # characters in a field of a CSV file: the most that every platform takes
_LIMIT = Lock()  # of the limit on a field, which is one for the whole process
_LONE = re.compile("[\ud800-\udfff]")


def read_file(path: Path) -> list[Row]:
    """Return the rows of a JSONL, CSV or Parquet file.

    Raises:
        ValueError: another kind of file, or one that cannot be read as what its name says; it names file and line.
    """
    kind = path.suffix.lower()
    if kind in (".jsonl", ".json"):
        return _as_text(path, _json_rows)
    if kind == ".csv":
        return _as_text(path, _csv_rows)
    if kind == ".parquet":
        return _parquet_rows(path)
    raise ValueError(f"{path}: expected a file named .jsonl, .csv or .parquet")


def _as_text(path: Path, read: Callable[[Path], list[Row]]) -> list[Row]:
    try:
        return read(path)
    except UnicodeDecodeError:
        raise _not_utf8(path) from None


def _not_utf8(path: Path) -> ValueError:
    """Return the error for a file that is no UTF-8, with the line of the first strange byte."""
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line, byte = len((error.object[: error.start] + b"x").splitlines()), error.object[error.start]
        return ValueError(f"{path}:{line}: not UTF-8 (byte 0x{byte:02x}): save it as a text in UTF-8")
    return ValueError(f"{path}: not UTF-8")


def _json_rows(path: Path) -> list[Row]:
    with path.open(encoding=TEXT) as lines:
        return [_json_row(line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]


def _json_row(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError(f"{place}: its lists and objects are nested too deeply") from None
    except ValueError:
        raise ValueError(f"{place}: a whole number has too many digits") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object with a field per column, got {type(row).__name__}")
    return row


def _csv_rows(path: Path) -> list[Row]:
    with path.open(encoding=TEXT, newline="") as lines, _long_fields():
        rows = csv.DictReader(lines)
        try:
            return list(rows)
        except csv.Error as error:
            raise ValueError(f"{path}:{rows.line_num + 1}: not CSV ({error})") from None


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let fields of CSV be as long as texts are, for the block only."""
    with _LIMIT:
        before = csv.field_size_limit(LONGEST)
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _parquet_rows(path: Path) -> list[Row]:
    datasets = _datasets()
    try:
        return named(datasets.Dataset.from_parquet(str(path)))
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{path}: cannot be read as Parquet ({reason})") from None


def _datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError("a dataset by name, or a Parquet file, needs `pip install orthoft[recipes]`") from None
    return datasets


def _split_of(dataset: str, subset: str | None, split: str) -> Any:
    """Return a split of a dataset by name, in the state that stands behind an @ in it."""
    place = hub_place(dataset)
    if place is not None and place.folder is not None:
        raise ValueError(f"dataset: one folder of it cannot be read, got {dataset!r}")
    name, revision = (dataset, None) if place is None else (place.repository, place.revision)
    return _datasets().load_dataset(name, subset, split=split, revision=revision)


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


def read_splits(data: Data, seed: int, check: Callable[[Row, Split, str], None]) -> dict[Split, list[Row]]:
    """Return the rows of each split, shuffled by ``seed`` and cut to the limits.

    Without a tuning split, a tenth of the train rows is set aside for it; the test rows are never touched.

    Args:
        check: is told each row that is returned, its split and its place: the file, and its number there.

    Raises:
        ValueError: a file cannot be read, or has too few rows.
    """
    names: dict[Split, str | None] = {"train": data.train, "tuning": data.tuning, "test": data.test}
    rows: dict[Split, list[tuple[int, Row]]] = {}
    for split, name in names.items():
        if name is None:
            continue
        found = read_file(Path(name)) if data.dataset is None else named(_split_of(data.dataset, data.subset, name))
        if not found:
            raise ValueError(f"{name}: no rows")
        rows[split] = list(enumerate(found, 1))
        random.Random(seed).shuffle(rows[split])
    if "tuning" not in rows:
        rows["tuning"], rows["train"] = _set_aside(rows["train"], data.train)
    kept = {split: rows[split][: data.limit.get(split)] for split in SPLITS}
    for split in SPLITS:
        for number, row in kept[split]:
            check(row, split, f"{names[split] or data.train}, row {number}")
    return {split: [row for _, row in kept[split]] for split in SPLITS}


def _set_aside(rows: list[tuple[int, Row]], name: str) -> tuple[list[tuple[int, Row]], list[tuple[int, Row]]]:
    """Return a tenth of the rows, one at least, and the others.

    Raises:
        ValueError: there is only one.
    """
    if len(rows) < 2:
        raise ValueError(f"{name}: one row, of which none is left to set aside for tuning: give more, or data.tuning")
    held = max(1, len(rows) // 10)
    return rows[:held], rows[held:]


def require(rows: Sequence[Row], columns: Sequence[str], where: str) -> None:
    """Raise a ValueError unless every row has every column, which hold texts."""
    for number, row in enumerate(rows, 1):
        require_row(row, columns, columns, where, f"row {number}")


def require_row(row: Row, columns: Sequence[str], texts: Sequence[str], where: str, place: str) -> None:
    """Raise a ValueError unless a row has every column, and no half characters in those of ``texts``."""
    for name in columns:
        if row.get(name) is None:
            raise ValueError(f"{where}: a row has no {name!r}, its columns are {', '.join(map(str, row))} ({place})")
    for name in texts:
        if lone := next(filter(None, map(_LONE.search, _texts(row[name]))), None):
            half = f"\\u{ord(lone[0]):04x}"
            raise ValueError(f"{where}: {name!r} has {half}, half of a character, which is no text ({place})")


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value of JSON, however deep."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, list | tuple):
            left.extend(one)
        elif isinstance(one, dict):
            left.extend(one.values())
