"""``merge``: adapters and checkpoints into one model, on disk."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthoft.cli.app import app
from orthoft.cli.commands import MERGE
from orthoft.cli.output import Output

if TYPE_CHECKING:
    from orthoft.merging import MergeReport


class As(StrEnum):
    checkpoint = "checkpoint"
    lora = "lora"
    rotation = "rotation"
    delta = "delta"


class Rescale(StrEnum):
    none = "none"
    weight = "weight"
    model = "model"


@app.command(rich_help_panel=MERGE)
def merge(
    out: Output,
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="A YAML file with these options.")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base: a folder, or org/name[@state] on the Hub.")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH[:WEIGHT]",
            help="An adapter or a checkpoint, a folder or org/name[@state[/folder]] on the Hub; repeat it.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    method: Annotated[str | None, typer.Option(help="One of those that `orthoft methods` lists.")] = None,
    space: Annotated[str | None, typer.Option(help="The coordinates to merge in; auto unless given.")] = None,
    param: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A parameter of the method or the space.")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Multiplies the merged change (lambda).")] = None,
    rescale: Annotated[
        Rescale | None, typer.Option(help="Bring the norm to the tasks' mean norm, by weight or for the whole model.")
    ] = None,
    isotropise: Annotated[
        bool | None, typer.Option("--isotropise", help="Make the merged singular values equal, on their range.")
    ] = None,
    include: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Merge only weights that match.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Leave weights that match.")] = None,
    statistics: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Numbers from data of a source (fisher, regmean...).")
    ] = None,
    as_: Annotated[As | None, typer.Option("--as", help="What to write; a checkpoint unless given.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA; exact unless given.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the base's unless given.")] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Of a checkpoint's files, e.g. 5GB.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, auto or cuda[:N]: where weights are merged.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of methods that draw.")] = None,
    diagnostics: Annotated[
        bool | None, typer.Option(help="Measure tasks and result for the report (the default), or be quicker.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PLACE=VALUE", help="Override, e.g. overrides.*mlp*.scale=0.5.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, weight by weight.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
) -> None:
    """Merge adapters and checkpoints of one base, on disk.

    What to merge is said by a YAML file, by options, or by both: options win. An interrupted merge goes on where it
    stopped when the same command is given again. Under `accelerate launch` or `torchrun` the processes share the work.

    Example: orthoft merge --base bert --source runs/a --source law=runs/b:0.5 --method ties --output merged

    Example: orthoft merge merge.yaml --set params.density=0.3 --dry-run

    Example: orthoft merge merge.yaml --as lora --rank 16 --output merged-lora --device auto --threads 2

    In Python: orthoft.merging.merge("bert", ["runs/a", "runs/b"], "merged", method="ties")
    """
    given = {
        "base": base,
        "sources": [parse_source(text) for text in source] if source else None,
        "output": None if output is None else str(output),
        "method": method,
        "space": space,
        "params": dict(parse_param(text) for text in param) if param else None,
        "scale": scale,
        "rescale": rescale and rescale.value,
        "isotropise": isotropise,
        "include": include or None,
        "exclude": exclude or None,
        "as": as_ and as_.value,
        "rank": rank,
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "device": device,
        "seed": seed,
        "diagnostics": diagnostics,
    }
    given = {key: value for key, value in given.items() if value is not None}
    from orthoft.recipes.merge_job import load_job

    arguments = with_statistics(load_job({**read(config), **given}, set_ or ()).arguments(), statistics or ())
    if dry_run:
        out.show(*planned({**arguments, "overwrite": overwrite}))
        return
    from orthoft.merging import merge as merge_models

    report = merge_models(**arguments, overwrite=overwrite, progress=sys.stderr.isatty())
    for line in remarks(report, arguments["rank"]):
        out.say(line)
    done = f"{len(report.merged)} weights merged by {report.method}, change of norm {report.norm:.4g}"
    out.show(report.to_dict(), f"{arguments['out']}: {done}")


def remarks(report: MergeReport, rank: int | None) -> Iterator[str]:
    """Give what is worth knowing of a merge that is done."""
    yield from (f"note: {note}" for note in report.notes)
    for where, lost in report.not_carried.items():
        yield f"not carried from {where}: {', '.join(lost)}"
    if report.truncation_error:
        yield f"truncated to rank {rank}: relative error {report.truncation_error:.3g}"
    if report.output_kind == "lora":
        from orthoft.convert import serving_notes

        yield from (f"note: {note}" for note in serving_notes(report.output))


def read(config: Path | None) -> dict[str, Any]:
    """Return what a YAML file says, nothing without one."""
    if config is None:
        return {}
    from orthoft.recipes.load import read_yaml

    return read_yaml(config)


def with_statistics(arguments: Mapping[str, Any], statistics: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a merge with each file of statistics at its source."""
    from orthoft.errors import unknown
    from orthoft.recipes.strict import expanded

    named, files = [name for name, _ in arguments["sources"]], dict(arguments["statistics"])
    for text in statistics:
        name, equals, path = text.partition("=")
        if not (equals and path):
            raise ValueError(f"--statistics takes NAME=PATH, got {text!r}")
        if name not in named:
            raise unknown("source in --statistics", name, named)
        files[name] = expanded(path)
    return {**arguments, "statistics": files}


def planned(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the plan of a merge as plain values and as a table, or raise what the merge would refuse."""
    from orthoft.merging.prepared import prepare
    from orthoft.merging.reports.estimate import WORDS, calibrate, estimates, plan_rows, plan_table, total
    from orthoft.recipes.table import Table

    ready = prepare(**{key: value for key, value in arguments.items() if key != "diagnostics"})
    todo, output = ready.todo, ready.writer
    rates = calibrate(todo.wish.method, todo.wish.bound()[0], todo.wish.weights)
    costs = estimates(todo, output, rates)
    whole = total(todo, costs, output)
    weights = {
        name: {"shape": item.shape, "sources": item.sources, "space": item.space.name, "rank": item.rank}
        | asdict(costs[name])
        for name, item in todo.merged.items()
    }
    told = {"weights": weights, "total": asdict(whole), "notes": list(todo.notes)}
    notes = "\n".join(f"note: {note}" for note in todo.notes)
    return told, Table(plan_table(todo, costs, whole), plan_rows(todo, costs, whole), WORDS, notes)


def parse_source(text: str) -> dict[str, Any]:
    """Return ``[name=]path[:weight]`` as the words of a source."""
    rest, weight = text, None
    if found := re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", text):
        rest, weight = found[1], float(found[2])
    name, equals, path = rest.partition("=")
    if not rest or (equals and not (name and path)):
        raise ValueError(f"--source takes [NAME=]PATH[:WEIGHT], got {text!r}")
    words: dict[str, Any] = {"name": name, "path": path} if equals else {"path": rest}
    return words if weight is None else {**words, "weight": weight}


def parse_param(text: str) -> tuple[str, Any]:
    """Return ``key=value`` as (key, the value as YAML reads it)."""
    from orthoft.recipes.load import value_of

    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"--param takes KEY=VALUE as in density=0.3, got {text!r}")
    return key, value_of(value)
