"""Chats by the template of the base's tokenizer, with the assistant's turns marked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from orthoft.recipes.kinds.marked import Marked

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


def marked_chats(tokenizer: Any, chats: Sequence[Chat], where: str, everything: bool) -> list[Marked]:
    """Return chats as texts, with everything marked or what the assistant writes.

    This is by the template's own marks, if it has them (``{% generation %}``), else by `marked_turns`.

    Raises:
        ValueError: there is no template, or it refuses a chat.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where}: messages need a chat template, which the base's tokenizer has not: "
            "take an instruction-tuned base, or data with prompt and completion"
        )
    template = tokenizer.get_chat_template()
    try:
        if everything:
            return [Marked(text, [(0, len(text))]) for text in _rendered(tokenizer, chats, False)]
        if not _MARKER.search(template):
            return marked_turns(tokenizer, chats, where)
        words = {"chat_template": template, "return_assistant_tokens_mask": True} | tokenizer.special_tokens_map
        return list(map(Marked, *render_jinja_template(conversations=list(chats), **words)))
    except TemplateError as error:
        raise ValueError(f"{where}: the base's chat template refuses a chat: {error}") from None


def marked_turns(tokenizer: Any, chats: Sequence[Chat], where: str) -> list[Marked]:
    """Return chats as texts, with the assistant's turns marked.

    A turn is what it adds to the text before it and to the header that asks for it, without white space behind.

    Raises:
        ValueError: the template changes earlier turns when later ones come.
    """
    turns = [(i, k) for i, chat in enumerate(chats) for k, turn in enumerate(chat) if turn["role"] == "assistant"]
    marked = [Marked(text, []) for text in _rendered(tokenizer, chats, False)]
    before = _rendered(tokenizer, [chats[i][:k] for i, k in turns], True)
    earlier = [chats[i][: k + 1] for i, k in turns if k + 1 < len(chats[i])]
    upto = iter(_rendered(tokenizer, earlier, False))
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


def _rendered(tokenizer: Any, chats: Sequence[Chat], prompt: bool) -> list[str]:
    """Return chats as texts, with the header of an answer to come or without."""
    return tokenizer.apply_chat_template(list(chats), tokenize=False, add_generation_prompt=prompt) if chats else []
