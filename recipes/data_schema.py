"""What a recipe may say of a task's data. Knows nothing of torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from orthoft.recipes.strict import PathText, Strict

Split = Literal["train", "tuning", "test"]


class Data(Strict):
    """Files (JSONL, CSV, Parquet), or the splits of a ``datasets`` name, as ``train[:90%]``.

    The name is that of a builder, a folder, or a place on the Hub, as ``org/name`` or ``org/name@state``.
    """

    dataset: str | None = None
    subset: str | None = None
    train: PathText
    tuning: PathText | None = None
    test: PathText
    limit: dict[Split, PositiveInt] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _subset_of_a_dataset(self) -> Data:
        if self.subset is not None and self.dataset is None:
            raise ValueError("subset belongs to a dataset, which is not given")
        return self


class TextData(Data):
    """A column of texts."""

    text: str = "text"


class CausalData(Data):
    """Columns of running text (``text``, unless others are named), of a prompt and its completion, or of messages.

    Messages are lists of ``{role, content}``, which the chat template of the base's tokenizer makes a text of.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None

    @model_validator(mode="after")
    def _one_form(self) -> CausalData:
        given = tuple(name for name in ("text", "prompt", "completion", "messages") if getattr(self, name) is not None)
        if given not in ((), ("text",), ("prompt", "completion"), ("messages",)):
            raise ValueError(f"its columns are text, or prompt and completion, or messages: got {' and '.join(given)}")
        return self

    @property
    def form(self) -> Literal["text", "completion", "chat"]:
        return "chat" if self.messages else "completion" if self.prompt else "text"

    @property
    def columns(self) -> list[str]:
        return [name for name in (self.text, self.prompt, self.completion, self.messages) if name] or ["text"]


class LabelledData(TextData):
    """Texts with a label each."""

    label: str = "label"


class TokenData(Data):
    """Columns of words and of their tags, two lists of one length."""

    tokens: str = "tokens"
    tags: str = "tags"


class ImageData(Data):
    """Pictures with a label each: paths from the data file's folder, or what `datasets` makes of pictures."""

    image: str = "image"
    label: str = "label"


class PairData(Data):
    """Texts, and what is to be written for each."""

    source: str = "source"
    target: str = "target"
