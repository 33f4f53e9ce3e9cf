"""Adapters in other people's formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def to_lora(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Write an adapter folder as a LoRA that plain PEFT loads, and return the report.

    Exact for adapters that are the identity plus a low rank (HRA); others need ``rank``, the best approximation of that
    rank in the Frobenius norm of the weight, with its relative error per layer in the report.

    Args:
        adapter: folder or Hub id of the adapter.
        out: folder to write; refused if it exists, without ``overwrite``.
        base: folder or Hub id of the base model; the one named in the adapter's configuration if None.
        rank: rank of the LoRA, None for the exact one.
        overwrite: replace ``out`` if it exists.
        progress: show a bar.

    Raises:
        FileNotFoundError, FileExistsError: the adapter or its base is missing, ``out`` exists.
        ValueError: the adapter is not of this base, or has no exact form and no ``rank`` is given.
    """
    from orthoft.merging import merge, plan
    from orthoft.merging.hub import base_of

    base = base_of(adapter) if base is None else base
    if rank is None:
        source = plan(base, [adapter], method="task_arithmetic").sources[0]
        if dense := [name for name in source.inputs_first if source.ranks[name] is None]:
            raise ValueError(
                f"{adapter} holds {source.kind}, which has no exact LoRA form: give the rank of an approximation "
                f"({len(dense)} weights need one, e.g. {dense[0]!r})"
            )
    report = merge(
        base,
        [adapter],
        out,
        method="task_arithmetic",
        output="lora",
        rank=rank,
        overwrite=overwrite,
        progress=progress,
    )
    return report.to_dict()
