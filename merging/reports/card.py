"""The model card of a merge: what was merged and how, the words that do it again, and whom to cite."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import yaml

from orthoft.merging.methods import get_method
from orthoft.merging.plan import PathLike, Sources, named_sources
from orthoft.merging.reports.report import MergeReport
from orthoft.merging.spaces import SPACES
from orthoft.merging.wish import wish_for

ARXIV = re.compile(r"\b\d{4}\.\d{4,5}\b")
LOAD = {
    "checkpoint": 'from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("this-folder")',
    "lora": (
        "from peft import PeftModel\nfrom transformers import AutoModel\n\n"
        'model = PeftModel.from_pretrained(AutoModel.from_pretrained("{base}"), "this-folder")'
    ),
    "rotation": (
        "import orthoft\nfrom peft import PeftModel\nfrom transformers import AutoModel\n\n"
        'model = PeftModel.from_pretrained(AutoModel.from_pretrained("{base}"), "this-folder")'
    ),
    "delta": 'from orthoft.merging import merge\n\nmerge("{base}", ["this-folder"], "merged", method="mean")',
}
CARD = "README.md"
LIBRARY = {"checkpoint": "transformers", "lora": "peft", "rotation": "peft", "delta": "orthoft"}


def model_card(report: MergeReport) -> str:
    """Return the README.md of a merge: front matter of the Hub, sources, method, recipe, loading, citations."""
    front = {
        "base_model": report.base,
        "base_model_relation": "merge" if report.output_kind == "checkpoint" else "adapter",
        "library_name": LIBRARY[report.output_kind],
        "tags": ["merge", "orthoft", report.method],
    }
    weights = dict(zip(report.sources, report.weights, strict=True))
    sources = [f"| {name} | {kind} | {weights[name]:g} |" for name, kind in report.sources.items()]
    spaces = dict.fromkeys(entry.space for entry in report.merged)
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        "",
        f"# A merge of {len(report.sources)} fine-tuned models",
        "",
        f"Merged by `{report.method}` ({about(get_method(report.method).merge)}) in space {', '.join(spaces)}, with "
        f"orthoft {report.version}, onto the base `{report.base}`: {len(report.merged)} weights changed, by a "
        f"Frobenius norm of {report.norm:.4g} in all. What the merge did, weight by weight, is in `report.json` and "
        "`report.html`.",
        "",
        "| source | kind | weight |",
        "|---|---|---|",
        *sources,
        "",
        "## Use",
        "",
        f"```python\n{LOAD[report.output_kind].format(base=report.base)}\n```",
        "",
        "## Recipe",
        "",
        "`orthoft merge` with this file and an `--output` does the same again:",
        "",
        f"```yaml\n{yaml.safe_dump(dict(report.config), sort_keys=False).rstrip()}\n```",
        "",
        *(["## Notes", "", *(f"* {note}" for note in report.notes), ""] if report.notes else []),
        *(["## Cite", "", *_citations(report.method, spaces), ""]),
    ]
    return "\n".join(lines)


def sources_config(
    sources: Sources, weights: Sequence[float], statistics: Mapping[str, PathLike]
) -> list[dict[str, Any]]:
    """Return the sources as ``orthoft merge`` reads them from YAML."""
    return [
        {
            "name": name,
            "path": str(path),
            **({} if weight == 1 else {"weight": weight}),
            **({"statistics": str(statistics[name])} if name in statistics else {}),
        }
        for (name, path), weight in zip(named_sources(sources), weights, strict=True)
    ]


def without_defaults(words: Mapping[str, Any]) -> dict[str, Any]:
    """Return the words of a merge that are not the defaults of `orthoft.merging.wish.wish_for`, empty or None."""
    defaults = {name: parameter.default for name, parameter in signature(wish_for).parameters.items()}
    return {
        key: value for key, value in words.items() if value not in (None, (), [], {}) and value != defaults.get(key)
    }


def papers(function: Any) -> list[str]:
    """Return the arXiv ids in the docstring of a function's module."""
    return ARXIV.findall(sys.modules[function.__module__].__doc__ or "")


def about(function: Any) -> str:
    """Return what a method or a space does, from the first line of the docstring of its module, without the paper."""
    text = (sys.modules[function.__module__].__doc__ or "").partition("\n")[0]
    return re.sub(r"\.? *arXiv.*", "", text).rstrip(".")


def _citations(method: str, spaces: Mapping[str, None]) -> list[str]:
    found = {method: papers(get_method(method).merge), **{space: papers(SPACES[space].encode) for space in spaces}}
    return [f"* {name}: https://arxiv.org/abs/{paper}" for name, ids in found.items() for paper in ids]
