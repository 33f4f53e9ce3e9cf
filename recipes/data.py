"""Task data: rows from files or from `datasets`, then token ids: one row a text, or blocks of running text."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from orthoft.recipes.schema import CausalLM, Classification, Data, Split, Task

Row = dict[str, Any]
Example = dict[str, Any]  # input_ids, and labels: a class, or for running text nothing
SPLITS: tuple[Split, ...] = ("train", "tuning", "test")


@dataclass(frozen=True)
class TaskData:
    """The three splits as token ids, and the classes' names (none for running text)."""

    train: list[Example]
    tuning: list[Example]
    test: list[Example]
    classes: list[str]


def read_file(path: Path) -> list[Row]:
    """Return the rows of a JSONL, CSV or Parquet file.

    Raises:
        ValueError: another kind of file, or a line that is no JSON object.
    """
    kind = path.suffix.lower()
    if kind in (".jsonl", ".json"):
        with path.open(encoding="utf-8") as lines:
            return [_json_row(line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    if kind == ".csv":
        with path.open(encoding="utf-8", newline="") as lines:
            return list(csv.DictReader(lines))
    if kind == ".parquet":
        return cast(list[Row], _datasets().Dataset.from_parquet(str(path)).to_list())
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
            rows[split] = _datasets().load_dataset(data.dataset, data.subset, split=name).to_list()
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


def task_data(task: Task, tokenizer: Any, seed: int) -> TaskData:
    """Return a task's splits as token ids."""
    rows = read_splits(task.data, seed)
    columns = [task.data.text] + ([task.data.label] if isinstance(task, Classification) else [])
    for split in SPLITS:
        require(rows[split], columns, f"{task.name} {split}")
    if isinstance(task, Classification):
        classes = class_names([row[task.data.label] for row in rows["train"]])
        examples = {split: labelled(task, rows[split], classes, tokenizer, split) for split in SPLITS}
        return TaskData(examples["train"], examples["tuning"], examples["test"], classes)
    blocks = {split: text_blocks(task, rows[split], tokenizer, split) for split in SPLITS}
    return TaskData(blocks["train"], blocks["tuning"], blocks["test"], [])


def class_names(values: Sequence[Any]) -> list[str]:
    """Return the classes in order: whole numbers by size, anything else by name."""
    names = {str(value) for value in values}
    if len(names) < 2:
        raise ValueError(f"classification needs two classes, the train split has only {min(names)!r}")
    numbers = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=int) if numbers else sorted(names)


def labelled(
    task: Classification, rows: Sequence[Row], classes: list[str], tokenizer: Any, split: str
) -> list[Example]:
    """Return token ids and the index of the class for each row."""
    labels = [str(row[task.data.label]) for row in rows]
    if strange := sorted(set(labels) - set(classes)):
        known = ", ".join(classes)
        raise ValueError(f"{task.name} {split}: label {strange[0]!r} is not in the train split, which has {known}")
    index = {name: i for i, name in enumerate(classes)}
    ids = tokenizer([str(row[task.data.text]) for row in rows], truncation=True, max_length=task.max_length)[
        "input_ids"
    ]
    return [{"input_ids": i, "labels": index[label]} for i, label in zip(ids, labels, strict=True)]


def text_blocks(task: CausalLM, rows: Sequence[Row], tokenizer: Any, split: str) -> list[Example]:
    """Return blocks of ``block_size`` tokens of the texts one after the other, each ended by the end-of-text token."""
    texts = [str(row[task.data.text]) for row in rows]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream = [token for ids in tokenizer(texts, verbose=False)["input_ids"] for token in [*ids, *end]]
    size = task.block_size
    blocks = [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]
    if not blocks:
        raise ValueError(f"{task.name} {split}: {len(stream)} tokens do not fill one block of {size}; lower block_size")
    return [{"input_ids": block} for block in blocks]


def collate(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    """Return a batch: token ids and mask (b, t) padded to the longest row, labels (b,), or (b, t) for running text."""
    rows = [torch.tensor(e["input_ids"]) for e in examples]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)  # (b, t)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()  # (b, t)
    labels = torch.tensor([e["labels"] for e in examples]) if "labels" in examples[0] else ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batches(examples: Sequence[Example], size: int, pad: int, what: str) -> Iterator[dict[str, Tensor]]:
    """Yield batches of rows of like length under a progress bar."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    for start in tqdm(range(0, len(order), size), desc=what, leave=False, disable=None):
        yield collate([examples[i] for i in order[start : start + size]], pad)
