"""What a recipe may say: strict models that know nothing of torch, so that a mistake is answered at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from orthoft.hub_place import short_name
from orthoft.recipes.strict import Name, PathText, Strict, keys_of
from orthoft.recipes.table import MERGED
from orthoft.recipes.task_schema import Task

Dtype = Literal["float32", "bfloat16", "float16"]
Again = Literal["no", "overwrite", "keep experts"]  # what becomes of a finished run
Objective = Literal["gain", "score", "loss"]  # of a search
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy takes
OF_MERGE = (  # what ``orthoft.merging.merge`` itself would take out of ``params``
    *("tasks", "base", "sources", "out", "output", "weights", "statistics", "dtype", "rank", "max_shard_size"),
    *("seed", "device", "diagnostics", "overwrite", "resume", "progress"),
)


class MergeWords(Strict):
    """How to merge, in the words of ``orthoft.merging.merge``."""

    method: str
    space: str = "auto"
    params: dict[str, Any] = Field(default_factory=dict)
    isotropise: bool = False
    rescale: Literal["none", "weight", "model"] = "none"
    scale: float = 1.0
    include: list[str] = Field(default_factory=list)
    exclude: list[str] = Field(default_factory=list)
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _params_are_of_the_method(self) -> Self:
        for name in self.params:
            if name in keys_of(type(self)):
                raise ValueError(f"{name} stands beside params, not in it")
            if name in OF_MERGE:
                raise ValueError(f"params are those of the method and the space, {name} is of the merge itself")
        return self

    def words(self) -> dict[str, Any]:
        """Return them as arguments of ``orthoft.merging.merge``."""
        return as_arguments({name: getattr(self, name) for name in MergeWords.model_fields})


def as_arguments(words: Mapping[str, Any]) -> dict[str, Any]:
    """Return the words of a merge as arguments of ``orthoft.merging.merge``: parameters beside the others."""
    return {**{name: one for name, one in words.items() if name != "params"}, **words.get("params", {})}


class MergeSearch(Strict):
    """What `orthoft run` searches before it merges, on the tuning splits, in the words of ``orthoft.recipes.search``.

    The recipe's own merge is tried first; what does best is written. A method that draws takes the recipe's seed.
    ``trials`` are 50 unless a number or minutes are given, ``memory`` is in GB.
    """

    trials: PositiveInt | None = None
    minutes: PositiveFloat | None = None
    methods: list[str] | None = None
    spaces: list[str] | None = None
    rows: PositiveInt | None = None
    objective: Objective = "gain"
    pareto: bool = False
    equal_weights: bool = False
    memory: PositiveFloat = 8.0
    seed: Seed | None = None


class Measured(Strict):
    """What is measured of each expert for methods that merge with numbers from data: rows of its own train split.

    ``only`` are glob patterns of names of weights; the others merge without numbers.
    """

    examples: PositiveInt = 256
    only: Annotated[list[str], Field(min_length=1)] = Field(default_factory=lambda: ["*"])


class Source(Strict):
    """One fine-tuned model: its folder or place on the Hub, how much it counts, and the file of its statistics."""

    path: PathText
    name: str | None = None
    weight: float | None = None
    statistics: PathText | None = None

    @property
    def called(self) -> str:
        """Its name, or that of its folder or repository."""
        return self.name or short_name(self.path)


class Merge(MergeWords):
    """One call of ``orthoft.merging.merge``.

    ``weights`` are one number for all, one per task, or one per task and then per source; a source's own goes first.
    ``sources`` are models that no task is for: adapters, checkpoints, merged deltas, merged beside the experts, and
    not scored. ``refit_heads`` fits the tasks' linear heads anew on the merged model's features and writes them to its
    ``heads``. Methods that take ``statistics`` are given them: files that are in the output already, or else measured.
    """

    weights: float | list[float] | None = None
    sources: list[PathText | Source] = Field(default_factory=list)
    refit_heads: bool = False
    statistics: Measured | None = None
    search: MergeSearch | None = None

    @property
    def others(self) -> list[Source]:
        """The sources beside the experts."""
        return [Source(path=one) if isinstance(one, str) else one for one in self.sources]

    @property
    def methods(self) -> list[str]:
        """The methods that it names, those of its search among them."""
        return [self.method, *((self.search.methods or ()) if self.search else ())]

    def all_weights(self, tasks: int) -> list[float] | None:
        """Return one number per task and per source beside them, or None where the recipe gives none."""
        others = [one.weight for one in self.others]
        if isinstance(self.weights, list):
            own, rest = self.weights[:tasks], self.weights[tasks:] or [1.0] * len(others)
        elif self.weights is None and not any(weight is not None for weight in others):
            return None
        else:
            number = 1.0 if self.weights is None else self.weights
            own, rest = [number] * tasks, [number] * len(others)
        return [*own, *(weight if given is None else given for weight, given in zip(rest, others, strict=True))]

    def given(self, tasks: int) -> dict[str, Any]:
        """Return what the recipe gives of the merge itself, in the words of a trial of a search."""
        own = self.model_dump(include={*MergeWords.model_fields}, exclude_unset=True)
        return own | {"weights": weights} if (weights := self.all_weights(tasks)) is not None else own


class TrainToMerge(Strict):
    """What keeps the tasks apart before they are merged, from a few unlabelled rows of all of them.

    ``method`` chooses the subspace in which each task may write, ``frozen`` unless a LoRA is to train on from there, as
    it should where it trains for tens of steps and not for hundreds; ``ridge`` is of "contrastive". ``penalty`` weighs
    what a LoRA's update does to the other tasks' inputs beside the loss (3000, say). ``rows`` are of each task's train
    split, and of the texts in ``general`` (JSONL, CSV or Parquet, column ``text``), which stand for tasks that are not
    known yet. Rank and layers are the adapters' own.
    """

    method: Literal["osrm", "contrastive", "orthogonal", "principal"] | None = None
    frozen: bool = True
    penalty: PositiveFloat | None = None
    rows: PositiveInt = 300
    ridge: PositiveFloat = 0.1
    general: PathText | None = None


class Lora(Strict):
    """The merge as one LoRA adapter; without a rank, the sum of the experts' ranks."""

    rank: PositiveInt | None = None


class Export(Strict):
    """The merged checkpoint's dtype (the base's own unless given), and a LoRA adapter beside it if wanted."""

    dtype: Dtype | None = None
    lora: Lora | None = None


class Harness(Strict):
    """What lm-evaluation-harness runs on the merged export, in the words of its own command line.

    It reads the export as it is stored, in the recipe's ``dtype`` if that is given, and whole: never quantised,
    whatever the recipe's ``quantization``.
    """

    tasks: Annotated[list[str], Field(min_length=1)]
    limit: PositiveInt | None = None
    num_fewshot: NonNegativeInt | None = None
    batch_size: PositiveInt | Literal["auto"] | None = None  # that of the evaluation unless given
    include_path: PathText | None = None
    apply_chat_template: bool = False


class Evaluate(Strict):
    """``cross``: every expert on every task's test split, not on its own only."""

    cross: bool = False
    batch_size: PositiveInt = 32
    harness: Harness | None = None


class Quantization(Strict):
    """How models are quantised for training and scoring, in the words of transformers' ``BitsAndBytesConfig``.

    The merge reads the base as it is on disk, is written whole, and is scored quantised as the experts are; a search of
    merges scores them, the base and the experts whole. Four bits compute in the recipe's ``dtype``, or else in the
    base's, unless ``bnb_4bit_compute_dtype`` says another.
    """

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_compute_dtype: Dtype | None = None
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list[str] | None = None

    @model_validator(mode="after")
    def _one_width(self) -> Quantization:
        if self.load_in_4bit == self.load_in_8bit:
            raise ValueError("choose one of load_in_4bit and load_in_8bit")
        return self


class Recipe(Strict):
    """A base, tasks, and what becomes of them. Relative paths start at the current directory."""

    name: Name
    base: PathText
    dtype: Dtype | None = None
    quantization: Quantization | None = None
    output: PathText
    seed: Seed = 0
    device: str | None = None  # cpu, cuda, cuda:1, mps; unless given, what accelerate finds
    threads: PositiveInt | None = None
    defaults: None = Field(None, exclude=True)  # laid under the tasks before they are checked
    tasks: Annotated[list[Annotated[Task, Field(discriminator="kind")]], Field(min_length=1)]
    train_to_merge: TrainToMerge | None = None
    evaluate: Evaluate = Evaluate()
    merge: Merge | None = None
    export: Export = Export()

    @model_validator(mode="after")
    def _tasks_agree(self) -> Recipe:
        names = [task.name for task in self.tasks]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two tasks have the name {min(twice)!r}")
        if taken := {"base", *MERGED} & {*names}:
            raise ValueError(f"a task cannot be called {min(taken)!r}, which is a row of the table")
        loaded = {task.kind: task.auto for task in self.tasks}
        if len({*loaded.values()}) > 1:
            kinds = " and ".join(f"{kind} ({auto})" for kind, auto in sorted(loaded.items()))
            raise ValueError(f"the tasks of one recipe share the class that loads their base, got {kinds}")
        others = [one.called for one in self.merge.others] if self.merge else []
        if twice := {name for name in others if (names + others).count(name) > 1}:
            raise ValueError(f"merge.sources: two of what is merged have the name {min(twice)!r}: give one a name")
        weights = self.merge.weights if self.merge else None
        if isinstance(weights, list) and len(weights) not in (len(names), len(names) + len(others)):
            more = f" (and {len(others)} sources)" if others else ""
            raise ValueError(f"merge.weights has {len(weights)} numbers for {len(names)} tasks{more}")
        return self

    @model_validator(mode="after")
    def _heads_to_refit(self) -> Recipe:
        headless = [task.name for task in self.tasks if not hasattr(task, "head")]
        if self.merge is not None and self.merge.refit_heads and headless:
            raise ValueError(f"merge.refit_heads is for tasks with a head, {headless[0]!r} has none")
        return self

    @model_validator(mode="after")
    def _a_found_merge_may_be_dense(self) -> Self:
        if self.merge is not None and self.merge.search and self.export.lora and self.export.lora.rank is None:
            raise ValueError("export.lora.rank is needed: merge.search may find a merge without low-rank factors")
        return self

    @model_validator(mode="after")
    def _harness_has_an_export(self) -> Recipe:
        if self.evaluate.harness is not None:
            if self.merge is None:
                raise ValueError("evaluate.harness runs on the merged export: there is no merge")
            if self.tasks[0].kind != "causal-lm":
                raise ValueError(f"evaluate.harness is for tasks of kind causal-lm, got {self.tasks[0].kind}")
        return self

    @model_validator(mode="after")
    def _subspaces_have_adapters(self) -> Recipe:
        if self.train_to_merge is None:
            return self
        types = {task.trained.type.removeprefix("peft.") for task in self.tasks if task.expert is None}
        if not types:
            raise ValueError("train_to_merge: no task trains, all have experts")
        if types not in ({"lora"}, {"psoft"}):
            raise ValueError(
                f"train_to_merge needs adapters all of type lora or all psoft, got {', '.join(sorted(types))}"
            )
        if self.train_to_merge.method is None and self.train_to_merge.penalty is None:
            raise ValueError("train_to_merge needs a method, a penalty, or both")
        if types == {"psoft"} and (self.train_to_merge.penalty is not None or not self.train_to_merge.frozen):
            raise ValueError("train_to_merge: penalty and frozen: false are for adapters of type lora")
        if types == {"psoft"} and self.train_to_merge.method == "osrm":
            raise ValueError("train_to_merge: rotations need subspaces without overlap, which osrm does not give")
        return self
