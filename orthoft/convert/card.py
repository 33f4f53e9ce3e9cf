"""The model card of a converted adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orthoft.citations import citation_section
from orthoft.hub_place import named_in
from orthoft.loading import PIPELINES, TASK_TYPES, auto_class, words_to_adapt
from orthoft.merging.formats import READERS
from orthoft.merging.reports.card import adapter_papers, base_config
from orthoft.merging.reports.front_matter import front_matter


def conversion_card(config: Mapping[str, Any], layers: int, error: float, worst: float) -> str:
    """Return the README.md of a converted adapter: what it is, how close to what it was made of, how it loads."""
    kind, base = str(config["peft_type"]), named_in(config) or "BASE"
    auto = TASK_TYPES.get(config.get("task_type") or "", "") or auto_class(base_config(base))
    ours = kind.startswith("ORTHOFT_")
    front = front_matter(
        base=base,
        relation="adapter",
        library="peft",
        tags=[kind.removeprefix("ORTHOFT_").lower(), "orthoft"],
        pipeline=PIPELINES.get(auto),
    )
    close = f"with a relative error of {error:.3g}, at most {worst:.3g} in a layer" if worst else "exactly"
    lines = [
        front,
        "",
        f"# {kind.removeprefix('ORTHOFT_')} adapter of `{base}`",
        "",
        f"Converted by orthoft from an adapter in another format, {close}: {layers} layers.",
        "",
        "## Use",
        "",
        f"```python\n{words_to_adapt(auto, base, 'this-folder', ours)}\n```",
        "",
        *citation_section(adapter_papers(READERS[kind]) if kind in READERS else []),
    ]
    return "\n".join(lines)
