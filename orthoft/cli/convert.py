"""``convert``: adapters from one format to another."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orthoft.cli.app import app

if TYPE_CHECKING:
    from orthoft.convert import LayerReport


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


def errors_table(layers: Sequence[LayerReport], most: int = 20) -> str:
    """Return the relative errors by layer, the largest ``most`` of them."""
    worst = sorted(layers, key=lambda layer: -layer.error)[:most]
    wide = max(len(layer.name) for layer in worst)
    rows = [f"{layer.name:{wide}}  {layer.rank or '-':>5}  {layer.error:.3g}" for layer in worst]
    left = [f"... and {len(layers) - most} layers with smaller errors"] if len(layers) > most else []
    return "\n".join([f"{'layer':{wide}}  {'rank':>5}  error", *rows, *left])
