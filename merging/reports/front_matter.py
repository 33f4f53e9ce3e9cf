"""What a model card says to the Hub: YAML between two rules at its top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from orthoft.hub_place import hub_place

Relation = Literal["adapter", "merge", "finetune", "quantized"]


@dataclass(frozen=True)
class Scored:
    """Scores of a model on the test split of one task; ``kind`` is the Hub's word for it, as "text-classification"."""

    task: str
    kind: str
    scores: Mapping[str, float]

    def entry(self) -> dict[str, Any]:
        """Return it as an entry of ``model-index``."""
        metrics = [{"type": name, "value": round(value, 6)} for name, value in self.scores.items()]
        return {"task": {"type": self.kind}, "dataset": {"name": self.task, "type": self.task}, "metrics": metrics}


def front_matter(
    *,
    base: str,
    relation: Relation,
    library: str,
    tags: Sequence[str],
    pipeline: str | None = None,
    name: str = "",
    results: Sequence[Scored] = (),
) -> str:
    """Return the metadata of a model card, rules included.

    A base that is a folder here is left out: the Hub takes repositories only. So is the licence, which is the base's
    and the data's, and is for people to say.
    """
    place = hub_place(base)
    index = [{"name": name, "results": [one.entry() for one in results]}]
    front: dict[str, Any] = {
        **({"base_model": place.repository, "base_model_relation": relation} if place else {}),
        "library_name": library,
        **({"pipeline_tag": pipeline} if pipeline else {}),
        "tags": list(tags),
        **({"model-index": index} if results else {}),
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip()}\n---"
