"""The command line: parse, call, print. Each command is one Python call, and imports what it needs when it runs."""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from orthoft.convert import LayerReport

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Orthogonal fine-tuning of Hugging Face models, and merging of what was trained.",
)
INTERRUPTED = 130
BAD_INPUT = (ValueError, TypeError, KeyError, FileNotFoundError, FileExistsError)
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="PLACE=VALUE", help="Override, e.g. tasks.0.training.max_steps=5.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start again where the output folder holds a run.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.")]


class As(StrEnum):
    checkpoint = "checkpoint"
    lora = "lora"


def show_version(wanted: bool) -> None:
    if wanted:
        from orthoft import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    context.find_root().obj = debug


@app.command()
def run(recipe: RecipeFile, set_: Overrides = None, overwrite: Overwrite = False) -> None:
    """Fine-tune, merge, export and evaluate as a recipe says.

    Example: orthoft run recipes/configs/minilm.yaml --set seed=1 --set output=runs/second
    """
    from orthoft import recipes

    recipes.run(recipe, set_ or (), overwrite=overwrite, say=typer.echo)


@app.command()
def finetune(
    recipe: RecipeFile,
    task: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this task; may be repeated.")] = None,
    set_: Overrides = None,
    overwrite: Overwrite = False,
) -> None:
    """Train the experts of a recipe; `run` takes them up later.

    Example: orthoft finetune recipes/configs/minilm.yaml --task sarcasm
    """
    from orthoft import recipes

    done = recipes.run(recipe, set_ or (), until="finetune", tasks=task or None, overwrite=overwrite, say=typer.echo)
    for name, expert in done["experts"].items():
        typer.echo(f"{name}: {expert['folder']}")


@app.command()
def merge(
    base: Annotated[str, typer.Option(metavar="MODEL", help="The base: a folder, or a name on the Hub.")],
    source: Annotated[list[str], typer.Option(metavar="[NAME=]PATH[:WEIGHT]", help="An adapter or a checkpoint.")],
    output: Annotated[Path, typer.Option(help="The folder to write.")],
    method: Annotated[str, typer.Option(help="One of those that `orthoft methods` lists.")],
    space: Annotated[str, typer.Option(help="The coordinates to merge in.")] = "auto",
    param: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="A parameter of the method.")] = None,
    as_: Annotated[As, typer.Option("--as", help="What to write.")] = As.checkpoint,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA; exact unless given.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the base's unless given.")] = None,
    seed: Annotated[int, typer.Option(help="Of methods that draw.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
) -> None:
    """Merge adapters and checkpoints of one base, on disk.

    Example: orthoft merge --base bert --source runs/a --source law=runs/b:0.5 --method ties --output merged
    """
    parsed = [parse_source(text) for text in source]
    params = dict(parse_param(text) for text in param or ())
    from orthoft.merging import merge as merge_models

    weighted = any(weight is not None for _, weight in parsed)
    report = merge_models(
        base,
        [one for one, _ in parsed],
        output,
        method=method,
        space=space,
        weights=[1.0 if weight is None else weight for _, weight in parsed] if weighted else None,
        output=as_.value,
        dtype=dtype,
        rank=rank,
        overwrite=overwrite,
        seed=seed,
        progress=sys.stderr.isatty(),
        **params,
    )
    for note in report.notes:
        typer.echo(f"note: {note}")
    for where, lost in report.not_carried.items():
        typer.echo(f"not carried from {where}: {', '.join(lost)}")
    if report.truncation_error:
        typer.echo(f"truncated to rank {rank}: relative error {report.truncation_error:.3g}")
    typer.echo(f"{output}: {len(report.merged)} weights merged by {method}, change of norm {report.norm:.4g}")


@app.command()
def convert(
    adapter: Annotated[Path, typer.Argument(help="The folder of an adapter.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[
        str, typer.Option(help="lora; peft: PEFT's own OFT, HRA or PSOFT; orthoft: from one of those to ours.")
    ] = "lora",
    rank: Annotated[int | None, typer.Option(help="Of the LoRA; exact where there is an exact one, if absent.")] = None,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="The base, if it has moved.")] = None,
    tolerance: Annotated[
        float, typer.Option(help="For peft and orthoft: the largest relative error of a layer to accept.")
    ] = 1e-6,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
) -> None:
    """Rewrite an adapter: as a LoRA or as PEFT's own OFT, HRA or PSOFT, which load without orthoft, or from those.

    A LoRA is exact for HRA and PSOFT; OFTv2, GOFT and SVFT change weights in full rank and need --rank, the best of
    that rank with its error per layer. --to peft and --to orthoft rewrite the same parameters; what the other format
    cannot hold is refused with the field that stands in the way.

    Example: orthoft convert runs/minilm/experts/sarcasm sarcasm-lora --to lora --rank 16

    Example: orthoft convert runs/minilm/experts/sarcasm sarcasm-oft --to peft
    """
    from orthoft.errors import unknown

    if to not in ("lora", "peft", "orthoft"):
        raise unknown("format", to, ["lora", "peft", "orthoft"])
    if rank is not None and to != "lora":
        raise ValueError(f"--rank is of --to lora, {to} has none: got {rank}")
    from orthoft import convert as formats

    if to == "lora":
        done = formats.to_lora(adapter, out, base=base, rank=rank, overwrite=overwrite, progress=sys.stderr.isatty())
    else:
        rewrite = formats.to_peft if to == "peft" else formats.from_peft
        done = rewrite(adapter, out, base=base, tolerance=tolerance, overwrite=overwrite)
    for note in done.notes:
        typer.echo(f"note: {note}")
    if done.worst.error > 0:
        typer.echo(errors_table(done.layers))
    ranks = sorted({layer.rank for layer in done.layers if layer.rank is not None})
    rank_ = f", rank {', '.join(map(str, ranks))}" if ranks else ""
    error = f"relative error {done.error:.3g}, at most {done.worst.error:.3g} in {done.worst.name}"
    kind = "a LoRA" if to == "lora" else done.config["peft_type"]
    typer.echo(f"{out}: {kind} of {len(done.layers)} weights{rank_}: {error if done.worst.error else 'exact'}")


@app.command()
def inspect(
    path: Annotated[list[Path], typer.Argument(help="Folders of adapters or checkpoints.")],
    json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say what adapters or checkpoints hold.

    Example: orthoft inspect runs/minilm/experts/sarcasm runs/minilm/merged
    """
    from orthoft.recipes.describe import describe, described

    found = [describe(one) for one in path]
    typer.echo(json.dumps(found, indent=2) if json_ else "\n\n".join(described(one) for one in found))


@app.command()
def methods(json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List methods, spaces, outputs, adapters and their defaults.

    Example: orthoft methods
    """
    from orthoft.recipes.catalogue import catalogue, listed

    found = catalogue()
    typer.echo(json.dumps(found, indent=2, default=str) if json_ else listed(found))


def errors_table(layers: Sequence[LayerReport], most: int = 20) -> str:
    """Return the relative errors by layer, the largest ``most`` of them."""
    worst = sorted(layers, key=lambda layer: -layer.error)[:most]
    wide = max(len(layer.name) for layer in worst)
    rows = [f"{layer.name:{wide}}  {layer.rank or '-':>5}  {layer.error:.3g}" for layer in worst]
    left = [f"... and {len(layers) - most} layers with smaller errors"] if len(layers) > most else []
    return "\n".join([f"{'layer':{wide}}  {'rank':>5}  error", *rows, *left])


def parse_source(text: str) -> tuple[str | tuple[str, str], float | None]:
    """Return ``[name=]path[:weight]`` as (path, or (name, path), and the weight)."""
    rest, weight = text, None
    if found := re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", text):
        rest, weight = found[1], float(found[2])
    name, equals, path = rest.partition("=")
    if not rest or (equals and not (name and path)):
        raise ValueError(f"--source takes [NAME=]PATH[:WEIGHT], got {text!r}")
    return ((name, path) if equals else rest), weight


def parse_param(text: str) -> tuple[str, Any]:
    """Return ``key=value`` as (key, the value as YAML reads it)."""
    from orthoft.recipes.load import value_of

    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"--param takes KEY=VALUE as in density=0.3, got {text!r}")
    return key, value_of(value)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0; 2 for bad input, 1 for a failure, 130 for Ctrl-C, with one line an error."""
    # Two OpenMP threads that spin on a busy machine are slower than one; read when torch is imported, so set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="orthoft", standalone_mode=False) or 0
        if code == INTERRUPTED:  # typer turns Ctrl-C into a silent exit
            raise KeyboardInterrupt
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort):
        _fail(INTERRUPTED, "interrupted")
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        if (usage := getattr(error, "format_message", None)) is not None:
            place = getattr(getattr(error, "ctx", None), "command_path", "orthoft")
            _fail(2, f"{usage().rstrip('.')} (see {place} --help)")
        if isinstance(error, BAD_INPUT):
            _fail(2, str(error.args[0] if isinstance(error, KeyError) and error.args else error))
        _fail(1, f"{type(error).__name__}: {' '.join(str(error).split())}")


def _fail(code: int, message: str) -> None:
    for line in message.splitlines() or ["unknown"]:
        typer.echo(f"error: {line}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
