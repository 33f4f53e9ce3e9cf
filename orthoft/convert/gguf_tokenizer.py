"""A tokenizer of Hugging Face in the words of llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orthoft.merging.files.tensors import read_json

Json = Mapping[str, Any]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens
SPECIAL = ("bos", "eos", "unk", "pad")
# The expressions that split text into words, as the tokenizers of these families have them, and llama.cpp's names.
LLAMA_3, QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)
SPACES = "the tokenizer puts no space before a text that begins with one, llama.cpp does"
BY_EXPRESSION = {LLAMA_3: "llama-bpe", QWEN_2: "qwen2"}


@dataclass
class Words:
    """A tokenizer as llama.cpp reads it: ``model`` is its family ("gpt2", "llama"), ``pre`` how it splits text."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    ids: dict[str, int]  # of special tokens, by SPECIAL
    starts_with_bos: bool
    space_prefix: bool | None
    chat_template: str | None = None
    notes: list[str] = field(default_factory=list)

    def add_to(self, writer: Any) -> None:
        """Give them to a ``gguf.GGUFWriter``."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, index in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(index)
        writer.add_add_bos_token(self.starts_with_bos)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def words_of(folder: Path, vocabulary: int) -> Words:
    """Read ``tokenizer.json`` and what stands beside it; the list of tokens is filled up to the model's vocabulary.

    Raises:
        FileNotFoundError: there is no tokenizer.json.
        ValueError: a kind of tokenizer that llama.cpp has no name for here.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"no {file}: a GGUF file holds its tokenizer, save it in that format first")
    told = read_json(file)
    model = told["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"{file} is a {model.get('type')} tokenizer: GGUF is written of BPE tokenizers")
    pieces = bool(model.get("byte_fallback"))
    ids, beside = _special(folder, told), _optional(folder / "tokenizer_config.json")
    tokens, types = _tokens(told, vocabulary, pieces)
    if pieces and "unk" in ids:
        types[ids["unk"]] = UNKNOWN
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Words(
        model="llama" if pieces else "gpt2",
        pre="default" if pieces else _pre_tokenizer(told, str(file)),
        tokens=tokens,
        types=types,
        merges=[] if pieces else merges,
        scores=_scores(tokens, merges) if pieces else [],
        ids=ids,
        starts_with_bos=_starts_with(told, ids.get("bos"), tokens),
        space_prefix=_space_prefix(told, str(file)) if pieces else None,
        chat_template=_chat_template(folder, beside),
        notes=[SPACES] if pieces and "Metaspace" in str(told.get("pre_tokenizer")) else [],
    )


def _tokens(told: Json, vocabulary: int, pieces: bool) -> tuple[list[str], list[int]]:
    """Return tokens and their types in the order of their ids; ids that nothing has are unused."""
    by_id = {index: (text, NORMAL) for text, index in told["model"]["vocab"].items()}
    if pieces:
        by_id |= {i: (text, BYTE) for i, (text, _) in by_id.items() if len(text) == 6 and text.startswith("<0x")}
    for added in told.get("added_tokens", []):
        by_id[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    if (largest := max(by_id)) >= vocabulary:
        raise ValueError(f"the tokenizer has a token of id {largest}, the model a vocabulary of {vocabulary}")
    found = [by_id.get(index, (f"[PAD{index}]", UNUSED)) for index in range(vocabulary)]
    return [text for text, _ in found], [kind for _, kind in found]


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """Return minus the rank of the merge that makes each token: llama.cpp joins first what has the highest score."""
    rank: dict[str, int] = {}
    for index, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), index)
    return [-float(rank.get(token, 0)) for token in tokens]


def _pre_tokenizer(told: Json, file: str) -> str:
    """Return llama.cpp's name for the way in which a byte-level tokenizer splits text."""
    normalizer = (told.get("normalizer") or {}).get("type")
    steps = told.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if normalizer in (None, "NFC") and kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        splits = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and splits:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and splits:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not splits and steps[0].get("behavior") == "Isolated":
            expression = (steps[0].get("pattern") or {}).get("Regex")
            if expression in BY_EXPRESSION:
                return BY_EXPRESSION[expression]
    raise ValueError(
        f"{file} splits text in a way that has no name here for llama.cpp (normalizer {normalizer}, pre-tokenizers "
        f"{', '.join(map(str, kinds))}): known are those of GPT-2, SmolLM, Llama 3 and Qwen 2, and SentencePiece BPE"
    )


def _space_prefix(told: Json, file: str) -> bool:
    """Say whether a SentencePiece tokenizer puts a space before the text."""
    steps = [part for name in ("normalizer", "pre_tokenizer") if (part := told.get(name))]
    steps = [one for step in steps for one in step.get("normalizers", step.get("pretokenizers", [step]))]
    kinds = {step["type"] for step in steps}
    if not kinds <= {"Prepend", "Replace", "Metaspace"} or not kinds:
        raise ValueError(f"{file} treats text before its merges by {', '.join(sorted(kinds))}, llama.cpp does not")
    meta = [step for step in steps if step["type"] == "Metaspace"]
    return "Prepend" in kinds or any(step.get("prepend_scheme", "always") != "never" for step in meta)


def _starts_with(told: Json, bos: int | None, tokens: Sequence[str]) -> bool:
    """Say whether the tokenizer puts the token bos before a text."""
    processor = told.get("post_processor") or {}
    steps = processor.get("processors", [processor])
    single: Sequence[Json] = next((step["single"] for step in steps if step.get("type") == "TemplateProcessing"), [])
    first = (single[0].get("SpecialToken") or {}).get("id") if single else None
    return bos is not None and first == tokens[bos]


def _special(folder: Path, told: Json) -> dict[str, int]:
    """Return the ids of special tokens: as the tokenizer's configuration has them, else the model's."""
    known = {added["content"]: added["id"] for added in told.get("added_tokens", [])}
    known = {**told["model"]["vocab"], **known}
    beside, config = _optional(folder / "tokenizer_config.json"), _optional(folder / "config.json")
    found: dict[str, int] = {}
    for name in SPECIAL:
        token, index = beside.get(f"{name}_token"), config.get(f"{name}_token_id")
        text = token.get("content") if isinstance(token, Mapping) else token
        if text in known:
            found[name] = known[text]
        elif isinstance(index, int) and not isinstance(index, bool) and name not in ("unk",):
            found[name] = index
    return found


def _chat_template(folder: Path, beside: Json) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = beside.get("chat_template")
    return template if isinstance(template, str) else None


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
