"""Words with a tag each: entities, parts of speech."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from orthoft.recipes.data import Row
from orthoft.recipes.kinds.kind import IGNORED, Batch, Example, class_indices, class_names, padded, padded_labels
from orthoft.recipes.kinds.probed import Probed, Seen
from orthoft.recipes.metrics import entity_f1, is_bio
from orthoft.recipes.task_schema import TokenClassification as Words

WORDS = ["Two", "words2", "it's"]  # by which a tokenizer shows how it reads words


class TokenClassification(Probed[Words]):
    """Features are the last hidden states of each word's first token; words behind ``max_length`` tokens are cut."""

    def __init__(self, task: Words, base: Path) -> None:
        super().__init__(task, base)
        self.lead = self._lead(base)

    def _lead(self, base: Path) -> str:
        """Return what stands before each word so that it is read as in a sentence: a space for byte-level tokenizers.

        Raises:
            ValueError: the tokenizer reads words by themselves otherwise than in a sentence.
        """
        for lead in ("", " "):
            sentence = self.processor(lead + " ".join(WORDS))["input_ids"]
            if self.processor([lead + word for word in WORDS], is_split_into_words=True)["input_ids"] == sentence:
                return lead
        raise ValueError(
            f"{self.task.name}: the tokenizer of {base} reads words one by one otherwise than in a sentence: "
            "take another base"
        )

    def columns(self) -> list[str]:
        return [self.task.data.tokens, self.task.data.tags]

    def classes(self, rows: Sequence[Row]) -> list[str]:
        return class_names([tag for _, tags in self.sentences(rows, "train") for tag in tags])

    def sentences(self, rows: Sequence[Row], split: str) -> list[tuple[list[str], list[Any]]]:
        """Return the words and the tags of each row.

        Raises:
            ValueError: they are no two lists of one length, or there are none.
        """
        found = []
        for row in rows:
            words, tags = (row[column] for column in self.columns())
            if not (isinstance(words, list) and isinstance(tags, list) and len(words) == len(tags) > 0):
                came = " and ".join(str(len(x)) if isinstance(x, list) else repr(x)[:40] for x in (words, tags))
                columns = " and ".join(map(repr, self.columns()))
                raise ValueError(
                    f"{self.task.name} {split}: {columns} are two lists of one length above 0, got {came} in a row"
                )
            found.append(([str(word) for word in words], tags))
        return found

    def examples(self, rows: Sequence[Row], classes: Sequence[str], split: str) -> list[Example]:
        """Return the tokens of each row's words; a word's label stands at its first token."""
        where, sentences = f"{self.task.name} {split}", self.sentences(rows, split)
        flat = iter(class_indices([tag for _, tags in sentences for tag in tags], classes, where))
        read = self.processor(
            [[self.lead + word for word in words] for words, _ in sentences],
            is_split_into_words=True,
            truncation=True,
            max_length=self.task.max_length,
        )
        examples = []
        for i, (words, _) in enumerate(sentences):
            of_words, places = [next(flat) for _ in words], read.word_ids(i)
            labels = [
                IGNORED if word is None or word == last else of_words[word] for last, word in pairwise([None, *places])
            ]
            if all(label == IGNORED for label in labels):
                raise ValueError(f"{where}: no word of {' '.join(words)[:40]!r} fits {self.task.max_length} tokens")
            examples.append({"input_ids": read["input_ids"][i], "labels": labels})
        return examples

    def texts(self, texts: Sequence[str]) -> list[Example]:
        ids = self.processor(list(texts), truncation=True, max_length=self.task.max_length)["input_ids"]
        return [{"input_ids": each, "labels": [IGNORED] * len(each)} for each in ids]

    def collate(self, examples: Sequence[Example]) -> Batch:
        return padded(examples, self.processor.pad_token_id) | {"labels": padded_labels(examples)}

    def reading(self) -> dict[str, Any]:
        told = {"pooling": "first token of a word", "max_length": self.task.max_length}
        return told | {"before each word": self.lead} if self.lead else told

    def features(self, encoder: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        hidden: Tensor = encoder(**inputs).last_hidden_state  # (b, t, d)
        return hidden.float()

    def f1(self, found: Tensor, seen: Seen, classes: Sequence[str]) -> float:
        """Return the F1 score of entities where tags are BIO, else the mean over the tags."""
        if not is_bio(classes):
            return super().f1(found, seen, classes)
        sentences: dict[int, tuple[list[str], list[str]]] = {}
        for sentence, mine, theirs in zip(*(x.tolist() for x in (seen.examples, found, seen.labels)), strict=True):
            tags = sentences.setdefault(sentence, ([], []))
            tags[0].append(classes[mine])
            tags[1].append(classes[theirs])
        return entity_f1(*zip(*sentences.values(), strict=True))
