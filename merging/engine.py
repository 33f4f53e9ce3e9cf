"""The merge: of deltas in memory, or of models from disk to disk, one weight after the other."""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from orthoft.delta import Delta, Dense, LowRank
from orthoft.linalg import at_least_float32
from orthoft.merging.methods import Finish, Method, get_method
from orthoft.merging.outputs import Options, Output, get_output
from orthoft.merging.plan import MergePlan, PathLike, Sources, plan, task_weights
from orthoft.merging.report import MergeReport, WeightReport
from orthoft.merging.spaces import Space, choose_space
from orthoft.merging.tensors import as_matrix
from orthoft.merging.writer import new_folder, refuse_existing


@dataclass(frozen=True)
class Merged:
    """The merged delta of one weight, its norm, and the norms of the tasks (before their weights)."""

    delta: Delta
    norm: float
    task_norms: list[float]


def merge_deltas(
    deltas: Sequence[Delta],
    *,
    method: str,
    space: str = "auto",
    weights: Sequence[float] | None = None,
    base: Tensor | None = None,
    **params: Any,
) -> Delta:
    """Return the merge of several changes of one weight, in float32 or more; factored where the space keeps factors.

    Args:
        deltas: one per task, in order, all (m, n).
        method: a name in `orthoft.merging.METHODS`; ``params`` are its parameters.
        space: "full", "core", or "auto": core where the method provably gives the same there and all deltas have
            factors, else full.
        weights: one number per task, 1 each unless given; what they do is the method's definition.
        base: the (m, n) weight, for spaces that need it.

    Raises:
        ValueError: an unknown method, parameter or space, deltas of different shapes, or NaN or Inf in one.
        TypeError: a parameter of another type.
    """
    if not deltas:
        raise ValueError("there is nothing to merge: no deltas were given")
    chosen = get_method(method)
    bound, numbers = chosen.bind(params), task_weights(weights, len(deltas))
    for index, delta in enumerate(deltas):
        if delta.shape != deltas[0].shape:
            raise ValueError(f"delta {index} has shape {delta.shape}, delta 0 has {deltas[0].shape}")
        if not all(torch.isfinite(part).all() for part in delta.factors() or (delta.dense(),)):
            raise ValueError(f"delta {index} contains NaN or Inf")
    deltas = [delta.upcast() for delta in deltas]
    where = choose_space(space, chosen.commutes, all(delta.rank() is not None for delta in deltas))
    result = _merge_weight(deltas, chosen, bound, numbers, where, base, 0, "")
    if chosen.finish is None:
        return result.delta
    return result.delta.scaled(_scale(chosen.finish, numbers, [(result.norm, result.task_norms)]))


def merge(
    base: PathLike,
    sources: Sources,
    out: PathLike,
    *,
    method: str,
    space: str = "auto",
    weights: Sequence[float] | None = None,
    output: str = "checkpoint",
    dtype: str | None = None,
    rank: int | None = None,
    overwrite: bool = False,
    seed: int = 0,
    progress: bool = True,
    max_shard_size: int | str = "5GB",
    **params: Any,
) -> MergeReport:
    """Merge fine-tuned models on disk into one, one weight at a time, and write it to the folder ``out``.

    A source that does not change a weight counts as a zero delta there. What no source changes is copied bit for bit.
    The sum of base and delta is rounded once. ``out`` appears only when it is complete, with a ``merge_report.json``.

    Args:
        base: the base model: a folder with ``model.safetensors`` (or shards and an index), or a Hub id.
        sources: folders or Hub ids, or (name, folder) pairs: adapters and fully fine-tuned checkpoints, mixed freely.
        method, space, weights: as in `merge_deltas`; ``params`` are the method's parameters.
        output: "checkpoint", or "lora": an adapter that plain PEFT loads.
        dtype: "float32", "bfloat16" or "float16" for all floating tensors; unless given, the base's for a checkpoint
            and float32 for a LoRA.
        rank: of a LoRA, which is truncated to it; unless given, the exact one.
        overwrite: replace ``out`` if it exists.
        seed: of methods that draw, together with the name of each weight.
        max_shard_size: of a checkpoint's files, in bytes or like "5GB".

    Raises:
        FileNotFoundError: a folder or an adapter's file is missing.
        FileExistsError: ``out`` exists.
        ValueError, TypeError: an unknown name, a wrong value, a corrupt file, an adapter of another base, NaN or Inf.
    """
    start, out = time.perf_counter(), Path(out)
    make = get_output(output)
    refuse_existing(out, overwrite)
    todo = plan(base, sources, method=method, space=space, weights=weights, seed=seed, **params)
    _refuse_own_folders(todo, out)
    writer = make(todo, Options(str(base), dtype, rank, max_shard_size))
    report = MergeReport(
        base=str(base),
        sources={source.name: source.kind for source in todo.sources},
        output=str(out),
        output_kind=output,
        method=method,
        params=dict(todo.params),
        weights=todo.weights.tolist(),
        dtype=dtype,
        seed=seed,
        notes=list(todo.notes),
        not_carried={source.name: source.not_carried for source in todo.sources if source.not_carried},
    )
    with new_folder(out, overwrite) as folder:
        _write(todo, writer, folder, report, progress)
        report.seconds, report.peak_bytes = time.perf_counter() - start, _peak_bytes()
        report.save(folder / "merge_report.json")
    return report


def _refuse_own_folders(todo: MergePlan, out: Path) -> None:
    for folder in (todo.base.folder, *(source.folder for source in todo.sources)):
        if out.exists() and (folder.resolve() == out.resolve() or out.resolve() in folder.resolve().parents):
            raise ValueError(f"the output folder {out} holds what is merged ({folder}): choose another")


def _write(todo: MergePlan, writer: Output, folder: Path, report: MergeReport, progress: bool) -> None:
    """Let the output ask for each merged delta; a method with a global scale first merges all into a scratch folder."""
    from tqdm.auto import tqdm

    scratch = folder / ".merged"
    first = len(todo.merged) if todo.method.finish else 0
    with tqdm(total=first + len(writer.names), desc=todo.method.name, unit="weight", disable=not progress) as bar:
        deltas = _Deltas(todo, report, scratch)
        if todo.method.finish:
            deltas.merge_all(todo.method.finish, bar.update)

        def delta_of(name: str) -> Delta:
            bar.update()
            return deltas(name)

        writer.write(folder, delta_of, report)
    shutil.rmtree(scratch, ignore_errors=True)


class _Deltas:
    """The merged deltas of a plan by name: computed when asked for, or read back and scaled after `merge_all`."""

    def __init__(self, todo: MergePlan, report: MergeReport, scratch: Path) -> None:
        self._plan, self._report, self._scratch = todo, report, scratch
        self._files: dict[str, Path] = {}

    def __call__(self, name: str) -> Delta:
        if name not in self._files:
            return self._compute(name).delta
        return _load(self._files[name]).scaled(self._report.scale)

    def merge_all(self, finish: Finish, tick: Callable[[], Any]) -> None:
        """Merge every weight, keep the deltas on disk, and find the scale of the whole model from their norms."""
        self._scratch.mkdir()
        results: list[tuple[float, list[float]]] = []
        for index, name in enumerate(self._plan.merged):
            merged = self._compute(name)
            self._files[name] = self._scratch / f"{index}.safetensors"
            _save(merged.delta, self._files[name])
            results.append((merged.norm, merged.task_norms))
            tick()
        self._report.scale = _scale(finish, self._plan.weights, results)
        for entry in self._report.merged:
            entry.norm *= abs(self._report.scale)

    def _compute(self, name: str) -> Merged:
        todo = self._plan
        item = todo.merged[name]
        weight = as_matrix(at_least_float32(todo.base[name]))
        if not torch.isfinite(weight).all():
            raise ValueError(f"base: tensor {name!r} of {todo.base.folder} contains NaN or Inf")
        deltas = [source.delta(name, weight) if name in source.ranks else _zero(weight) for source in todo.sources]
        merged = _merge_weight(deltas, todo.method, todo.params, todo.weights, item.space, weight, todo.seed, name)
        norms = dict(zip((source.name for source in todo.sources), merged.task_norms, strict=True))
        norms = {source: norm for source, norm in norms.items() if source in item.sources}
        entry = WeightReport(name, item.shape, item.space.name, merged.delta.rank(), norms, merged.norm)
        self._report.merged.append(entry)
        return merged


def _merge_weight(
    deltas: Sequence[Delta],
    method: Method,
    params: Mapping[str, Any],
    weights: Tensor,
    space: Space,
    base: Tensor | None,
    seed: int,
    name: str,
) -> Merged:
    """Encode, merge, decode. Norms are taken in the coordinates, which keep them."""
    x, decode = space.encode(deltas, base)  # (T, p, q)
    extra = {"generator": _generator(seed, name, x.device)} if method.draws else {}
    merged = method.merge(x, weights, **params, **extra)  # (p, q)
    norms: list[float] = torch.linalg.vector_norm(x, dim=(1, 2)).tolist()
    return Merged(decode(merged), float(torch.linalg.vector_norm(merged)), norms)


def _scale(finish: Finish, weights: Tensor, results: Sequence[tuple[float, list[float]]]) -> float:
    """Return the method's scale of the whole model, from (norm, task norms) of each weight."""
    merged = math.hypot(*(norm for norm, _ in results))
    per_task = zip(*(norms for _, norms in results), strict=True)  # the norms of one task, over the weights
    tasks = [abs(w) * math.hypot(*norms) for w, norms in zip(weights.tolist(), per_task, strict=True)]
    return finish(merged, tasks)


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _zero(weight: Tensor) -> LowRank:
    return LowRank(weight.new_zeros(weight.shape[0], 0), weight.new_zeros(0, weight.shape[1]))


def _save(delta: Delta, file: Path) -> None:
    factors = delta.factors()
    parts = {"dense": delta.dense()} if factors is None else {"B": factors[0], "A": factors[1]}
    save_file({name: tensor.contiguous() for name, tensor in parts.items()}, file)


def _load(file: Path) -> Delta:
    parts = load_file(file)
    return Dense(parts["dense"]) if "dense" in parts else LowRank(parts["B"], parts["A"])


def _peak_bytes() -> int:
    """Return the largest resident memory of this process so far, 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
