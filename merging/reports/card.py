"""The model card of a merge: what was merged and how, the words that do it again, and whom to cite."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import yaml

from orthoft.citations import PAPERS, citation_section, cited_in
from orthoft.loading import PIPELINES, auto_class, words_to_adapt, words_to_load
from orthoft.merging.files.hub import find_folder
from orthoft.merging.files.tensors import read_json
from orthoft.merging.formats import READERS, Reader
from orthoft.merging.methods import get_method
from orthoft.merging.plan import PathLike, Sources, named_sources
from orthoft.merging.reports.front_matter import Scored, front_matter
from orthoft.merging.reports.report import MergeReport
from orthoft.merging.spaces import SPACES
from orthoft.merging.wish import wish_for

CARD = "README.md"
LIBRARY = {"checkpoint": "transformers", "lora": "peft", "rotation": "peft", "delta": "orthoft"}
AGAIN = 'from orthoft.merging import merge\n\nmerge("{base}", ["this-folder"], "merged", method="mean")'


def model_card(report: MergeReport, measured: Sequence[str] = (), results: Sequence[Scored] = ()) -> str:
    """Return the README.md of a merge: front matter of the Hub, sources, method, numbers, loading, recipe, citations.

    ``measured`` are lines to stand under the sources, ``results`` the scores for the front matter.
    """
    config = base_config(report.base)
    auto, whole = auto_class(config), report.output_kind == "checkpoint"
    front = front_matter(
        base=report.base,
        relation="merge" if whole else "adapter",
        library=LIBRARY[report.output_kind],
        tags=["merge", "orthoft", report.method],
        pipeline=PIPELINES.get(auto) if report.output_kind != "delta" else None,
        name=Path(report.output).name,
        results=results,
    )
    weights = dict(zip(report.sources, report.weights, strict=True))
    sources = [f"| {name} | {kind} | {weights[name]:g} |" for name, kind in report.sources.items()]
    spaces = dict.fromkeys(entry.space for entry in report.merged)
    lines = [
        front,
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
        *(["## Measured", "", *measured, ""] if measured else []),
        "## Use",
        "",
        f"```python\n{_words(report, auto, 'auto_map' in config)}\n```",
        "",
        "## Recipe",
        "",
        "`orthoft merge` with this file and an `--output` does the same again:",
        "",
        f"```yaml\n{yaml.safe_dump(dict(report.config), sort_keys=False).rstrip()}\n```",
        "",
        *(["## Notes", "", *(f"* {note}" for note in report.notes), ""] if report.notes else []),
        *citation_section(_citations(report, spaces)),
    ]
    return "\n".join(lines)


def base_config(base: str) -> dict[str, Any]:
    """Return the ``config.json`` of a model, empty where there is none that can be read."""
    try:
        return read_json(find_folder(base, "base") / "config.json")
    except (FileNotFoundError, ValueError):
        return {}


def _words(report: MergeReport, auto: str, remote_code: bool) -> str:
    if report.output_kind == "checkpoint":
        return words_to_load(auto, "this-folder", remote_code)
    if report.output_kind == "delta":
        return AGAIN.format(base=report.base)
    return words_to_adapt(auto, report.base, "this-folder", ours=report.output_kind == "rotation")


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
    return cited_in(sys.modules[function.__module__])


def about(function: Any) -> str:
    """Return what a method or a space does, from the first line of the docstring of its module, without the paper."""
    text = (sys.modules[function.__module__].__doc__ or "").partition("\n")[0]
    return re.sub(r"\.? *arXiv.*", "", text).rstrip(".")


def _citations(report: MergeReport, spaces: Iterable[str]) -> list[str]:
    """Return the papers of the method, its spaces and the adapters that were merged."""
    own = [papers(get_method(report.method).merge), *(papers(SPACES[space].encode) for space in spaces)]
    kinds = (READERS[kind] for kind in report.sources.values() if kind in READERS)
    return [*(paper for found in own for paper in found), *(paper for kind in kinds for paper in adapter_papers(kind))]


def adapter_papers(kind: Reader) -> list[str]:
    """Return the paper of an adapter format: the first that its reader names, if people can cite it from here."""
    return [paper for paper in cited_in(kind.read)[:1] if paper in PAPERS]
