"""What a merge did: numbers in report.json, pictures in report.html."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from orthoft import __version__
from orthoft.merging.files.tensors import read_json
from orthoft.merging.files.writer import write_text
from orthoft.merging.reports.diagnostics import WeightDiagnostics, combined, pair_mean
from orthoft.merging.reports.page import Page, Table, sections
from orthoft.merging.reports.pictures import NOTHING, number

REPORT = "report.json"
PAGE = "report.html"
HEADERS = (
    *("weight", "shape", "space", "rank", "change", "change / weight", "least survival", "most interference"),
    *("sign conflict", "input overlap", "rounding", "truncation", "ms"),
)


@dataclass
class WeightReport:
    """One merged weight: where it was merged, and Frobenius norms of what came in and what went out."""

    name: str
    shape: tuple[int, ...]
    space: str
    rank: int | None  # of the merged factors, None if the merged delta is dense
    task_norms: dict[str, float]  # by source, only of those that change this weight, before their weights
    norm: float = 0.0
    truncation_error: float = 0.0  # norm of what a chosen rank left out, relative to `norm`
    seconds: float = 0.0
    diagnostics: WeightDiagnostics | None = None


@dataclass
class MergeReport:
    """What a merge read, did and wrote.

    ``scale`` is the global factor of methods that have one. ``not_carried`` lists, by source, what the output does not
    hold; ``notes`` say what is worth knowing about this combination; ``config`` are the words of the merge, as
    ``orthoft merge`` reads them.
    """

    base: str
    sources: dict[str, str]  # name: kind
    output: str
    output_kind: str
    method: str
    params: dict[str, Any]
    weights: list[float]
    dtype: str | None
    seed: int
    scale: float = 1.0
    merged: list[WeightReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_carried: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0
    peak_bytes: int = 0
    version: str = __version__
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def norm(self) -> float:
        """The Frobenius norm of the whole merged delta."""
        return math.hypot(*(weight.norm for weight in self.merged))

    @property
    def truncation_error(self) -> float:
        """The norm of all that a chosen rank left out, relative to `norm`."""
        lost = math.hypot(*(weight.truncation_error * weight.norm for weight in self.merged))
        return lost / self.norm if self.norm > 0 else 0.0

    @property
    def totals(self) -> WeightDiagnostics | None:
        """The diagnostics of all weights together, None if none were asked for."""
        return combined(self.diagnostics.values())

    @property
    def diagnostics(self) -> dict[str, WeightDiagnostics]:
        """The diagnostics by weight, of those that have them."""
        return {weight.name: weight.diagnostics for weight in self.merged if weight.diagnostics is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, the totals included."""
        totals = self.totals
        return {
            **asdict(self),
            "norm": self.norm,
            "truncation_error": self.truncation_error,
            "totals": None if totals is None else asdict(totals),
        }

    def save(self, file: str | Path) -> None:
        """Write the report as JSON, a line for each field and each weight."""
        write_report(file, self.to_dict(), "merged")

    @classmethod
    def load(cls, path: str | Path) -> MergeReport:
        """Return the report in a file, or in the folder of a merge.

        Raises:
            FileNotFoundError: there is no report.
            ValueError: the file is not one.
        """
        file = Path(path).expanduser()
        file = file / REPORT if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(f"no report of a merge at {file}: give the folder of a merge or its {REPORT}")
        told = read_json(file)
        try:
            own = {entry.name: told[entry.name] for entry in fields(cls)}
            return cls(**{**own, "merged": [_weight(line) for line in own["merged"]]})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} is not the report of a merge by this version of orthoft: {error}") from error

    def page(self) -> Page:
        """Return the report as a page of pictures."""
        about = f"{len(self.sources)} sources merged into {len(self.merged)} weights of {self.base}"
        nothing = "" if self.diagnostics else ", without diagnostics"
        lists = {
            "Notes": self.notes,
            "Not carried": [f"{n}: {x}" for n, left in self.not_carried.items() for x in left],
        }
        table = Table(HEADERS, [_line(weight) for weight in self.merged])
        pictures = sections(list(self.sources), self.diagnostics)
        return Page(f"Merge by {self.method}", about + nothing + ".", self._facts(), lists, pictures, table)

    def to_html(self, file: str | Path) -> None:
        """Write the report as one HTML file that loads nothing from anywhere."""
        self.page().save(file)

    def _repr_html_(self) -> str:
        return self.page().fragment()

    def _facts(self) -> list[tuple[str, str]]:
        totals, names = self.totals, list(self.sources)
        spaces = [weight.space for weight in self.merged]
        rounding = None if totals is None or totals.merged is None else totals.merged.rounding_error
        facts = {
            "method": _call(self.method, self.params),
            "space": ", ".join(f"{name} ({spaces.count(name)} weights)" for name in dict.fromkeys(spaces)),
            "base": self.base,
            **{
                f"source {name}": f"{self.sources[name]}, weight {number(weight)}, norm {number(self._task_norm(name))}"
                for name, weight in zip(names, self.weights, strict=True)
            },
            "output": f"{self.output} ({self.output_kind}, {self.dtype or 'dtype of the base'})",
            "norm of the change": number(self.norm) + (f", scaled by {number(self.scale)}" if self.scale != 1 else ""),
            "truncation error": number(self.truncation_error) if self.truncation_error else "none",
            "rounding error": "not measured" if rounding is None else f"{number(rounding)} of the change",
            "time": f"{self.seconds:.1f} s, {sum(weight.seconds for weight in self.merged):.1f} s of it in the weights",
            "peak memory": f"{self.peak_bytes / 1e6:,.0f} MB",
            "seed": str(self.seed),
            "orthoft": self.version,
        }
        return list(facts.items())

    def _task_norm(self, name: str) -> float:
        return math.hypot(*(weight.task_norms.get(name, 0.0) for weight in self.merged))


def write_report(file: str | Path, content: Mapping[str, Any], lines: str) -> None:
    """Write strict JSON with a line for each field, and one for each entry of the list ``lines``; NaN becomes null."""
    text = []
    for key, value in _finite(dict(content)).items():
        each = ",\n".join(f"    {json.dumps(entry)}" for entry in value) if key == lines and value else None
        text.append(f"  {json.dumps(key)}: {json.dumps(value) if each is None else f'[{chr(10)}{each}{chr(10)}  ]'}")
    write_text(Path(file), "{\n" + ",\n".join(text) + "\n}\n")


def _finite(value: Any) -> Any:
    """Return plain values with None for NaN and Inf, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(shape: Sequence[int]) -> str:
    """Return a shape as people write it."""
    return " x ".join(map(str, shape))


def _line(weight: WeightReport) -> list[str]:
    told = weight.diagnostics
    merged = None if told is None else told.merged
    known = [] if merged is None else [value for value in merged.survival if value is not None]
    others = [] if merged is None else [abs(value) for value in merged.interference if value is not None]
    return [
        weight.name,
        shown(weight.shape),
        weight.space,
        NOTHING if weight.rank is None else str(weight.rank),
        number(weight.norm),
        number(weight.norm / told.base_norm if told is not None and told.base_norm else None),
        number(min(known, default=None)),
        number(max(others, default=None)),
        number(None if told is None else pair_mean(told.sign_conflict)),
        number(None if told is None else pair_mean(told.input_overlap)),
        number(None if merged is None else merged.rounding_error),
        number(weight.truncation_error or None),
        f"{1000 * weight.seconds:.1f}",
    ]


def _weight(line: dict[str, Any]) -> WeightReport:
    told = line.get("diagnostics")
    diagnostics = None if told is None else WeightDiagnostics.from_dict(told)
    return WeightReport(**{**line, "shape": tuple(line["shape"]), "diagnostics": diagnostics})


def _call(name: str, params: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value}' for key, value in params.items())})"
