"""What a recipe may say of a task: its data, adapter and training. Knows nothing of torch."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveInt,
    create_model,
    model_validator,
)

from orthoft.recipes.data_schema import CausalData, Data, ImageData, LabelledData, PairData, TokenData
from orthoft.recipes.strict import Name, PathText, Strict

TaskKind = Literal["classification", "causal-lm", "token-classification", "image-classification", "seq2seq"]
Trainer = Literal["transformers", "trl"]
SFT_WORDS = ("activation_offloading", "loss_type", "router_aux_loss_coef")  # of TRL, in ``training``
LOWER_IS_BETTER = ("loss", "perplexity")  # of all metrics


@cache
def training_model(trainer: Trainer = "transformers") -> type[Strict]:
    """Return a model of transformers' ``TrainingArguments``, read from its source: importing it would import torch.

    For TRL with what its ``SFTConfig`` adds, but for the words on data: the rows are made before.
    """
    fields = _fields("transformers", "training_args.py", "TrainingArguments")
    if trainer == "trl":
        of_sft = _fields("trl", "trainer/sft_config.py", "SFTConfig")
        fields |= {name: of_sft[name] for name in SFT_WORDS if name in of_sft}
    return create_model("TrainingArguments", __base__=Strict, **fields)


def _fields(package: str, file: str, name: str) -> dict[str, Any]:
    """Return the fields of a class as pydantic takes them, by its source in an installed package."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"recipes need {package}")
    tree = ast.parse(Path(spec.submodule_search_locations[0], file).read_text(encoding="utf-8"))
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    return {
        s.target.id: (_annotation(s.annotation), None)
        for s in body
        if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name) and s.target.id != "output_dir"
    }


def _annotation(node: ast.expr) -> Any:
    """Return the type an annotation names, with ``Any`` for every name that is not Python's own."""
    types: dict[str, Any] = dict.fromkeys((n.id for n in ast.walk(node) if isinstance(n, ast.Name)), Any)
    types |= {t.__name__: t for t in (str, int, float, bool, dict, list)} | {"Literal": Literal}
    return eval(compile(ast.Expression(node), "training_args", "eval"), {}, types)


def _training(value: Any) -> dict[str, Any]:
    return training_model().model_validate(value).model_dump(exclude_unset=True)


def _training_of_trl(value: Any) -> dict[str, Any]:
    trainer: Trainer = "trl" if find_spec("trl") else "transformers"
    return training_model(trainer).model_validate(value).model_dump(exclude_unset=True)


class Adapter(BaseModel):
    """``type`` and the fields of its config class, which are checked once PEFT is imported."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    type: str

    @model_validator(mode="before")
    @classmethod
    def _without_sets(cls, words: Any) -> Any:
        """Sets become lists in order: an expert's words are JSON, and the same in every process."""
        if not isinstance(words, Mapping):
            return words
        return {key: sorted(one, key=str) if isinstance(one, set | frozenset) else one for key, one in words.items()}

    @property
    def fields(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class EarlyStopping(Strict):
    """Stop after ``patience`` evaluations on the tuning split without a loss lower by more than ``threshold``."""

    patience: PositiveInt = 3
    threshold: NonNegativeFloat = 0.0


class TaskBase(Strict):
    """What every task says: data, adapter, and training in the words of transformers' ``TrainingArguments``.

    ``expert`` is an adapter that was trained elsewhere, a folder or a place on the Hub: it is taken as it is, and
    ``adapter``, ``training`` and ``early_stopping`` (as they stand in ``defaults``, say) are not looked at.
    ``auto`` names the transformers class that loads the base. Each kind has a ``metric``, by which gains are counted.
    """

    auto: ClassVar[str]
    name: Name
    kind: TaskKind
    adapter: Adapter | None = None
    expert: PathText | None = None
    data: Data
    training: Annotated[dict[str, Any], BeforeValidator(_training)] = Field(default_factory=dict)
    early_stopping: EarlyStopping | None = None

    @property
    def trained(self) -> Adapter:
        """The adapter that a task trains, which has no expert yet."""
        assert self.adapter is not None
        return self.adapter

    @property
    def given(self) -> Literal["adapter", "expert"]:
        """The word of the recipe that says of which kind its expert is."""
        return "adapter" if self.expert is None else "expert"

    @model_validator(mode="after")
    def _is_trained_or_has_an_expert(self) -> TaskBase:
        if self.expert is None and self.adapter is None:
            raise ValueError("adapter is missing (or expert, one that was trained elsewhere)")
        return self

    @model_validator(mode="after")
    def _loss_is_that_of_the_model(self) -> TaskBase:
        if self.training.get("label_smoothing_factor") and self.kind != "causal-lm":
            raise ValueError(f"training.label_smoothing_factor is for tasks of kind causal-lm, got {self.kind}")
        return self


class ProbedTask(TaskBase):
    """A linear probe on features of the base, then an adapter under it; ``head``: whether the probe trains with it."""

    auto: ClassVar[str] = "AutoModel"
    head: Literal["frozen", "trained"] = "frozen"
    metric: Literal["accuracy", "f1", "loss"] = "accuracy"


class Classification(ProbedTask):
    """Classes of texts, whose features are means over the tokens."""

    kind: Literal["classification"]
    data: LabelledData
    max_length: PositiveInt = 128


class TokenClassification(ProbedTask):
    """Tags of words, each judged at its first token; ``f1`` is that of whole entities where the tags are BIO."""

    kind: Literal["token-classification"]
    data: TokenData
    metric: Literal["accuracy", "f1", "loss"] = "f1"
    max_length: PositiveInt = 128


class ImageClassification(ProbedTask):
    """Classes of pictures, whose features are means over the patches."""

    kind: Literal["image-classification"]
    data: ImageData


class CausalLM(TaskBase):
    """Next-token prediction on running text, on completions of prompts, or on the assistant's turns of chats.

    ``loss`` looks at completions alone unless it is "all". ``packing`` (of running text alone unless given) fills rows
    of ``block_size``: running text is cut into them; completions and chats stay whole, apart from each other, and are
    cut only where one is longer. ``generate`` compares greedy answers of up to ``new_tokens`` with the last completion.
    """

    auto: ClassVar[str] = "AutoModelForCausalLM"
    kind: Literal["causal-lm"]
    data: CausalData
    training: Annotated[dict[str, Any], BeforeValidator(_training_of_trl)] = Field(default_factory=dict)
    trainer: Trainer = "transformers"
    metric: Literal["loss", "perplexity", "exact_match", "f1"] = "loss"
    block_size: PositiveInt = 512
    loss: Literal["completion", "all"] | None = None
    packing: bool | None = None
    generate: bool = False
    prompt: str | None = None
    new_tokens: PositiveInt = 40

    @property
    def packs(self) -> bool:
        return self.data.form == "text" if self.packing is None else self.packing

    @model_validator(mode="after")
    def _completions_are_needed(self) -> CausalLM:
        for words, wanted in (("loss: completion", self.loss == "completion"), ("generate", self.generate)):
            if wanted and self.data.form == "text":
                raise ValueError(f"{words} needs completions: data with prompt and completion, or with messages")
        if self.metric in ("exact_match", "f1") and not self.generate:
            raise ValueError(f"metric {self.metric!r} needs answers of the model: set generate to true")
        return self

    @model_validator(mode="after")
    def _trainer_knows_its_words(self) -> CausalLM:
        if self.trainer == "trl" and find_spec("trl") is None:
            raise ValueError("trainer 'trl' needs TRL: pip install 'orthoft[trl]'")
        if self.trainer != "trl" and (of_trl := [word for word in SFT_WORDS if word in self.training]):
            raise ValueError(f"training.{of_trl[0]} is a word of TRL: it needs trainer: trl")
        return self


class Seq2Seq(TaskBase):
    """A text for a text; with ``generate`` the greedy answers, of up to ``new_tokens``, are compared with the targets.

    ``prefix`` stands in front of each source and of ``prompt``, a source to show the answer to.
    """

    auto: ClassVar[str] = "AutoModelForSeq2SeqLM"
    kind: Literal["seq2seq"]
    data: PairData
    metric: Literal["loss", "perplexity", "exact_match", "f1"] = "loss"
    prefix: str = ""
    max_source_length: PositiveInt = 256
    max_target_length: PositiveInt = 64
    generate: bool = False
    prompt: str | None = None
    new_tokens: PositiveInt = 40

    @model_validator(mode="after")
    def _answers_are_needed(self) -> Seq2Seq:
        if self.metric in ("exact_match", "f1") and not self.generate:
            raise ValueError(f"metric {self.metric!r} needs answers of the model: set generate to true")
        return self


Task = Classification | CausalLM | TokenClassification | ImageClassification | Seq2Seq
