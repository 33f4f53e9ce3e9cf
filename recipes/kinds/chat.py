"""Chats by the template of the base's tokenizer, with the assistant's turns marked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError

from orthoft.recipes.kinds.marked import AT_ONCE, Marked, Tokens, tokens_of

Chat = list[dict[str, Any]]
_MARKER = re.compile(r"\{%-?\s*generation\b")


def as_chat(value: Any, where: str) -> Chat:
    """Return a row's messages.

    Raises:
        ValueError: they are no list of ``{role, content}`` in which the assistant answers.
    """
    sound = isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    )
    roles = [turn["role"] for turn in value] if sound else []
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        came = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
        raise ValueError(
            f"{where}: messages are a list of {{role, content}} in which the assistant answers, got {came}"
        )
    return list(value)


def last_answer(chat: Chat) -> str:
    """Return what the assistant says last."""
    return next(str(turn["content"]) for turn in reversed(chat) if turn["role"] == "assistant")


def chat_tokens(tokenizer: Any, chats: Sequence[Chat], size: int, where: str, everything: bool) -> Iterator[Tokens]:
    """Yield the first ``size`` tokens of each chat, of which everything or what the assistant writes is to be learnt.

    This is by the template's own marks, if it has them (``{% generation %}``), else by `marked_turns`.

    Raises:
        ValueError: there is no template, or it refuses a chat.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where}: messages need a chat template, which the base's tokenizer has not: "
            "take an instruction-tuned base, or data with prompt and completion"
        )
    try:
        if _MARKER.search(tokenizer.get_chat_template()) and not everything:
            yield from _by_marks(tokenizer, chats, size)
        else:
            marked = marked_turns(tokenizer, chats, where, everything)
            yield from tokens_of(tokenizer, marked, size, where, special=False)
    except TemplateError as error:
        raise ValueError(f"{where}: the base's chat template refuses a chat: {error}") from None


def _by_marks(tokenizer: Any, chats: Sequence[Chat], size: int) -> Iterator[Tokens]:
    words = {"return_assistant_tokens_mask": True, "truncation": True, "max_length": size}
    for first in range(0, len(chats), AT_ONCE):
        found = tokenizer.apply_chat_template(list(chats[first : first + AT_ONCE]), return_dict=True, **words)
        for ids, learnt in zip(found["input_ids"], found["assistant_masks"], strict=True):
            yield Tokens(np.array(ids), np.array(learnt, bool))


def marked_turns(tokenizer: Any, chats: Sequence[Chat], where: str, everything: bool = False) -> list[Marked]:
    """Return chats as texts, with everything marked or the assistant's turns.

    Such a turn is what it adds to the text before it and to the header that asks for it, without white space behind.

    Raises:
        ValueError: the template changes earlier turns when later ones come.
    """

    def rendered(some: Sequence[Chat], prompt: bool) -> list[str]:
        return tokenizer.apply_chat_template(list(some), tokenize=False, add_generation_prompt=prompt) if some else []

    if everything:
        return [Marked(text, [(0, len(text))]) for text in rendered(chats, False)]
    turns = [(i, k) for i, chat in enumerate(chats) for k, turn in enumerate(chat) if turn["role"] == "assistant"]
    marked = [Marked(text, []) for text in rendered(chats, False)]
    before = rendered([chats[i][:k] for i, k in turns], True)
    upto = iter(rendered([chats[i][: k + 1] for i, k in turns if k + 1 < len(chats[i])], False))
    for (i, k), start in zip(turns, before, strict=True):
        text, spans = marked[i]
        stop = next(upto) if k + 1 < len(chats[i]) else text
        if not (text.startswith(stop) and stop.startswith(start)):
            raise ValueError(
                f"{where}: the base's chat template changes earlier turns when later ones come, so that those of the "
                "assistant cannot be found: mark them in it by {% generation %}, or set loss to all"
            )
        spans.append((len(start), max(len(start), len(stop.rstrip()))))
    return marked
