"""What is compared: two suites of tasks, and rows of adapters that train about as many parameters each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATA = Path(".cache/demo")
SPLITS = ("train", "tuning", "test")


@dataclass(frozen=True)
class Row:
    """One way to train the experts.

    Args:
        adapter: its type and the fields of its config.
        rates: learning rates to choose from on tuning rows of the suite's ``tuned_on``; a single one is taken.
        to_merge: words of a recipe's ``train_to_merge``.
        rate_of: the row whose learning rate is taken, in place of a choice.
        keep_away: weight of the penalty on what the update does to the other tasks' inputs.
        merges: "all" methods in all spaces, "some" of them, or the plain "sum" and mean alone.
    """

    title: str
    adapter: dict[str, Any]
    rates: tuple[float, ...] = ()
    to_merge: dict[str, Any] | None = None
    rate_of: str | None = None
    keep_away: float = 0.0
    merges: str = "sum"


@dataclass(frozen=True)
class Suite:
    """Tasks of one kind on one base, in the words of a recipe."""

    name: str
    kind: str
    base: Path
    tasks: dict[str, Path]
    rows: dict[str, Row]
    tuned_on: tuple[str, ...]
    task_words: dict[str, Any] = field(default_factory=dict)
    adapter_words: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    trial_rows: int = 100  # of each tuning split, in a trial of a merge
    test_rows: int | None = None  # of each test split: all unless given
    dtype: str | None = None  # the base's own unless given
    batch: int = 64

    def settings(self, row: Row | None = None) -> dict[str, Any]:
        """Return what measured numbers depend on."""
        own = {} if row is None else {"adapter": row.adapter, "to_merge": row.to_merge, "keep_away": row.keep_away}
        words = {"task": self.task_words, "training": self.training, "adapters": self.adapter_words}
        cut = {key: value for key in ("test_rows", "dtype") if (value := getattr(self, key)) is not None}
        return {**words, **own, **cut, "tasks": list(self.tasks), "trial_rows": self.trial_rows}

    def recipe(self, row: Row, seed: int, rate: float, out: Path) -> dict[str, Any]:
        """Return the recipe that trains a row's experts."""
        words = {
            "name": self.name,
            "base": str(self.base),
            "output": str(out),
            "seed": seed,
            **({} if self.dtype is None else {"dtype": self.dtype}),
            "defaults": {
                "kind": self.kind,
                **self.task_words,
                "adapter": {**self.adapter_words, **row.adapter},
                "training": {**self.training, "learning_rate": rate},
            },
            "tasks": [
                {"name": name, "data": {split: str(folder / f"{split}.jsonl") for split in SPLITS}}
                for name, folder in self.tasks.items()
            ],
        }
        return words if row.to_merge is None else {**words, "train_to_merge": row.to_merge}


LORA = {"type": "peft.lora", "r": 8, "lora_alpha": 8}
LORA_16 = {"type": "peft.lora", "r": 16, "lora_alpha": 16}

ENCODER_ROWS = {
    "lora": Row("LoRA (PEFT), r=8", LORA, (1e-3, 3e-3), merges="all"),
    "lora-slow": Row("LoRA (PEFT), r=8, at the rate of the next row", LORA, rate_of="contrastive"),
    "contrastive": Row(
        "LoRA to merge: contrastive, r=16",
        LORA_16,
        (1e-3, 3e-3),
        to_merge={"method": "contrastive", "ridge": 0.1},
    ),
    "contrastive-free": Row(
        "LoRA to merge: contrastive, not frozen, r=8",
        LORA,
        to_merge={"method": "contrastive", "frozen": False},
        rate_of="lora",
    ),
    "penalty-300": Row("LoRA to merge: penalty 300, r=8", LORA, rate_of="lora", keep_away=300.0),
    "penalty-3000": Row("LoRA to merge: penalty 3000, r=8", LORA, rate_of="lora", keep_away=3000.0),
    "penalty-30000": Row("LoRA to merge: penalty 30000, r=8", LORA, rate_of="lora", keep_away=30000.0),
    "oftv2": Row("OFTv2, b=32", {"type": "oftv2", "block_size": 32}, (1e-3,), merges="some"),
    "hra": Row("HRA, r=16", {"type": "hra", "r": 16}, (3e-3,)),
    "dora": Row("DoRA (PEFT), r=8", {**LORA, "use_dora": True}, rate_of="lora"),
    "peft-oft": Row("OFT (PEFT), b=32", {"type": "peft.oft", "oft_block_size": 32, "r": 0}, rate_of="oftv2"),
    "peft-hra": Row("HRA (PEFT), r=16", {"type": "peft.hra", "r": 16}, rate_of="hra"),
    "orthogonal": Row(
        "LoRA to merge: orthogonal, r=16", LORA_16, to_merge={"method": "orthogonal"}, rate_of="contrastive"
    ),
    "osrm": Row("LoRA to merge: OSRM, r=16", LORA_16, to_merge={"method": "osrm"}, rate_of="contrastive"),
    "psoft": Row("PSOFT, r=134", {"type": "psoft", "r": 134}, (1e-3, 5e-3)),
    "psoft-contrastive": Row(
        "PSOFT to merge: contrastive, r=40", {"type": "psoft", "r": 40}, (5e-3, 2e-2), {"method": "contrastive"}
    ),
    "psoft-principal": Row(
        "PSOFT to merge: principal, r=40",
        {"type": "psoft", "r": 40},
        to_merge={"method": "principal"},
        rate_of="psoft-contrastive",
    ),
    "goft": Row("GOFT, quasi", {"type": "goft", "mode": "quasi"}, (1e-3, 5e-3)),
    "svft": Row("SVFT, banded, d=12", {"type": "svft", "pattern": "banded", "off_diagonals": 12}, (3e-3, 1e-2)),
}

ENCODER = Suite(
    name="minilm",
    kind="classification",
    base=DATA / "minilm",
    tasks={
        name: DATA / name
        for name in (
            "sarcasm",
            "rotten_tomatoes",
            "amazon",
            "tweets",
            "medicine",
            "sequel",
            "scripture",
            "nyt",
        )
    },
    rows=ENCODER_ROWS,
    tuned_on=("sarcasm", "scripture"),
    task_words={"max_length": 32, "data": {"limit": {"train": 2400, "tuning": 200, "test": 1000}}},
    adapter_words={"target_modules": "all-linear", "exclude_modules": ["pooler.dense"]},
    training={
        "max_steps": 200,
        "per_device_train_batch_size": 16,
        "train_sampling_strategy": "group_by_length",
        "warmup_steps": 20,
        "lr_scheduler_type": "linear",
    },
)

LANGUAGE_ROWS = {
    "lora": Row("LoRA (PEFT), r=8", LORA, (1e-3, 3e-3), merges="some"),
    "oftv2": Row("OFTv2, b=32", {"type": "oftv2", "block_size": 32}, (1e-3, 3e-3), merges="some"),
    "hra": Row("HRA, r=16", {"type": "hra", "r": 16}, (3e-3, 1e-2), merges="some"),
    "contrastive": Row(
        "LoRA to merge: contrastive, r=16",
        LORA_16,
        (3e-3, 1e-2),
        to_merge={"method": "contrastive", "rows": 16},
        merges="some",
    ),
    "contrastive-free": Row(
        "LoRA to merge: contrastive, not frozen, r=8",
        LORA,
        to_merge={"method": "contrastive", "rows": 16, "frozen": False},
        rate_of="lora",
    ),
    "penalty-3000": Row("LoRA to merge: penalty 3000, r=8", LORA, rate_of="lora", keep_away=3000.0),
    "dora": Row("DoRA (PEFT), r=8", {**LORA, "use_dora": True}, rate_of="lora"),
    "peft-oft": Row("OFT (PEFT), b=32", {"type": "peft.oft", "oft_block_size": 32, "r": 0}, rate_of="oftv2"),
    "peft-hra": Row("HRA (PEFT), r=16", {"type": "peft.hra", "r": 16}, rate_of="hra"),
    "psoft": Row("PSOFT, r=145", {"type": "psoft", "r": 145}, (3e-4, 1e-3)),  # at 3e-3 it diverges
    "goft": Row("GOFT, quasi", {"type": "goft", "mode": "quasi"}, (1e-3, 5e-3)),
    "svft": Row("SVFT, banded, d=12", {"type": "svft", "pattern": "banded", "off_diagonals": 12}, (3e-3, 1e-2)),
}

LANGUAGE = Suite(
    name="smollm2",
    kind="causal-lm",
    base=DATA / "smollm2",
    tasks={name: DATA / name for name in ("kjv", "maths", "german", "python", "law", "drama")},
    rows=LANGUAGE_ROWS,
    tuned_on=("maths",),
    task_words={"block_size": 128},
    adapter_words={"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]},
    training={
        "max_steps": 30,
        "per_device_train_batch_size": 2,
        "warmup_steps": 5,
        "lr_scheduler_type": "linear",
    },
    trial_rows=4,
    test_rows=16,
    dtype="float32",  # bfloat16, which the weights are stored in, is 6 to 100 times slower on CPUs without it
    batch=4,
)

SUITES = {suite.name: suite for suite in (ENCODER, LANGUAGE)}
