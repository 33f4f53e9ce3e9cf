"""What a recipe may say of a task: its data, adapter and training. Knows nothing of torch."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, create_model, model_validator

from orthoft.recipes.strict import Name, PathText, Strict

Split = Literal["train", "tuning", "test"]
TaskKind = Literal["classification", "causal-lm"]


@cache
def training_model() -> type[Strict]:
    """Return a model of transformers' ``TrainingArguments``, read from its source: importing it would import torch."""
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("recipes need transformers")
    tree = ast.parse(Path(spec.submodule_search_locations[0], "training_args.py").read_text(encoding="utf-8"))
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments")
    fields: dict[str, Any] = {
        s.target.id: (_annotation(s.annotation), None)
        for s in body
        if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name) and s.target.id != "output_dir"
    }
    return create_model("TrainingArguments", __base__=Strict, **fields)


def _annotation(node: ast.expr) -> Any:
    """Return the type an annotation names, with ``Any`` for every name that is not Python's own."""
    types: dict[str, Any] = dict.fromkeys((n.id for n in ast.walk(node) if isinstance(n, ast.Name)), Any)
    types |= {t.__name__: t for t in (str, int, float, bool, dict, list)} | {"Literal": Literal}
    return eval(compile(ast.Expression(node), "training_args", "eval"), {}, types)


def _training(value: Any) -> dict[str, Any]:
    return training_model().model_validate(value).model_dump(exclude_unset=True)


class Adapter(BaseModel):
    """``type`` and the fields of its config class, which are checked once PEFT is imported."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    type: str

    @property
    def fields(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Data(Strict):
    """Files (JSONL, CSV, Parquet), or the splits of a ``datasets`` name in its own notation, as ``train[:90%]``."""

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


class LabelledData(TextData):
    """Texts with a label each."""

    label: str = "label"


class TaskBase(Strict):
    """What every task says: data, adapter, and training in the words of transformers' ``TrainingArguments``."""

    name: Name
    kind: TaskKind
    adapter: Adapter
    data: Data
    training: Annotated[dict[str, Any], BeforeValidator(_training)] = Field(default_factory=dict)


class Classification(TaskBase):
    """A frozen linear probe on mean-pooled features, then an adapter under it."""

    kind: Literal["classification"]
    data: LabelledData
    max_length: PositiveInt = 128


class CausalLM(TaskBase):
    """Next-token prediction on text packed into blocks."""

    kind: Literal["causal-lm"]
    data: TextData
    block_size: PositiveInt = 512
    prompt: str | None = None
    new_tokens: PositiveInt = 40


Task = Classification | CausalLM
