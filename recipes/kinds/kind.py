"""What a kind of task is: its model, its examples and batches, its scores. A new kind is one file and its words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from orthoft.recipes.data import Row, read_splits, require_row
from orthoft.recipes.data_schema import Split
from orthoft.recipes.head import Head
from orthoft.recipes.task_schema import TaskBase

IGNORED = -100  # the label of what no loss looks at
Example = dict[str, Any]
Batch = dict[str, Tensor]
Scores = dict[str, float]
T = TypeVar("T", bound=TaskBase)


@dataclass(frozen=True)
class TaskData:
    """The three splits as examples, and the classes' names (none where there are no classes)."""

    train: list[Example]
    tuning: list[Example]
    test: list[Example]
    classes: list[str]


class Kind(ABC, Generic[T]):
    """One task and the processor of its base: rows become examples, examples batches, batches scores.

    ``auto`` and ``reader`` name the transformers classes that load the base and what turns raw values into its inputs,
    ``peft_task`` is PEFT's word for the task.
    """

    auto: ClassVar[str]
    reader: ClassVar[str] = "AutoTokenizer"
    peft_task: ClassVar[str | None] = None

    def __init__(self, task: T, base: Path) -> None:
        self.task = task
        self.processor = self.load_processor(base)

    def load_processor(self, base: Path) -> Any:
        """Return what turns raw values into the model's inputs.

        Raises:
            ValueError: the base has none.
        """
        try:
            return getattr(transformers, self.reader).from_pretrained(str(base), trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"{self.task.name}: {base} has nothing for {self.reader} to read ({first})") from None

    @abstractmethod
    def columns(self) -> list[str]:
        """Return the columns that every row must have."""

    def text_columns(self) -> list[str]:
        """Return those of the columns that hold texts, not names of files."""
        return self.columns()

    def classes(self, rows: Sequence[Row]) -> list[str]:
        """Return the names of the classes in the train rows, in order."""
        return []

    @abstractmethod
    def examples(self, rows: Sequence[Row], classes: Sequence[str], split: str) -> list[Example]:
        """Return one example, or one block of running text, after the other."""

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return a batch: keyword arguments of the model, and ``labels``."""

    @abstractmethod
    def about(self, data: TaskData) -> str:
        """Return a few words on the examples, for the log."""

    def texts(self, texts: Sequence[str]) -> list[Example]:
        """Return general texts as examples without labels, see ``train_to_merge.general``."""
        raise ValueError(f"a task of kind {self.task.kind!r} does not read texts")

    def inputs(self, model: Any, batch: Batch) -> Batch:
        """Return a batch without labels: all that the layers of a model see."""
        return {key: value for key, value in batch.items() if key != "labels"}

    def fit(self, model: nn.Module, data: TaskData, size: int) -> Head:
        """Return the head that is fitted on the frozen base, of kinds that have one."""
        raise TypeError(f"a task of kind {self.task.kind!r} has no head")

    def trained(self, model: nn.Module, head: Head | None) -> nn.Module:
        """Return what the Trainer trains: a module that returns a loss."""
        return model

    def learnt(self, trained: nn.Module, head: Head | None) -> Head | None:
        """Return the head as it is after training, of tasks that train it; every process calls it."""
        return None

    @abstractmethod
    def score(self, model: nn.Module, head: Head | None, examples: Sequence[Example], size: int, what: str) -> Scores:
        """Return a model's scores on examples, in batches of ``size``; ``what`` stands at the progress bar."""

    @property
    def prompt(self) -> str | None:
        """The beginning of the text that `sample` goes on with."""
        return None

    def sample(self, model: nn.Module) -> str | None:
        """Return a text that the model writes, if the task asks for one."""
        return None

    def data(self, seed: int) -> TaskData:
        """Return the task's splits as examples.

        Raises:
            ValueError: rows without a column, or which the kind cannot use.
        """

        def check(row: Row, split: Split, place: str) -> None:
            require_row(row, self.columns(), self.text_columns(), f"{self.task.name} {split}", place)

        rows = read_splits(self.task.data, seed, check)
        classes = self.classes(rows["train"])
        found = {split: self.examples(rows[split], classes, split) for split in rows}
        return TaskData(found["train"], found["tuning"], found["test"], classes)

    def alone(self, examples: Sequence[Example]) -> list[Example]:
        """Return examples one by one, in the order of their rows, where a kind packs several into one for training."""
        return list(examples)

    def chunks(self, examples: Sequence[Example], size: int, what: str) -> Iterator[list[Example]]:
        """Yield lists of examples of like length, each by itself, under a progress bar."""
        ordered = sorted(self.alone(examples), key=lambda example: len(example.get("input_ids", ())))
        for start in tqdm(range(0, len(ordered), size), desc=what, leave=False, disable=None):
            yield ordered[start : start + size]

    def batches(self, examples: Sequence[Example], size: int, what: str) -> Iterator[Batch]:
        """Yield batches of examples of like length under a progress bar."""
        return map(self.collate, self.chunks(examples, size, what))


def class_names(values: Sequence[Any]) -> list[str]:
    """Return the classes in order: whole numbers by size, anything else by name.

    Raises:
        ValueError: there is only one.
    """
    names = {str(value) for value in values}
    if len(names) < 2:
        raise ValueError(f"classification needs two classes, the train split has only {min(names)!r}")
    numbers = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=int) if numbers else sorted(names)


def class_indices(values: Sequence[Any], classes: Sequence[str], where: str) -> list[int]:
    """Return the index of each value's class.

    Raises:
        ValueError: a value is none of them.
    """
    index = {name: i for i, name in enumerate(classes)}
    if strange := sorted({str(value) for value in values} - set(index)):
        known = ", ".join(classes)
        raise ValueError(f"{where}: label {strange[0]!r} is not in the train split, which has {known}")
    return [index[str(value)] for value in values]


def filled(rows: Sequence[Row], column: str, where: str) -> list[str]:
    """Return the texts of a column.

    Raises:
        ValueError: one is empty.
    """
    texts = [str(row[column]) for row in rows]
    if empty := [i for i, text in enumerate(texts) if not text.strip()]:
        raise ValueError(f"{where}: {len(empty)} of {len(rows)} rows have an empty {column!r}: leave them out")
    return texts


def padded(examples: Sequence[Example], pad: int | None) -> Batch:
    """Return token ids and mask (b, t), filled to the longest row; the mask alone says what is filling."""
    rows = [torch.tensor(example["input_ids"]) for example in examples]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad or 0)  # (b, t)
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def padded_labels(examples: Sequence[Example]) -> Tensor:
    """Return the labels of each token (b, t), `IGNORED` where there is none."""
    rows = [torch.tensor(example["labels"]) for example in examples]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)


def label_loss(logits: Tensor, labels: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Return the cross-entropy of logits (..., classes), a mean over the labels (...) or their sum over ``count``.

    The Trainer counts the labels of a whole step, which may be several batches.
    """
    kept = "mean" if count is None else "sum"
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction=kept)
    return loss if count is None else loss / count


def on_device(batch: Mapping[str, Tensor], model: nn.Module) -> Batch:
    """Return the batch on the device of a model."""
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items()}
