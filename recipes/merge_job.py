"""A merge as a YAML file: what ``orthoft merge CONFIG`` reads, and a search or a measurement writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationError

from orthoft.recipes.load import RecipeError, error_lines, overridden, read_yaml
from orthoft.recipes.schema import Dtype, MergeWords, Source
from orthoft.recipes.strict import PathText


class MergeJob(MergeWords):
    """One call of ``orthoft.merging.merge``. Relative paths start at the current directory."""

    base: PathText
    sources: Annotated[list[PathText | Source], Field(min_length=1)]
    output: PathText
    as_: Literal["checkpoint", "lora", "rotation", "delta"] = Field("checkpoint", alias="as")
    dtype: Dtype | None = None
    rank: PositiveInt | None = None
    max_shard_size: str | PositiveInt = "5GB"
    seed: int = 0
    device: str = "cpu"
    diagnostics: bool = True

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``orthoft.merging.merge``."""
        from orthoft.merging.plan import named_sources  # imports torch, which a wrong file should not wait for

        sources = [Source(path=one) if isinstance(one, str) else one for one in self.sources]
        named = named_sources([(source.name, source.path) if source.name else source.path for source in sources])
        files = zip(named, sources, strict=True)
        weighted = any(source.weight is not None for source in sources)
        return {
            **self.words(),
            "base": self.base,
            "sources": named,
            "weights": [1.0 if source.weight is None else source.weight for source in sources] if weighted else None,
            "statistics": {name: source.statistics for (name, _), source in files if source.statistics},
            "out": self.output,
            "output": self.as_,
            "dtype": self.dtype,
            "rank": self.rank,
            "max_shard_size": self.max_shard_size,
            "seed": self.seed,
            "device": self.device,
            "diagnostics": self.diagnostics,
        }


def load_job(config: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> MergeJob:
    """Return the checked merge of a YAML file or a mapping, after overrides as ``params.density=0.3``.

    Raises:
        FileNotFoundError: there is no such file.
        RecipeError: anything else; one line per mistake.
    """
    raw = dict(config) if isinstance(config, Mapping) else read_yaml(Path(config).expanduser())
    for override in overrides:
        raw = overridden(raw, override)
    try:
        return MergeJob.model_validate(raw)
    except ValidationError as error:
        raise RecipeError("\n".join(error_lines(error, raw))) from None


def job(
    base: str,
    experts: Mapping[str, str],
    words: Mapping[str, Any],
    output: Path,
    seed: int,
    dtype: str | None,
    statistics: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return a merge of experts and others, folders by name, in the words of a trial, as ``orthoft merge`` reads it."""
    weights = words.get("weights") or [1.0] * len(experts)
    sources = [
        {"path": folder, "name": task, "weight": weight} | ({"statistics": statistics[task]} if statistics else {})
        for (task, folder), weight in zip(experts.items(), weights, strict=True)
    ]
    target = {"output": str(output), "seed": seed} | ({"dtype": dtype} if dtype else {})
    return {"base": base, "sources": sources, **target, **{key: words[key] for key in words if key != "weights"}}
