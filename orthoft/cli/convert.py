"""``convert``: adapters from one format to another, models to GGUF."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthoft.cli.app import app
from orthoft.cli.output import Output

if TYPE_CHECKING:
    from orthoft.convert import Conversion, GgufFile, LayerReport

EXPORT = "Export"  # heading in the list of commands
OWNERS = {"rank": ("lora", "gguf"), "pad_rank": ("lora",), "tolerance": ("peft", "orthoft"), "dtype": ("gguf",)}
TOLERANCE = 1e-6


class To(StrEnum):
    lora = "lora"
    peft = "peft"
    orthoft = "orthoft"
    gguf = "gguf"


@app.command(rich_help_panel=EXPORT)
def convert(
    out: Output,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="An adapter, for gguf a checkpoint, too: a folder, or org/name[@state[/folder]]."
        ),
    ],
    output: Annotated[str, typer.Argument(metavar="OUT", help="The folder to write; the file for gguf.")],
    to: Annotated[
        To,
        typer.Option(
            help="lora; peft: PEFT's own OFT, HRA or PSOFT; orthoft: from one of those to ours; gguf: for llama.cpp."
        ),
    ] = To.lora,
    rank: Annotated[int | None, typer.Option(help="Of the LoRA; exact where there is an exact one, if absent.")] = None,
    pad_rank: Annotated[
        bool, typer.Option("--pad-rank", help="One rank for all layers of the LoRA, filled up with zeros.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Of matrices in a GGUF: f32, f16, bf16, q8_0; the checkpoint's, if absent.")
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="The base, if it has moved.")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help=f"For peft and orthoft: the largest relative error of a layer to accept, {TOLERANCE:g}."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Rewrite an adapter as a LoRA or as PEFT's own OFT, HRA or PSOFT, which load without orthoft, or for llama.cpp.

    A LoRA is exact for HRA and PSOFT; OFTv2, GOFT and SVFT change weights in full rank and need --rank, the best of
    that rank with its error per layer. --to peft and --to orthoft rewrite the same parameters; what the other format
    cannot hold is refused with the field that stands in the way. --to gguf writes a checkpoint, or an adapter's LoRA.

    Example: orthoft convert runs/minilm/experts/sarcasm sarcasm-lora --to lora --rank 16

    Example: orthoft convert runs/minilm/experts/sarcasm sarcasm-oft --to peft

    Example: orthoft convert runs/smollm2/merged smollm2.gguf --to gguf --dtype q8_0

    In Python: orthoft.to_lora("runs/minilm/experts/sarcasm", "sarcasm-lora", rank=16)

    In Python: orthoft.convert.to_gguf("runs/smollm2/merged", "smollm2.gguf", dtype="q8_0")
    """
    given = {"rank": rank, "pad_rank": pad_rank or None, "tolerance": tolerance, "dtype": dtype}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if to not in OWNERS[name]:
            owners = " and ".join(f"--to {owner}" for owner in OWNERS[name])
            raise ValueError(f"--{name.replace('_', '-')} is of {owners}, {to} has none: got {value}")
    done = converted(to, model, output, base=base, overwrite=overwrite, **given)
    for note in done.notes if to != To.lora else [*done.notes, *notes_on_serving(Path(output))]:
        out.say(f"note: {note}")
    out.show(*told(to, done, Path(output)))


def converted(to: To, model: str, out: str, **given: Any) -> Conversion | GgufFile:
    """Convert by the function of a format; a path would forget that ``out`` ends as a folder does."""
    from orthoft import convert as formats

    if to == To.gguf:
        return formats.to_gguf(model, out, **given)
    if to == To.lora:
        return formats.to_lora(model, out, progress=sys.stderr.isatty(), **given)
    rewrite = formats.to_peft if to == To.peft else formats.from_peft
    return rewrite(model, out, **{"tolerance": TOLERANCE, **given})


def notes_on_serving(folder: Path) -> list[str]:
    """Return what programs that serve LoRAs make of one."""
    from orthoft.convert import serving_notes

    return serving_notes(folder)


def told(to: To, done: Conversion | GgufFile, out: Path) -> tuple[dict[str, Any], str]:
    """Return what was converted, as plain values and as text."""
    from orthoft.convert import GgufFile

    if isinstance(done, GgufFile):
        kind = "checkpoint" if done.adapter is None else "LoRA"
        plain = {"path": str(out), "architecture": done.architecture, "dtype": done.dtype, "notes": done.notes}
        text = (
            f"{out}: {kind} of architecture {done.architecture} for llama.cpp, {done.tensors} tensors as {done.dtype}"
        )
        return plain | {"tensors": done.tensors, "error": done.error}, text + inexact(done.error)
    ranks = sorted({layer.rank for layer in done.layers if layer.rank is not None})
    rank = f", rank {', '.join(map(str, ranks))}" if ranks else ""
    error = f"relative error {done.error:.3g}, at most {done.worst.error:.3g} in {done.worst.name}"
    kind = "a LoRA" if to == To.lora else done.config["peft_type"]
    text = f"{out}: {kind} of {len(done.layers)} weights{rank}: {error if done.worst.error else 'exact'}"
    layers = [asdict(layer) for layer in done.layers]
    found = {"path": str(out), "peft_type": done.config["peft_type"], "error": done.error, "notes": done.notes}
    return {**found, "layers": layers}, f"{errors_table(done.layers)}\n{text}" if done.worst.error > 0 else text


def inexact(error: float) -> str:
    """Return what to add of a LoRA that is no exact one."""
    return f", relative error {error:.3g}" if error else ""


def errors_table(layers: Sequence[LayerReport], most: int = 20) -> str:
    """Return the relative errors by layer, the largest ``most`` of them."""
    worst = sorted(layers, key=lambda layer: -layer.error)[:most]
    wide = max(len(layer.name) for layer in worst)
    rows = [f"{layer.name:{wide}}  {layer.rank or '-':>5}  {layer.error:.3g}" for layer in worst]
    left = [f"... and {len(layers) - most} layers with smaller errors"] if len(layers) > most else []
    return "\n".join([f"{'layer':{wide}}  {'rank':>5}  error", *rows, *left])
