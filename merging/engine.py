"""The merge of models from disk to disk, one weight after the other."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthoft.delta import Delta
from orthoft.merging.deltas import is_small, load_delta, merged_delta, model_scale, save_delta, scaled_entry
from orthoft.merging.files.hub import asked_once
from orthoft.merging.files.tensors import as_matrix
from orthoft.merging.files.writer import Shard, write_text
from orthoft.merging.outputs import Options, Output
from orthoft.merging.parameters import plain
from orthoft.merging.plan import MergePlan, PathLike, Sources
from orthoft.merging.prepared import prepare
from orthoft.merging.ranks import Ranks, open_ranks
from orthoft.merging.reports.card import CARD, model_card, sources_config, without_defaults
from orthoft.merging.reports.report import PAGE, REPORT, MergeReport, WeightReport
from orthoft.merging.resume.identity import Identity
from orthoft.merging.resume.journal import Record
from orthoft.merging.resume.partial import Partial, partial_folder
from orthoft.merging.threads import torch_threads
from orthoft.merging.weightwise import Rescale
from orthoft.merging.wish import Overrides

FULL = (errno.ENOSPC, errno.EDQUOT)


@asked_once()
def merge(
    base: PathLike,
    sources: Sources,
    out: PathLike,
    *,
    method: str,
    space: str = "auto",
    weights: Sequence[float] | None = None,
    isotropise: bool = False,
    rescale: Rescale = "none",
    scale: float = 1.0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Overrides | None = None,
    statistics: Mapping[str, PathLike] | None = None,
    output: str = "checkpoint",
    dtype: str | None = None,
    rank: int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    seed: int = 0,
    device: str = "cpu",
    diagnostics: bool = True,
    progress: bool = True,
    max_shard_size: int | str = "5GB",
    **params: Any,
) -> MergeReport:
    """Merge fine-tuned models on disk into one, one weight at a time, and write it to the folder ``out``.

    A source that does not change a weight counts as a zero delta there. What no source changes is copied bit for bit.
    The sum of base and delta is rounded once. ``out`` appears only when it is complete, with ``report.json``,
    ``report.html`` and a model card. ``method``, ``space``, ``weights`` and ``params`` are those of `merge_deltas`,
    ``isotropise``, ``rescale`` and ``scale`` those of `orthoft.merging.weightwise.Post`, ``include``, ``exclude`` and
    ``overrides`` those of `orthoft.merging.wish.Wish`.

    What is finished stays in ``.<out>.partial`` beside ``out`` if the merge is interrupted, and the same call goes on
    from there. Started by ``torchrun`` or ``accelerate launch``, the processes share the files of the output.

    Args:
        base: the base model: a folder with ``model.safetensors`` (or shards and an index), or a place on the Hub:
            ``org/name``, ``org/name@state`` (a branch, tag or commit), ``org/name@state/folder``.
        sources: folders or places on the Hub, or (name, place) pairs: adapters and fully fine-tuned checkpoints, mixed
            freely.
        statistics: by source name, the file of its statistics, for methods that use numbers from data.
        output: "checkpoint"; "lora", an adapter that plain PEFT loads; "rotation", an OFTv2 adapter again, of sources
            that are block rotations; or "delta", the merged change, to merge more tasks into later.
        dtype: "float32", "bfloat16" or "float16" for all floating tensors; unless given, the base's for a checkpoint
            and float32 for the others.
        rank: of a LoRA, which is truncated to it; unless given, the exact one.
        overwrite: replace ``out`` if it exists.
        resume: go on from what an interrupted merge left; if not, that is removed.
        seed: of methods that draw, together with the name of each weight.
        diagnostics: measure each weight for the report, which takes about half the time of a merge in core space more.
        device: where deltas are merged: "cpu", "cuda" (each process its own), "cuda:1", or "auto".
        max_shard_size: of a checkpoint's files, in bytes or like "5GB".

    Raises:
        FileNotFoundError: a folder or an adapter's file is missing.
        FileExistsError: ``out`` exists, or another process is writing it.
        OSError: the disk is full.
        ValueError, TypeError: an unknown name, a wrong value, a corrupt file, an adapter of another base, NaN or Inf.
    """
    start, out = time.perf_counter(), Path(out)
    words: dict[str, Any] = {
        "method": method,
        "space": space,
        "isotropise": isotropise,
        "rescale": rescale,
        "scale": scale,
        "include": include,
        "exclude": exclude,
        "overrides": overrides,
        "seed": seed,
    }
    kind = {"output": output, "dtype": dtype, "rank": rank, "max_shard_size": max_shard_size}
    words, params, kind = plain([words, params, kind])
    given = {"device": device, "overwrite": overwrite, "weights": weights, "statistics": statistics, **words, **params}
    ready = prepare(base, sources, out, **kind, **given)
    todo, writer, output = ready.todo, ready.writer, kind["output"]
    report = _report(todo, writer.options, output, out)
    report.config = {
        "base": str(base),
        "sources": sources_config(sources, todo.wish.weights.tolist(), statistics or {}),
        **without_defaults({**words, **_patterns(todo), "params": params}),
        **without_defaults({"as": output, "dtype": kind["dtype"], "rank": kind["rank"]}),
    }
    identity = Identity(todo, output, writer.options, ready.device)
    ranks = open_ranks()
    with partial_folder(out, overwrite, resume, ranks) as partial, _told_if_full(writer, out):
        run = Run(todo, writer, partial, ranks, identity, ready.device, diagnostics)
        with _bar(run, method, progress and ranks.first) as tick:
            report.scale, report.merged = run.write(tick)

        def finish() -> None:
            writer.write(partial.folder, run.delta_of, report)
            report.seconds, report.peak_bytes = time.perf_counter() - start, _peak_bytes()
            report.save(partial.folder / REPORT)
            report.to_html(partial.folder / PAGE)
            write_text(partial.folder / CARD, model_card(report))

        ranks.only_first(finish)
    return report


def _patterns(todo: MergePlan) -> dict[str, list[str]]:
    return {"include": list(todo.wish.include), "exclude": list(todo.wish.exclude)}


def _report(todo: MergePlan, options: Options, output: str, out: Path) -> MergeReport:
    """Return the report of a merge before anything is merged."""
    return MergeReport(
        base=options.base,
        sources={source.name: source.kind for source in todo.sources},
        output=str(out),
        output_kind=output,
        method=todo.wish.method.name,
        params={name: value for bound in todo.wish.bound() for name, value in bound.items()},
        weights=todo.wish.weights.tolist(),
        dtype=options.dtype,
        seed=todo.seed,
        notes=list(todo.notes),
        not_carried={source: lost for source, lost in todo.not_carried.items() if lost},
    )


class Run:
    """One merge under way, in this process: what is its part of the work, what is done of it."""

    def __init__(
        self,
        todo: MergePlan,
        output: Output,
        partial: Partial,
        ranks: Ranks,
        identity: Identity,
        device: torch.device,
        diagnostics: bool,
    ) -> None:
        self._plan, self._output, self._partial, self._ranks = todo, output, partial, ranks
        self._identity, self._device, self._diagnostics = identity, device, diagnostics
        self._finish, self._waiting = todo.finish, output.waiting
        self._files = {name: partial.scratch / f"{self._key(name)}.safetensors" for name in self._waiting}
        self._scale = 1.0
        self._threads = torch.get_num_threads()

    @property
    def steps(self) -> int:
        """How many weights this process goes through, those that wait on disk twice."""
        own = [name for shard in self._ranks.share(self._output.shards) for name, *_ in shard.tensors]
        return len(self._ranks.share(self._waiting)) + sum(1 for name in own if name in self._plan.merged)

    def write(self, tick: Callable[[int], object]) -> tuple[float, list[WeightReport]]:
        """Write the deltas that wait and the shards; return the scale of the model and the reports of all weights."""
        kept = {str(file.relative_to(self._partial.folder)) for file in self._files.values()}
        self._ranks.only_first(lambda: self._partial.clean(kept | {shard.file for shard in self._output.shards}))
        entries = self._all(lambda: [self._keep(name, tick) for name in self._ranks.share(self._waiting)])
        if self._finish is not None:
            self._scale = model_scale(self._finish, self._plan, entries)
            scales = {name: self._scale * self._plan.merged[name].choice.post.scale for name in entries}
            entries = {name: scaled_entry(entry, scales[name]) for name, entry in entries.items()}
        entries |= self._all(
            lambda: [entry for s in self._ranks.share(self._output.shards) for entry in self._write_shard(s, tick)]
        )
        return self._scale, [entries[name] for name in self._plan.merged if name in entries]

    def delta_of(self, name: str) -> Delta:
        """Return a merged delta that waits on disk, with all its scales."""
        delta = load_delta(self._files[name], self._plan.base, name)
        if self._finish is None:
            return delta
        return delta.scaled(self._scale * self._plan.merged[name].choice.post.scale)

    def _all(self, work: Callable[[], list[WeightReport]]) -> dict[str, WeightReport]:
        return {entry.name: entry for part in self._ranks.each(work) for entry in part}

    def _key(self, name: str) -> str:
        return self._identity.weight(name, scaled=self._finish is None)

    def _found(self, key: str) -> Record | None:
        """Return the record of what is finished, unless its reports lack the diagnostics that are asked for now."""
        record = self._partial.journal.find(key)
        lacking = record is not None and any(entry.diagnostics is None for entry in record.merged)
        return None if lacking and self._diagnostics else record

    def _keep(self, name: str, tick: Callable[[int], object]) -> WeightReport:
        """Put a merged delta on disk, unless it is there."""
        record = self._found(self._key(name))
        if record is None:
            weight = as_matrix(self._plan.base[name])
            delta, entry = self._merge(name, weight)
            delta = self._output.keep(delta, entry) if name in self._output.names else delta
            file = self._files[name]
            digest = save_delta(delta, file)
            record = Record(self._key(name), str(file.relative_to(self._partial.folder)), digest, [entry])
            self._partial.journal.add(record)
        tick(1)
        return record.merged[0]

    def _write_shard(self, shard: Shard, tick: Callable[[int], object]) -> list[WeightReport]:
        """Write a shard, unless it is there."""
        key = self._identity.shard(shard, self._scale)
        record = self._found(key)
        if record is not None:
            tick(sum(1 for name, *_ in shard.tensors if name in self._plan.merged))
            return record.merged
        merged: list[WeightReport] = []

        def delta_on(name: str, weight: Tensor) -> Delta:
            tick(1)
            if name in self._files:
                return self.delta_of(name)
            delta, entry = self._merge(name, weight)
            merged.append(entry)
            return delta

        digest = self._output.write_shard(shard, self._partial.folder / shard.file, delta_on)
        self._partial.journal.add(Record(key, shard.file, digest, merged))
        return merged

    def _merge(self, name: str, weight: Tensor) -> tuple[Delta, WeightReport]:
        scale = self._plan.merged[name].choice.post.scale if self._finish is None else 1.0
        with torch_threads(1 if is_small(self._plan, name) else self._threads):
            rounded_to = self._output.rounded_to(name)
            return merged_delta(self._plan, name, weight, scale, self._device, self._diagnostics, rounded_to)


@contextmanager
def _bar(run: Run, name: str, shown: bool) -> Iterator[Callable[[int], object]]:
    from tqdm.auto import tqdm

    with tqdm(total=run.steps, desc=name, unit="weight", disable=not shown) as bar:
        yield bar.update


@contextmanager
def _told_if_full(output: Output, out: Path) -> Iterator[None]:
    """Turn the error of a full disk into one line that says how much is needed."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            f"the disk of {out} is full: the merge takes about {output.disk_bytes() / 1e9:.3g} GB there in all; make "
            "room and give the same command again, it goes on where it stopped"
        ) from error


def _peak_bytes() -> int:
    """Return the largest resident memory of this process so far, 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
